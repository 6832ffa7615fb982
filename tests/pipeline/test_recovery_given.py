"""Recovery told what does not fit: labels, augmentations, files that were changed, checkpoints of other measures."""

from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import natural, state_bytes
from onnx_texts import graph
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import convrewrite
from convrewrite.calibration import Calibration, Reading
from convrewrite.errors import CalibrationError, ModelLoadError, UsageError
from convrewrite.pipeline.identity import NOT_TOLD, identity_of
from convrewrite.pipeline.networks import example_for, network_of
from convrewrite.reporting import render_text
from convrewrite.rules import Rule
from convrewrite.settings import Recovery
from convrewrite.tuning import Checkpoint, TrainingInputs
from convrewrite.tuning.distilling import PATIENCE

CLASSES = 5
EXAMPLE = torch.zeros(1, 3, 8, 8)
HALF = Rule(name="half", structures=("asymmetric",), ratio=0.3)


class Net(nn.Module):
    """Class scores, or a map where ``flat`` is False."""

    def __init__(self, flat: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, CLASSES, 1)
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.conv(torch.relu(self.stem(x)))))
        return out.mean((2, 3)) if self.flat else out


@pytest.fixture(scope="module")
def images() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return natural(40, 3, 8, 8, dtype=torch.float32)


def came(images: Tensor, flat: bool = True) -> tuple[Net, convrewrite.Result]:
    torch.manual_seed(1)
    model = Net(flat).eval()
    return model, convrewrite.optimize(model, images[:1], [HALF], "weights", measure=False)


def recovered(came: tuple[Net, convrewrite.Result], images: Tensor, **asked: object) -> convrewrite.Result:
    settings = {"measure": False, "epochs": 2, "batch": 8, "rate": 0.02, "features": 0.0} | asked
    return convrewrite.recover(came[1], came[0], images, EXAMPLE, **settings)  # type: ignore[arg-type]


def test_the_recipe_in_a_report_is_the_one_that_was_followed(images: Tensor) -> None:
    report = recovered(came(images), images, batch=500, seed=12_345_678).report
    assert report.recovered is not None and report.recovered.settings["batch"] == report.recovered.trained_on == 32
    assert "batch 32" in render_text(report) and "seed 12345678" in render_text(report).replace("\n  ", " ")


def test_labels_are_classes_of_the_model(images: Tensor) -> None:
    given, labels = came(images), torch.arange(len(images)) % CLASSES
    for wrong, found in ((labels + 1, "found 5"), (labels - 100, "found -100")):
        with pytest.raises(UsageError, match=f"labels: expected 0 to 4, as output has 5 classes, {found}; number"):
            recovered(given, images, labels=wrong)
    for wrong in (labels > 2, labels.to(torch.complex64), labels.float()):
        with pytest.raises(UsageError, match="labels: expected 40 whole numbers"):
            recovered(given, images, labels=wrong)
    assert recovered(given, images, labels=labels.to(torch.uint8)).report.recovered


def test_labels_need_an_output_that_is_class_scores(images: Tensor) -> None:
    with pytest.raises(UsageError, match=r"labels: expected an output of class scores, .*leave them out"):
        recovered(came(images, flat=False), images, labels=torch.zeros(len(images), dtype=torch.long))
    given = came(images)
    with pytest.raises(UsageError, match=r"labels: expected an output of class scores, .*found output \(values\)"):
        recovered(given, images, outputs={"output": "values"}, labels=torch.zeros(len(images), dtype=torch.long))


@pytest.mark.parametrize("made", [None, 3, "text"])
def test_an_augmentation_that_gives_no_batch_is_told_of(made: object, images: Tensor) -> None:
    with pytest.raises(UsageError, match=f"expected it to give what it takes, .* found {type(made).__name__}"):
        recovered(came(images), images, augment=lambda _batch: made)


@pytest.mark.parametrize(
    ("augment", "found"),
    [(Tensor.to_sparse, "torch.sparse_coo torch.float32 .* on cpu"), (lambda x: x.to("meta"), ".* on meta")],
)
def test_an_augmentation_that_gives_a_batch_elsewhere_is_told_of(augment: object, found: str, images: Tensor) -> None:
    with pytest.raises(UsageError, match=f"expected it to give what it takes, torch.float32 .* on cpu, found {found}"):
        recovered(came(images), images, augment=augment)


def test_an_augmentation_that_gives_no_numbers_is_named_as_the_cause(images: Tensor) -> None:
    told = recovered(came(images), images, augment=lambda batch: batch * float("nan")).report.recovered
    assert told is not None and told.unchanged
    assert told.ended is not None and "an augmentation that gives finite numbers" in told.ended


def test_inputs_for_which_the_original_gives_no_numbers_are_named_as_the_cause(images: Tensor) -> None:
    class Careful(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3))[:, None] > most, torch.nan, super().forward(x))

    most, model = images.max() - 1e-6, Careful().eval()
    given = model, convrewrite.optimize(model, images[:1], [HALF], "weights", measure=False)
    for rate, cause in ((0.02, "inputs for which the original gives numbers"), (1e30, "a smaller rate")):
        told = recovered(given, images if rate < 1 else images.clamp(max=most), rate=rate).report.recovered
        assert told is not None and told.ended is not None and told.ended.endswith(f"; {cause} would help")


def test_a_checkpoint_is_not_gone_on_with_under_another_measure_or_augmentation(images: Tensor, tmp_path: Path) -> None:
    given, notes = came(images), []

    def changed(batch: Tensor) -> Tensor:
        return batch + 1

    changed.__qualname__ = "flipped"

    def flipped(batch: Tensor) -> Tensor:
        return batch.flip(3)

    flipped.__qualname__ = "flipped"
    lock = Lock()

    def locked(batch: Tensor) -> Tensor:
        with lock:
            return batch

    for asked in (
        {},
        {"outputs": {"output": "embedding"}},
        {"outputs": {"output": ("logits", 0.5)}},
        {"augment": flipped},
        {"augment": locked},
        {"augment": locked},
        {"augment": changed},
        {"augment": changed},
        {},  # what was set aside meanwhile
    ):
        found = recovered(given, images, checkpoint=tmp_path / "state", **asked)
        notes.append(any("went on from" in note for note in found.report.notes))
        assert (NOT_TOLD in found.report.notes) == (asked == {"augment": locked})
    assert notes == [False] * 7 + [True] * 2


def test_a_run_is_another_where_anything_differs_that_its_steps_depend_on(images: Tensor) -> None:
    result, labels, asked = came(images)[1], torch.zeros(30, dtype=torch.long), Recovery(epochs=2)
    given = TrainingInputs((images[:30],), (images[30:],))
    again = replace(result, model=Net().eval())

    def identified(result: convrewrite.Result, given: TrainingInputs, asked: Recovery) -> str:
        return identity_of(result.plan, result.model, given, asked, {}, None)

    others = [
        replace(given, labels=labels), replace(given, labels=labels + 1), replace(given, held_out=(images[29:],)),
        replace(given, train=(images[:29],)),
    ]  # fmt: skip
    changes: list[dict[str, Any]] = [
        {"epochs": 3}, {"epochs": None, "minutes": 1.0}, {"epochs": None, "minutes": 2.0}, {"rate": 0.5}, {"batch": 9},
        {"temperature": 3.0}, {"features": 0.9}, {"everything": True}, {"seed": 1},
    ]  # fmt: skip
    told = [identified(result, given, asked), identified(again, given, asked)]
    told += [identified(result, other, asked) for other in others]
    told += [identified(result, given, replace(asked, **change)) for change in changes]
    assert len(set(told)) == len(told)


def test_of_a_calibration_what_is_held_out_stays_held_out(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"epochs": 1, "batch": 8, "features": 0.0, "measure": False}
    model, result = came(images)
    parts, split = [], TrainingInputs.split
    monkeypatch.setattr(TrainingInputs, "split", lambda *given: parts.append(split(*given)) or parts[-1])
    data = Calibration(((images[:20],), (images[20:27],)), ((images[27:],),), "data", "mine")
    told = convrewrite.recover(result, model, data, images[:1], **asked).report
    assert told.recovered is not None and (told.recovered.trained_on, told.recovered.held_out) == (27, 13)
    assert told.fidelity_basis == "measured on 13 held-out inputs of mine"
    (own,) = parts[0].held_out
    assert all(any(torch.equal(image, other) for other in images[27:]) for image in own)
    assert not any("itself chose what to hold out" in note for note in told.notes)
    undivided = Calibration(((images,),), (), "data", "mine")
    again = convrewrite.recover(result, model, undivided, images[:1], **asked).report
    assert again.recovered is not None and (again.recovered.trained_on, again.recovered.held_out) == (32, 8)
    assert any(
        "mine: expected 1 inputs or more both in fit and in held_out, found 40 and 0, so" in note
        for note in again.notes
    )
    with pytest.raises(CalibrationError, match=r"expected 1 tensors in every batch, .* found 2"):
        convrewrite.recover(result, model, Calibration(((images, images),), (), "data", "mine"), images[:1], **asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_example_that_is_made_has_the_precision_of_the_model(dtype: torch.dtype) -> None:
    report: Any = SimpleNamespace(input_shapes=((1, 3, 8, 8),))
    (found,) = example_for(report, Net().to(dtype), None)
    assert found.dtype == dtype and found.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("reported", "expected"), [((1, 3, 9, 9), (1, 3, 9, 9)), ((1, 2, 9, 9), (1, 3, 224, 224))])
def test_the_example_of_a_graph_has_the_shape_in_the_report(reported: Any, expected: tuple[int, ...]) -> None:
    model = graph(
        "(float[N, 3, H, W] x, float rate) => (float[N, 3, H, W] y) { a = Conv(x, w) y = Mul(a, rate) }",
        {"w": (3, 3, 1, 1)},
    )
    report: Any = SimpleNamespace(input_shapes=(reported,))
    assert [tuple(x.shape) for x in network_of(model, None, 30.0, report).inputs] == [expected]


class Buffers(Net):
    """Keeps its kernels as buffers, and has no parameter."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in [*self.named_parameters()]:
            owner = self.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            owner.register_buffer(name.rpartition(".")[2], parameter.detach())


def test_a_model_without_parameters_is_left_as_it_is(images: Tensor) -> None:
    model = Buffers().eval()
    given = model, convrewrite.optimize(model, images[:1], [HALF], "weights", measure=False)
    told = recovered(given, images).report.recovered
    assert told is not None and told.unchanged


def test_a_limit_counts_where_one_is_given(images: Tensor) -> None:
    told = recovered(came(images), images, epochs=1, reading=Reading(limit=20)).report.recovered
    assert told is not None and (told.trained_on, told.held_out) == (16, 4)


def test_labels_are_not_taken_for_those_of_inputs_that_were_drawn(images: Tensor) -> None:
    given, labels = came(images), torch.arange(20) % CLASSES
    with pytest.raises(UsageError, match=r"labels: expected all inputs to be read, .* found reading with limit=20"):
        recovered(given, images, labels=labels, reading=Reading(limit=20))
    found = recovered(given, images[:20], labels=labels, epochs=1, reading=Reading(limit=20)).report.recovered
    assert found is not None and found.settings["labels"] == "given"


def test_labels_are_not_taken_for_those_of_inputs_that_were_shuffled(images: Tensor) -> None:
    given, labels = came(images), torch.arange(len(images)) % CLASSES
    data = TensorDataset(images, labels)
    with pytest.raises(
        UsageError, match=r"labels: expected inputs that come in the order of .* RandomSampler; make one"
    ):
        recovered(given, DataLoader(data, 8, shuffle=True), labels=labels)  # type: ignore[arg-type]
    assert recovered(given, DataLoader(data, 8), labels=labels, epochs=1).report.recovered  # type: ignore[arg-type]


def test_the_seed_says_what_is_held_out(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(_inputs: object, _labels: object, seed: int, *_rest: object) -> None:
        raise UsageError(f"seed {seed}")

    monkeypatch.setattr(TrainingInputs, "split", split)
    with pytest.raises(UsageError, match=r"^seed 7$"):
        recovered(came(images), images, seed=7)


def test_a_training_that_had_ended_when_it_was_killed_does_not_go_on(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, asked = came(images), {"rate": 1e3, "epochs": 20, "checkpoint": tmp_path / "state"}
    whole = recovered(given, images, **asked).report.recovered
    assert whole is not None and whole.ended is not None and f"{PATIENCE} looks" in whole.ended
    monkeypatch.setattr(Checkpoint, "save", lambda *_: pytest.fail("no step is left"))
    again = recovered(given, images, **asked)
    assert again.report.recovered is not None
    assert (again.report.recovered.steps, again.report.recovered.ended) == (whole.steps, whole.ended)


@pytest.mark.parametrize("file", ["weights.safetensors", "model.onnx"])
def test_a_folder_with_other_weights_than_its_report_describes_is_not_loaded_or_recovered(
    file: str, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = Net().eval()
    folder = convrewrite.optimize(model, images[:1], [HALF], images, any_speed=True, fast=True).save(tmp_path / "out")
    other = convrewrite.optimize(model, images[:1], ["separable"], images, any_speed=True, fast=True, seed=1)
    other.save(tmp_path / "other")
    before = state_bytes(convrewrite.load(folder, model))
    (folder / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(ModelLoadError, match=f"{file}: the folder is not what its report describes"):
        convrewrite.recover(folder, model, images, epochs=1, measure=False)
    if file == "model.onnx":  # of a module the weights are loaded
        assert state_bytes(convrewrite.load(folder, model)) == before
        return
    with pytest.raises(ModelLoadError, match=f"{file}: the folder is not what its report describes"):
        convrewrite.load(folder, model)
    (folder / "report.json").unlink()
    with pytest.raises(ModelLoadError, match="does not fit the plan beside it"):
        convrewrite.load(folder, model)
