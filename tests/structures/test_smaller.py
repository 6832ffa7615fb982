"""The middle of a kernel: its geometry, where there is none, and what it computes."""

import pytest
import torch
from networks import SPECS, natural, relative
from torch import Tensor

from convrewrite.conv import ConvSpec, Size
from convrewrite.fitting.moments import Accumulator
from convrewrite.fitting.stages import fit, rough_fit, targets_of
from convrewrite.rewriting.surgery import build_conv, build_option
from convrewrite.structures.algebra import compose, cropped, initial_kernels, through
from convrewrite.structures.families.smaller import STRUCTURE
from convrewrite.structures.lowering import make_option, stage_specs
from convrewrite.structures.structure import Setting, Stage

ROUND = ConvSpec(4, 6, (3, 3), padding=(1, 1))
NARROW: Setting = {"along": "width", "rank": 1}
POINT: Setting = {"along": "height-and-width", "rank": 1}

GEOMETRIES = {
    **{name: spec for name, spec in SPECS.items() if STRUCTURE.reject(spec.per_group) is None},
    "five by five": ConvSpec(4, 6, (5, 5), stride=(2, 1), padding=(2, 2)),
    "transposed, four by four": ConvSpec(4, 6, (4, 4), stride=(2, 2), padding=(1, 1), transposed=True),
}


def with_zeros_around(kernel: Tensor, stage: Stage) -> Tensor:
    """The kernel with zeros where the stage leaves it out."""
    return compose((cropped(stage, kernel),), (stage,))


@pytest.mark.parametrize("spec", GEOMETRIES.values(), ids=GEOMETRIES)
@torch.no_grad()
def test_it_computes_what_the_kernel_with_zeros_around_its_middle_does(spec: ConvSpec) -> None:
    x = torch.randn(2, spec.in_channels, 11, 10, dtype=torch.float64)
    kernel = torch.randn(spec.kernel_shape, dtype=torch.float64)
    bias = torch.randn(spec.out_channels, dtype=torch.float64) if spec.bias else None
    for variant in STRUCTURE.variants(spec.per_group):
        for rank in range(1, STRUCTURE.full_rank(spec.per_group, variant) + 1):
            setting = {**variant, "rank": rank}
            stages = STRUCTURE.stages(spec.per_group, setting)
            wanted = build_conv(spec, with_zeros_around(kernel, stages[0]), bias, x)(x)
            kernels = initial_kernels(STRUCTURE, kernel, spec, setting)
            found = build_option(spec, stages, make_option(STRUCTURE, spec, setting), kernels, bias, x)(x)
            assert found.shape == wanted.shape, setting
            assert relative(found, wanted) < 1e-12, setting


@pytest.mark.parametrize(
    ("setting", "size", "padding"),
    [
        ({"along": "width", "rank": 1}, (3, 1), (2, 0)),
        ({"along": "height", "rank": 1}, (1, 3), (0, 2)),
        ({"along": "height-and-width", "rank": 1}, (1, 1), (0, 0)),
        ({"along": "height-and-width", "rank": 2}, (3, 3), (2, 2)),
    ],
)
def test_what_is_left_stays_where_it_was(setting: Setting, size: Size, padding: Size) -> None:
    spec = ConvSpec(4, 6, (3, 3), (2, 1), (2, 2), (2, 2), padding_mode="reflect")
    [found] = stage_specs(spec, STRUCTURE.stages(spec, setting))
    assert found == ConvSpec(4, 6, size, (2, 1), padding, (2, 2), padding_mode="reflect")


def test_each_rank_leaves_out_one_row_or_column_at_either_end() -> None:
    spec = ConvSpec(4, 6, (5, 7), padding=(2, 3))
    sizes = {
        word: [
            stage_specs(spec, STRUCTURE.stages(spec, {"along": word, "rank": rank}))[0].kernel_size
            for rank in range(1, STRUCTURE.full_rank(spec, {"along": word}) + 1)
        ]
        for word in ("height", "width", "height-and-width")
    }
    assert sizes["height"] == [(1, 7), (3, 7), (5, 7)]
    assert sizes["width"] == [(5, 1), (5, 3), (5, 5), (5, 7)]
    assert sizes["height-and-width"] == [(1, 1), (1, 3), (3, 5), (5, 7)]


def test_no_more_is_left_out_than_the_padding_can_become_narrower_by() -> None:
    spec = ConvSpec(4, 6, (5, 5), padding=(1, 0))
    [found] = stage_specs(spec, STRUCTURE.stages(spec, POINT))
    assert (found.kernel_size, found.padding) == ((3, 5), (0, 0))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ConvSpec(4, 6, (1, 1)), "no rows or columns"),
        (ConvSpec(4, 6, (2, 2), padding=(1, 1)), "no rows or columns"),
        (ConvSpec(4, 6, (3, 3)), "padding is too narrow"),
        (ConvSpec(4, 6, (3, 3), padding="valid"), "padding is too narrow"),
        (ConvSpec(4, 6, (3, 3), padding=(1, 1), dilation=(2, 2)), "padding is too narrow"),
    ],
)
def test_where_nothing_can_be_left_out_it_says_why(spec: ConvSpec, reason: str) -> None:
    assert reason in (STRUCTURE.reject(spec) or "")


def test_an_asymmetric_kernel_becomes_shorter_along_its_own_axis() -> None:
    assert STRUCTURE.variants(ConvSpec(4, 6, (1, 5), padding=(0, 2))) == ({"along": "width"},)
    assert STRUCTURE.variants(ConvSpec(4, 6, (5, 2), padding=(2, 0))) == ({"along": "height"},)


def test_a_stage_sees_only_what_it_does_not_leave_out() -> None:
    stage, patches = Stage(4, 6, "hw", crop=(1, 0)), torch.randn(5, 4, 3, 3)
    kernel = torch.randn(stage.kernel_shape((3, 3)))
    expected = torch.einsum("nchw,ochw->no", patches[:, :, 1:2], kernel)
    torch.testing.assert_close(through(stage, kernel, patches)[:, :, 0, 0], expected)


@pytest.mark.parametrize("setting", [NARROW, POINT])
def test_the_fit_is_the_least_squares_of_the_patches_that_are_left(setting: Setting) -> None:
    kernel, x = torch.randn(ROUND.kernel_shape, dtype=torch.float64), natural(24, 4, 9, 10)
    moments = Accumulator(ROUND, 0, 0)
    moments.add(x, build_conv(ROUND, kernel, torch.zeros(6, dtype=torch.float64), x)(x).detach())
    seen = moments.result()
    targets = targets_of(kernel, ROUND, seen)
    stages = STRUCTURE.stages(ROUND, setting)
    columns = cropped(stages[0], torch.arange(36).reshape(1, 4, 3, 3)).flatten()
    covariance, response = targets[0].covariance[columns][:, columns], targets[0].response[:, columns]
    expected = torch.linalg.solve(covariance, response.mT).mT
    found = fit(STRUCTURE, ROUND, setting, targets, seen, seen)
    assert relative(found.kernels[0].flatten(1), expected) < 1e-6
    rough = rough_fit(STRUCTURE, ROUND, setting, seen, targets)
    assert relative(rough.kernels[0].flatten(1), expected) < 1e-6
    assert found.unexplained < seen[0].unexplained(with_zeros_around(kernel, stages[0]))
