"""Last stages for several trusts, against those that are fitted to a target with each."""

import pytest
import torch
from networks import SPECS, natural
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting.few_inputs import Evidence
from convrewrite.fitting.found import unexplained
from convrewrite.fitting.last_stages import LastStages
from convrewrite.fitting.moments import Accumulator, Moments
from convrewrite.fitting.stages import fit, refit
from convrewrite.fitting.trust import FULL, Trust
from convrewrite.rewriting.surgery import build_conv
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Structure

SPEC = SPECS["standard"]


@torch.no_grad()
def moments_of(kernel: Tensor, count: int) -> tuple[Moments, ...]:
    conv = build_conv(SPEC, kernel, torch.zeros(len(kernel), dtype=kernel.dtype), kernel)
    inputs = natural(count, SPEC.in_channels, 9, 10)
    accumulator = Accumulator(SPEC, 0, 0)
    accumulator.add(inputs + 0.1 * torch.randn_like(inputs), conv(inputs))
    return accumulator.result()


def evidence_of(spec: ConvSpec = SPEC) -> Evidence:
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    seen, unseen = moments_of(kernel, 3), moments_of(kernel, 6)
    return Evidence.of(spec, kernel, seen, unseen, 3, [None])


@pytest.mark.parametrize("structure", discover().values(), ids=discover().keys())
@pytest.mark.parametrize("trust", [FULL, Trust(0.1), Trust(1.0), Trust(shrinkage=0.4), Trust(0.03, 1.0)])
def test_a_trust_leaves_what_the_last_stage_of_its_own_target_leaves(structure: Structure, trust: Trust) -> None:
    given = evidence_of()
    for variant in structure.variants(SPEC):
        setting = {**variant, "rank": 2}
        stages = structure.stages(SPEC, setting)
        first = fit(structure, SPEC, setting, given.goals(), given.seen, given.unseen, 0)
        own = refit(stages, first, given.goals([trust], solved=False), given.seen, given.unseen, 0)
        last_stages = LastStages.of(first.kernels[:-1], stages, given.grounds[0], given.unseen[0])
        seen, unseen = last_stages.shares(trust)
        assert seen == pytest.approx(unexplained(own.kernels, stages, given.seen[0]), rel=1e-6)
        assert unseen == pytest.approx(own.unexplained, rel=1e-6)


def test_a_target_that_was_not_solved_for_differs_in_its_kernel_alone() -> None:
    given = evidence_of()
    trust = [Trust(0.1, 0.2)]
    solved, plain = (given.goals(trust, solved=own)[0].target for own in (True, False))
    assert torch.equal(solved.covariance, plain.covariance)
    assert torch.equal(solved.response, plain.response)
    assert torch.allclose(solved.response, solved.kernel @ solved.covariance, rtol=1e-9)
    assert torch.equal(plain.kernel, given.kernel.flatten(1))
