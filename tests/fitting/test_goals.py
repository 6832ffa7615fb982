"""What fits go towards: outputs weighed, and no more of them than a patch has numbers, are the same problem."""

import pytest
import torch
from goals import goals_of
from networks import relative
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting import Accumulator, Goal, Moments
from convrewrite.fitting.objective import LastInput
from convrewrite.fitting.stages import fit, rough_fit
from convrewrite.fitting.targets import FitTarget
from convrewrite.structures import Stage, Structure, compose, discover

OUTPUTS, CHANNELS = 40, 12
"""More of the first than a patch has numbers."""

EXPANDING = ConvSpec(in_channels=CHANNELS, out_channels=OUTPUTS, kernel_size=(1, 1))

every_structure = pytest.mark.parametrize("structure", discover().values(), ids=discover().keys())


def target_of(outputs: int = OUTPUTS, d: int = CHANNELS, seed: int = 0) -> FitTarget:
    generator = torch.Generator().manual_seed(seed)
    kernel, square = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (outputs, 3 * d))
    covariance = square.T @ square / len(square)
    response = kernel @ covariance
    return FitTarget(kernel, covariance, (outputs, d, 1, 1), response, response, float((response * kernel).sum()))


def root_of(outputs: int = OUTPUTS, seed: int = 1) -> Tensor:
    square = torch.randn(2 * outputs, outputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.cholesky(square.T @ square / len(square)).mT.contiguous()


def stages(rank: int) -> tuple[Stage, ...]:
    return (Stage(CHANNELS, rank, "hw"), Stage(rank, OUTPUTS))


@pytest.mark.parametrize("root", [None, root_of()], ids=["alike", "weighed"])
def test_fewer_outputs_have_the_same_last_stage_and_error(root: Tensor | None) -> None:
    goal = Goal.of(target_of(), root)
    assert goal.narrow.target.kernel.shape == (CHANNELS, CHANNELS) and goal.outputs == OUTPUTS
    first = torch.randn(5, CHANNELS, 1, 1, dtype=torch.float64)
    found = []
    for aim in (goal.narrow, goal.weighed):
        seen = LastInput.of((first,), stages(5), aim.target.second)
        last = seen.optimum()[0]
        assert len(last) == len(aim.target.kernel)
        found.append((seen.objective(last, aim.target.scale), aim.real((first, last[:, :, None, None]))[1]))
    (narrow, narrow_last), (wide, wide_last) = found
    assert narrow == pytest.approx(wide, rel=1e-9) and 0 < wide < goal.weighed.target.scale
    assert relative(narrow_last, wide_last) < 1e-9


def test_what_is_real_and_made_its_own_again_is_the_same() -> None:
    goal = Goal.of(target_of(), root_of())
    kernels = (torch.randn(5, CHANNELS, 1, 1).double(), torch.randn(CHANNELS, 5, 1, 1).double())
    real = goal.narrow.real(kernels)
    assert real[1].shape == (OUTPUTS, 5, 1, 1)
    assert relative(goal.narrow.own(real)[1], kernels[1]) < 1e-9
    wide = (kernels[0], torch.randn(OUTPUTS, 5, 1, 1).double())
    assert relative(goal.weighed.own(goal.weighed.real(wide))[1], wide[1]) < 1e-9


def test_other_wanted_outputs_are_reached_as_well() -> None:
    """They need not be what any kernel gives."""
    goal, other = Goal.of(target_of(), root_of()), torch.randn(OUTPUTS, CHANNELS).double()
    towards = goal.towards(MomentsOf(other))  # type: ignore[arg-type]
    first = torch.randn(5, CHANNELS, 1, 1, dtype=torch.float64)
    lasts = []
    for aim in (towards.narrow, towards.weighed):
        last = LastInput.of((first,), stages(5), aim.target.second).optimum()[0]
        lasts.append(aim.real((first, last[:, :, None, None]))[1])
    assert relative(lasts[0], lasts[1]) < 1e-9


class MomentsOf:
    """Moments of which nothing but the wanted outputs is asked."""

    def __init__(self, cov_yp: Tensor) -> None:
        self.cov_yp = cov_yp


def test_each_kind_of_last_stage_has_its_aim() -> None:
    goal = Goal.of(target_of(), root_of())
    assert goal.aim(stages(CHANNELS)) is goal.narrow
    assert goal.aim(stages(CHANNELS + 1)) is goal.weighed, "its input has more numbers than there are outputs"
    alone = (Stage(CHANNELS, OUTPUTS), Stage(OUTPUTS, OUTPUTS, "hw", groups=OUTPUTS))
    assert goal.aim(alone) is goal.plain, "it does not mix its outputs"
    few = Goal.of(target_of(outputs=CHANNELS))
    assert few.narrow is few.weighed is few.plain


def test_another_precision_holds_the_covariance_once() -> None:
    goal = Goal.of(target_of(), root_of()).to(torch.float32)
    each = [aim.target.covariance for aim in (goal.plain, goal.weighed, goal.narrow)]
    assert len({covariance.data_ptr() for covariance in each}) == 1
    parts = (goal.narrow.target.response, goal.narrow.root, goal.narrow.basis, goal.narrow.back)
    assert all(part is not None and part.dtype == torch.float32 for part in parts)
    assert Goal.of(target_of(), root_of()).narrow.target.covariance.dtype == torch.float64


@every_structure
def test_fits_towards_fewer_outputs_are_as_good(structure: Structure) -> None:
    if structure.reject(EXPANDING) is not None:
        pytest.skip("not for a pointwise convolution")
    target = target_of()
    goal = Goal.of(target, root_of())
    wide = Goal(goal.plain, goal.weighed, goal.weighed)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, CHANNELS, 1, 1, generator=generator).double()
    moments = moments_of(x, target.kernel)
    for variant in structure.variants(EXPANDING):
        setting = {**variant, "rank": 2}
        found, expected = (
            fit(structure, EXPANDING, setting, [own], moments, moments, iterations=20) for own in (goal, wide)
        )
        assert [kernel.shape for kernel in found.kernels] == [kernel.shape for kernel in expected.kernels]
        assert found.unexplained == pytest.approx(expected.unexplained, rel=1e-3)


@every_structure
def test_a_first_layer_has_more_outputs_than_a_patch_has_numbers(structure: Structure) -> None:
    """What a structure makes of its setting goes by the convolution's own channels."""
    spec = ConvSpec(in_channels=3, out_channels=64, kernel_size=(3, 3), padding=(1, 1))
    kernel = torch.randn(spec.kernel_shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    accumulator = Accumulator(spec, 0, 0)
    accumulator.add(x, torch.nn.functional.conv2d(x, kernel, padding=1))
    moments = accumulator.result()
    goals = goals_of(kernel, spec, moments)
    for variant in structure.variants(spec):
        for rank in sorted({1, min(22, top := structure.full_rank(spec, variant)), top}):
            setting = {**variant, "rank": rank}
            stages = structure.stages(spec, setting)
            expected = [kernel.shape for kernel in structure.weights(kernel, spec, setting)]
            for found in (
                fit(structure, spec, setting, goals, moments, moments, iterations=3),
                rough_fit(structure, spec, setting, moments, [goal.to(torch.float32) for goal in goals]),
            ):
                assert [kernel.shape for kernel in found.kernels] == expected
                assert compose(found.kernels, stages).shape == spec.kernel_shape


def moments_of(x: Tensor, kernel: Tensor) -> tuple[Moments, ...]:
    accumulator = Accumulator(EXPANDING, 0, 0)
    accumulator.add(x, (x.flatten(1) @ kernel.T)[:, :, None, None])
    return accumulator.result()
