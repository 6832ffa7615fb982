"""Values are compared with how much they vary, and scores beside boxes in a part of their own."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from convrewrite.meanings import Fidelity, Meaning, OutputFidelity, RunningFidelity, Variation, tell
from convrewrite.rewriting.output_weighting import _along_a_direction
from convrewrite.runtime.parity import RunningParity
from convrewrite.tuning.losses import Distillation

VALUES = Meaning("values", "")
BOXES = Meaning("values", "", axis=1, shares=(4, 5))


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def detections(*, seed: int = 0, count: int = 24) -> Tensor:
    """``(count, 6, 30)``: boxes in pixels, two scores."""
    numbers = drawn(count, 6, 30, seed=seed)
    return torch.cat([300 + 100 * numbers[:, :4], (numbers[:, 4:] - 2).sigmoid()], 1)


def fidelity(a: Tensor, b: Tensor, meaning: Meaning = VALUES, parts: int = 1) -> OutputFidelity:
    running = RunningFidelity({"y": meaning})
    for one, other in zip(a.chunk(parts), b.chunk(parts), strict=True):
        running.add({"y": one}, {"y": other})
    (found,) = running.outputs()
    return found


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 5), (12,)], ids=str)
def test_the_variance_is_that_of_each_channel_however_the_inputs_are_batched(shape: tuple[int, ...]) -> None:
    a = 300 + drawn(*shape)
    columns = a.movedim(1, -1).flatten(0, -2) if a.ndim > 1 else a[:, None]
    assert Variation.per_number(a, VALUES) == pytest.approx(float(columns.var(0).mean()), rel=1e-9)
    b = a + 0.1 * drawn(*shape, seed=1)
    energy = float(columns.var(0).sum()) * len(columns)
    found = fidelity(a, b, parts=3)
    assert found.unexplained == pytest.approx(float((a - b).square().sum()) / energy, rel=1e-9)
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
        assert Variation.per_number(numbers, VALUES) == pytest.approx(300.0**2, rel=1e-3)
    found = fidelity(constant, 1.1 * constant)
    assert (found.unexplained, found.effect) == (None, pytest.approx(0.01))
    assert Variation.per_number(constant + drawn(10, 2), VALUES) < 4
    assert Variation.per_number(torch.zeros(3, 2), VALUES) == 1.0, "errors are absolute then"
    odd = torch.tensor([[1.0, math.inf], [3.0, math.nan], [math.nan, 5.0]])
    assert Variation.per_number(odd, VALUES) == pytest.approx((2 * 2.0 + 25.0) / 3)
    assert fidelity(torch.zeros(4, 2), torch.ones(4, 2)).effect == math.inf


def test_batches_of_other_sizes_have_means_of_their_own() -> None:
    sums = Variation()
    a, b = 100 + drawn(5, 3), 200 + drawn(6, 2)
    for batch in (a, b):
        sums.add(batch, VALUES)
    assert sums.energy == pytest.approx(float(a.var(0).sum() * 5 + b.var(0).sum() * 6))


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
    assert found.relative_error == alone.relative_error > 0.3
    assert found.unexplained == pytest.approx(alone.unexplained / 2)  # type: ignore[operator]
    assert fidelity(a, b).unexplained < 1e-5, "in one part the scores are invisible"  # type: ignore[operator]


def test_training_is_towards_the_unexplained_variance() -> None:
    a = detections()
    b = a + torch.cat([5 * drawn(24, 4, 30, seed=1), 0.05 * drawn(24, 2, 30, seed=2)], 1)
    loss = Distillation.of({"y": a}, {"y": BOXES})({"y": a}, {"y": b}, {}, {})
    assert float(loss) == pytest.approx(fidelity(a, b, BOXES).effect, rel=1e-5)  # type: ignore[arg-type]


def test_boxes_and_scores_matter_alike_to_the_weights_of_sites() -> None:
    output = detections().requires_grad_()
    (gradient,) = torch.autograd.grad(_along_a_direction(output, BOXES, torch.Generator().manual_seed(0)), output)
    boxes, scores = BOXES.parts(gradient * Variation.per_number(output[:, :4], VALUES) ** 0.5), BOXES.parts(gradient)
    assert float(boxes[0].square().sum()) == pytest.approx(24 / 2, rel=0.2)
    scale = Variation.per_number(output[:, 4:], VALUES)
    assert float(scores[1].square().sum()) * scale == pytest.approx(24 / 2, rel=0.2)


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
