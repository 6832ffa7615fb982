"""Values are compared with how much they vary, and scores beside boxes in a part of their own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from convrewrite.meanings import Fidelity, Meaning, OutputFidelity, RunningFidelity, along_axis, tell
from convrewrite.meanings.variation import Variation
from convrewrite.rewriting.output_weighting import _along_a_direction
from convrewrite.runtime.parity import RunningParity
from convrewrite.tuning.losses import Distillation

VALUES = Meaning("values", "")
BOXES = Meaning("values", "", axis=1, shares=tuple(range(4, 44)))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def detections(*, seed: int = 0, count: int = 24) -> Tensor:
    """``(count, 44, 30)``: boxes in pixels, 40 scores of which few are large."""
    numbers = drawn(count, 44, 30, seed=seed)
    return torch.cat([300 + 300 * numbers[:, :4], (numbers[:, 4:] - 4).sigmoid()], 1)


def fidelity(a: Tensor, b: Tensor, meaning: Meaning = VALUES, parts: int = 1) -> OutputFidelity:
    running = RunningFidelity({"y": meaning})
    for one, other in zip(a.chunk(parts), b.chunk(parts), strict=True):
        running.add({"y": one}, {"y": other})
    (found,) = running.outputs()
    return found


def scales_of(output: Tensor, meaning: Meaning) -> Tensor:
    variation = Variation(meaning)
    variation.see(output)
    return variation.scales()


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 5), (12,)], ids=str)
def test_the_variance_is_that_of_each_channel_however_the_inputs_are_batched(shape: tuple[int, ...]) -> None:
    a = 300 + drawn(*shape)
    b = a + 0.1 * drawn(*shape, seed=1)
    rows, others = (x.movedim(1, -1).flatten(0, -2) if x.ndim > 1 else x[:, None] for x in (a, b))
    torch.testing.assert_close(scales_of(a, VALUES), rows.var(0))
    found = fidelity(a, b, parts=3)
    wanted = ((rows - others).square().mean(0) / rows.var(0)).mean()
    assert found.unexplained == pytest.approx(float(wanted), rel=1e-9)
    assert found.effect == found.unexplained and found.relative_error < 1e-3


def test_what_always_gives_the_mean_explains_nothing_however_small_its_error() -> None:
    a = 300 + drawn(200, 1)
    found = fidelity(a, a.mean().expand_as(a))
    assert found.relative_error < 0.01 and found.unexplained == pytest.approx(1.0, abs=0.01)
    assert fidelity(a, a).unexplained == 0.0
    assert Fidelity((found, OutputFidelity("z", 0.1, 0.9, 0.01)), 200).most_unexplained == found.unexplained
    assert Fidelity((OutputFidelity("z", 0.1, 0.9, 0.01),), 200).most_unexplained == 0.0


def test_constants_and_single_numbers_are_compared_with_their_size() -> None:
    constant = torch.full((10, 2), 300.0, dtype=torch.float64)
    for numbers in (constant, constant[:1], constant + 0.2 * drawn(10, 2)):
        torch.testing.assert_close(scales_of(numbers, VALUES).mean(), constant.square().mean(), rtol=1e-3, atol=0)
    found = fidelity(constant, 1.1 * constant)
    assert (found.unexplained, found.effect) == (None, pytest.approx(0.01))
    assert float(scales_of(constant + drawn(10, 2), VALUES).max()) < 4
    assert scales_of(torch.zeros(3, 2), VALUES).tolist() == [1.0], "errors are absolute then"
    odd = torch.tensor([[1.0, math.inf], [3.0, math.nan], [math.nan, 5.0]])
    assert (scales_of(odd, VALUES) * 3).tolist() == pytest.approx([2.0 * 2 * 2, 25.0 * 2])
    assert fidelity(torch.zeros(4, 2), torch.ones(4, 2)).effect == math.inf


def test_entries_that_change_from_batch_to_batch_have_one_mean() -> None:
    sums = Variation(VALUES)
    a, b = drawn(5, 3), 2 + drawn(6, 2)
    for batch in (a, b, b):
        sums.add(batch, batch + 0.1)
    numbers = torch.cat([x.flatten() for x in (a, b, b)])
    assert sums.unexplained == pytest.approx(0.01 / float(numbers.var()))


def test_each_of_a_few_quantities_counts_alike_in_its_own_unit() -> None:
    pose = drawn(60, 3) * torch.tensor([10.0, 10.0, 0.1])
    lost = pose.clone()
    lost[:, 2] = 0
    assert fidelity(pose, lost).relative_error < 0.01
    assert fidelity(pose, lost).unexplained == pytest.approx(1 / 3, rel=0.05)
    features = torch.cat([pose, drawn(60, 40)], 1)
    assert fidelity(features, torch.cat([lost, features[:, 3:]], 1)).unexplained < 1e-4  # type: ignore[operator]


def test_a_column_that_hardly_varies_is_compared_with_the_others() -> None:
    for still in (torch.zeros(60), 5 + 1e-6 * drawn(60)):
        a = drawn(60, 3)
        a[:, 2] = still
        variance = a.var(0)
        whole = torch.stack([variance[0], variance[1], variance.mean()])
        found, b = scales_of(a, VALUES), a + 0.1
        torch.testing.assert_close(found, whole)
        assert fidelity(a, b).unexplained == pytest.approx(float((0.01 / whole).mean()))
    assert along_axis(scales_of(a, VALUES), a[:, :2], VALUES).ndim == 0, "of another number of entries, the mean"


class Detector(nn.Module):
    """Boxes and scores in one output, in channels or in rows; ``clamped``: by a function that leaves no units apart."""

    def __init__(self, *, rows: bool = False, clamped: bool = False) -> None:
        super().__init__()
        self.rows, self.clamped = rows, clamped

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([300 + 100 * x[:, :4], (x[:, 4:] - 2).sigmoid()], 1)
        y = y.mT if self.rows else y
        return y.relu() if self.clamped else y


@pytest.mark.parametrize(("rows", "axis"), [(False, 1), (True, -1)])
def test_scores_beside_boxes_are_found(rows: bool, axis: int) -> None:
    batches = [(drawn(24, 6, 30),)]
    found = tell(Detector(rows=rows), batches)["output"]
    assert (found.kind, found.axis, found.shares) == ("values", axis, (4, 5))
    boxes, scores = found.parts(Detector(rows=rows)(batches[0][0]))
    assert (boxes.shape[axis], scores.shape[axis]) == (4, 2) and float(scores.max()) < 1 < float(boxes.max())
    said = tell(Detector(rows=rows), batches, {"output": replace(VALUES, weight=2.0)})["output"]
    assert (said.axis, said.shares, said.weight) == (axis, (4, 5), 2.0)
    again = tell(Detector(rows=rows), batches, known={"output": said})["output"]
    assert again == said and "scores beside boxes" in said.reason


def test_neither_few_inputs_nor_features_have_parts() -> None:
    assert tell(Detector(), [(drawn(8, 6, 30),)])["output"].shares == ()
    assert tell(Detector(clamped=True), [(drawn(24, 6, 30),)])["output"].shares == ()
    smaller = drawn(2, 5, 3)
    assert BOXES.parts(smaller) == (smaller,), "an output of another size is not taken apart"


def test_the_worse_of_boxes_and_scores_is_the_error_and_both_count() -> None:
    a = detections()
    b = a.clone()
    b[:, 4:] = a[:, 4:].mean()
    found = fidelity(a, b, BOXES)
    alone = fidelity(a[:, 4:], b[:, 4:])
    assert found.relative_error == pytest.approx(alone.relative_error, rel=1e-14) and alone.relative_error > 0.3
    assert found.unexplained == pytest.approx(0.5, rel=0.01)
    assert alone.unexplained == pytest.approx(1.0, rel=0.01)
    assert fidelity(a, b).unexplained < 1e-4, "in one part the scores are invisible"  # type: ignore[operator]


def test_training_is_towards_the_unexplained_variance() -> None:
    a = detections()
    b = a + torch.cat([5 * drawn(24, 4, 30, seed=1), 0.05 * drawn(24, 40, 30, seed=2)], 1)
    for meaning, one, other in ((BOXES, a, b), (VALUES, a, b), (VALUES, a[:, :6], b[:, :6])):
        loss = Distillation.of({"y": one}, {"y": meaning})({"y": one}, {"y": other}, {}, {})
        assert float(loss) == pytest.approx(fidelity(one, other, meaning).effect, rel=1e-5)


def test_boxes_and_scores_matter_alike_to_the_weights_of_sites() -> None:
    output = detections().requires_grad_()
    (gradient,) = torch.autograd.grad(
        _along_a_direction(output, BOXES, scales_of(output, BOXES), torch.Generator().manual_seed(0)), output
    )
    for part, numbers in zip(BOXES.parts(gradient), BOXES.parts(output.detach()), strict=True):
        variance = numbers.movedim(1, -1).flatten(0, -2).var(0).mean()
        assert float(part.square().sum() * variance) == pytest.approx(24 / 2, rel=0.2)


@pytest.mark.parametrize(("meaning", "passed"), [(BOXES, False), (VALUES, True)])
def test_a_wrong_score_is_not_rounding_beside_boxes(meaning: Meaning, passed: bool) -> None:
    a = detections().float()
    b = a.clone()
    b[:, 4] += 0.01
    running = RunningParity("onnxruntime", {"y": meaning})
    for one, other in zip(a.chunk(2), b.chunk(2), strict=True):
        running.add({"y": one}, {"y": other})
    (found,) = running.result().outputs
    assert found.passed == passed and found.max_abs_difference == pytest.approx(0.01, rel=1e-3)
