"""Batches lie channels last in memory where the model takes them so, and are the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from convrewrite.calibration.batches import Calibration
from convrewrite.calibration.choose import calibrate, channels_last, evaluation_inputs, whole_inputs
from convrewrite.errors import CalibrationError


class Viewing(nn.Module):
    """Asks for a layout by ``view``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(len(x), -1)


def test_images_lie_channels_last_and_stay_the_same() -> None:
    batches = [(torch.randn(2, 3, 8, 8), torch.randn(2, 5)) for _ in range(2)]

    class Both(nn.Module):
        def forward(self, x: Tensor, vector: Tensor) -> Tensor:
            return x.mean((1, 2, 3)) + vector.sum(1)

    moved = channels_last(Both(), batches)
    for found, given in zip(moved, batches, strict=True):
        assert found[0].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
        assert found[0].clone().is_contiguous(memory_format=torch.channels_last), "copies keep the layout"


def test_a_model_that_views_its_images_gets_them_as_they_were() -> None:
    batches = [(torch.randn(2, 3, 8, 8),)]
    (found,) = channels_last(Viewing(), batches)
    assert found[0] is batches[0][0]


def test_no_batches_stay_none() -> None:
    assert channels_last(Viewing(), []) == ()


def test_a_model_of_a_fixed_batch_is_tried_on_a_whole_one() -> None:
    class Four(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) != 4:
                raise ValueError("as a runtime refuses it")
            return x.mean((1, 2, 3))

    batches = [(torch.randn(4, 3, 8, 8),)]
    (found,) = channels_last(Four(), batches, 4)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    (refused,) = channels_last(Four(), batches)
    assert refused[0] is batches[0][0]


@pytest.mark.parametrize(
    ("count", "fitted_on", "held_out"), [(12, 12, 0), (13, 12, 0), (30, 12, 12), (40, 24, 12), (130, 96, 24)]
)
def test_a_model_of_a_fixed_batch_uses_all_whole_batches_there_are(count: int, fitted_on: int, held_out: int) -> None:
    given = torch.arange(float(count))[:, None].expand(count, 3)
    data = calibrate(nn.Linear(3, 2), (torch.zeros(12, 3),), given, batch=12)
    assert (data.fitted_on, data.held_out_count) == (fitted_on, held_out)
    rows = torch.cat([inputs[0][:, 0] for inputs in (*data.fit, *data.held_out)])
    assert len(rows.unique()) == fitted_on + held_out
    assert all(len(inputs[0]) == 12 for inputs in (*data.fit, *data.held_out))


def test_what_the_caller_holds_out_stays_held_out() -> None:
    fit, held_out = torch.zeros(30, 3), torch.ones(13, 3)
    data = Calibration(((fit,),), ((held_out,),), "data", "mine")
    found = calibrate(nn.Linear(3, 2), (torch.zeros(12, 3),), data, batch=12)
    assert [float(inputs[0].mean()) for inputs in (*found.fit, *found.held_out)] == [0, 0, 1]


def test_an_empty_batch_of_a_calibration_is_refused() -> None:
    data = Calibration(((torch.zeros(30, 3),), (torch.zeros(0, 3),)), ((torch.ones(13, 3),),), "data", "mine")
    with pytest.raises(
        CalibrationError, match="expected examples in every batch, found none in batch 1 of fit; leave it"
    ):
        calibrate(nn.Linear(3, 2), (torch.zeros(12, 3),), data)


def test_the_whole_of_a_calibration_has_one_shape_and_one_row_for_each_example() -> None:
    def whole(*batches: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return whole_inputs(Calibration(batches[:1], batches[1:], "data", "mine"))

    x, y = torch.zeros(2, 3), torch.ones(4, 3)
    assert torch.equal(whole((x,), (y,))[0], torch.cat([x, y]))
    with pytest.raises(CalibrationError, match=r"expected inputs of one shape, .* found 3, 5; make"):
        whole((x,), (torch.zeros(2, 5),))
    for scale in (torch.ones(1), torch.tensor(1.0)):
        with pytest.raises(CalibrationError, match="expected as many examples in every input of a batch, found 2x3, "):
            whole((x, scale))
    with pytest.raises(CalibrationError, match="found a calibration without any"):
        whole()


def test_fewer_inputs_than_a_fixed_batch_are_refused() -> None:
    with pytest.raises(
        CalibrationError, match="expected at least 12 inputs, as the model takes so many at a time, found 11"
    ):
        calibrate(nn.Linear(3, 2), (torch.zeros(12, 3),), torch.zeros(11, 3), batch=12)


@pytest.mark.parametrize("batch", [12, 100])
def test_noise_fills_a_fixed_batch_of_any_size(batch: int) -> None:
    example = (torch.zeros(batch, 3),)
    found = evaluation_inputs(example, calibrate(nn.Linear(3, 2), example, "weights", batch=batch), batch)
    assert found.batches
    assert all(len(inputs[0]) == batch for inputs in found.batches)


class Counted(nn.Module):
    """Takes images, and how much each of them counts."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) * weight


@pytest.mark.parametrize(
    ("model", "example", "batch", "why"),
    [
        (nn.Conv2d(3, 2, 3), (torch.zeros(1, 3, 8, 8),), None, "has no BatchNorm statistics to make any from"),
        (nn.Linear(3, 2), (torch.zeros(1, 3),), None, "takes no images, which alone could be made"),
        (Counted(), (torch.zeros(1, 3, 8, 8), torch.ones(1)), None, "takes several inputs"),
        (nn.Conv2d(3, 2, 3), (torch.zeros(4, 3, 8, 8),), 4, "takes so many examples at a time only"),
    ],
    ids=["no statistics", "no images", "several", "a fixed batch"],
)
def test_why_there_are_no_inputs_is_told(
    model: nn.Module, example: tuple[Tensor, ...], batch: int | None, why: str
) -> None:
    found = calibrate(model, example, None, batch=batch)
    assert (found.kind, found.fit, found.held_out) == ("weights only", (), ())
    (note,) = found.notes
    assert note.startswith(f"no calibration inputs were given and the model {why}")


def test_what_is_measured_on_is_told() -> None:
    one, two = ((torch.zeros(3, 2),),), ((torch.ones(2, 2),),)
    example = (torch.zeros(1, 2), torch.tensor([[7]]))
    bases = {kind: evaluation_inputs(example, Calibration(one, two, kind, "given")) for kind in ("data", "synthetic")}
    assert [found.basis for found in bases.values()] == [
        "measured on 2 held-out calibration inputs", "measured on 2 held-out synthetic inputs",
    ]  # fmt: skip
    assert all(found.batches is two and not found.noise for found in bases.values())
    fitted = evaluation_inputs(example, Calibration(one, (), "data", "given"))
    assert (fitted.basis, fitted.batches) == ("measured on the 3 inputs that the factors were fitted on", one)
    noise = evaluation_inputs(example, Calibration((), (), "weights only", "none"))
    ((numbers, indices),) = noise.batches
    assert noise.noise and noise.basis.startswith("measured on 64 random noise inputs")
    assert numbers.shape == (64, 2) and len(numbers.unique()) == 128
    assert indices.shape == (64, 1) and indices.unique().tolist() == [7], "indices that the model is known to take"


def test_noise_for_images_of_bytes_is_drawn_and_that_for_masks_is_not() -> None:
    image, mask = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    ((images, masks),) = evaluation_inputs((image, mask), Calibration((), (), "weights only", "none")).batches
    assert images.shape == (64, 3, 8, 8) and images.dtype == torch.uint8
    assert len(images.unique()) == 256 and len(images.flatten(1).unique(dim=0)) == 64
    assert masks.shape == (64, 1, 8, 8) and bool(masks.all())
