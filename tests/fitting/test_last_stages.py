"""Last stages for several trusts, against those that are fitted to a target with each."""

import goals
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
from convrewrite.structures.algebra import compose
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Setting, Stage, Structure

SPEC = SPECS["standard"]


class Spatial:
    """A pointwise, then a vertical and a horizontal stage for each output: a last stage in groups behind another spatial one."""

    name, reference = "spatial", "a test"

    def reject(self, spec: ConvSpec) -> str | None:
        return None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        return spec.in_channels * spec.kernel_size[0]

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        outputs, inner = spec.out_channels, spec.out_channels * int(setting["rank"])
        return Stage(spec.in_channels, inner), Stage(inner, inner, "h", inner), Stage(inner, outputs, "w", outputs)

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        """The first rows of the kernel, each picked out by its channel and its height."""
        outputs, rank = len(kernel), int(setting["rank"])
        channels, heights = (torch.eye(n, dtype=kernel.dtype) for n in kernel.shape[1:3])
        picked = [(c, h) for c in range(len(channels)) for h in range(len(heights))][:rank]
        pointwise = torch.stack([channels[c] for c, _ in picked]).repeat(outputs, 1)
        vertical = torch.stack([heights[h] for _, h in picked]).repeat(outputs, 1)
        return pointwise[:, :, None, None], vertical[:, None, :, None], kernel.flatten(1, 2)[:, :rank, None]


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


@pytest.mark.parametrize("structure", [*discover().values(), Spatial()], ids=lambda structure: structure.name)
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


def test_a_last_stage_in_groups_may_follow_any_other() -> None:
    given, structure = evidence_of(), Spatial()
    stages = structure.stages(SPEC, {"rank": 2})
    found = fit(structure, SPEC, {"rank": 2}, given.goals(), given.seen, given.unseen, 4)
    assert found.unexplained == pytest.approx(goals.unexplained(compose(found.kernels, stages), given.unseen[0]))
    start = structure.weights(given.kernel, SPEC, {"rank": 2})
    assert found.unexplained < 0.8 * unexplained(start, stages, given.unseen[0])


def test_a_target_that_was_not_solved_for_differs_in_its_kernel_alone() -> None:
    given = evidence_of()
    trust = [Trust(0.1, 0.2)]
    solved, plain = (given.goals(trust, solved=own)[0].target for own in (True, False))
    assert torch.equal(solved.covariance, plain.covariance)
    assert torch.equal(solved.response, plain.response)
    assert torch.allclose(solved.response, solved.kernel @ solved.covariance, rtol=1e-9)
    assert torch.equal(plain.kernel, given.kernel.flatten(1))
