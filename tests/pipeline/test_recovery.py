"""Recovery: towards the original, never worse, resumable, told of in the report."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer
from networks import natural, state_bytes
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import CalibrationError, PlanError, UsageError
from convrewrite.pipeline import notes, recovery
from convrewrite.reporting import Report, render_html, render_markdown, render_text
from convrewrite.rules import Rule
from convrewrite.settings import Recovery
from convrewrite.tuning import Checkpoint

IMAGES = (64, 3, 12, 12)


class Net(nn.Module):
    """A block with a skip connection and a BatchNorm, and class scores."""

    def __init__(self, outputs: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.conv(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


HALF = Rule(name="half", structures=("asymmetric",), ratio=0.3)


@pytest.fixture(scope="module")
def images() -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return natural(*IMAGES, dtype=torch.float32)


@pytest.fixture(scope="module")
def came(images: Tensor) -> tuple[Net, convrewrite.Result]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Net().eval()
        with torch.no_grad():
            model.head.weight.mul_(8)
    return model, convrewrite.optimize(model, images[:1], [HALF], "weights", measure=False)


def recovered(came: tuple[Net, convrewrite.Result], images: Tensor, **asked: object) -> convrewrite.Result:
    model, result = came
    settings = {"measure": False, "epochs": 20, "batch": 16, "rate": 0.02, "features": 0.0} | asked
    return convrewrite.recover(result, model, images, images[:1], **settings)  # type: ignore[arg-type]


def test_outputs_come_nearer_and_nothing_that_came_in_is_touched(
    came: tuple[Net, convrewrite.Result], images: Tensor
) -> None:
    model, result = came
    before = state_bytes(model), state_bytes(result.model)
    found = recovered(came, images)
    told = found.report.recovered
    assert told is not None
    assert told.after < 0.5 * told.before and not told.unchanged
    assert told.curve[0] == (0, told.before) and (told.kept_step, told.after) in told.curve
    assert (told.trained_on, told.held_out, told.steps) == (51, 13, 60)
    assert (state_bytes(model), state_bytes(result.model)) == before
    changed = {name for name, value in state_bytes(found.model).items() if value != before[1][name]}
    assert changed == {name for name in before[1] if name.startswith(("stem.", "conv."))} - kept(result)
    assert found.model.head.weight.requires_grad


def kept(result: convrewrite.Result) -> set[str]:
    names = [site.name for site in result.plan.sites if site.option is None]
    return {name for name in result.model.state_dict() if name.startswith(tuple(f"{site}." for site in names))}


def test_the_same_seed_gives_the_same_bytes_and_another_others(
    came: tuple[Net, convrewrite.Result], images: Tensor
) -> None:
    one, two, other = (recovered(came, images, seed=seed, epochs=2) for seed in (0, 0, 1))
    assert state_bytes(one.model) == state_bytes(two.model) != state_bytes(other.model)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_an_absurd_rate_returns_what_came_in_and_says_so(
    came: tuple[Net, convrewrite.Result], images: Tensor, rate: float
) -> None:
    found = recovered(came, images, rate=rate)
    told = found.report.recovered
    assert told is not None and told.unchanged and told.after == told.before and told.ended is not None
    assert state_bytes(found.model) == state_bytes(came[1].model)
    assert "returned unchanged" in render_text(found.report)


def test_all_parameters_train_where_asked(came: tuple[Net, convrewrite.Result], images: Tensor) -> None:
    model, result = copy.deepcopy(came)
    for one in (model, result.model):
        one.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = recovered((model, result), images, everything=True, epochs=4)
    assert found.model.stem.weight.stride() == model.stem.weight.stride()  # type: ignore[operator, union-attr]
    assert not torch.equal(found.model.head.weight, came[1].model.head.weight)  # type: ignore[arg-type, union-attr]
    assert torch.equal(came[0].head.weight, came[1].model.head.weight)  # type: ignore[arg-type, union-attr]


def test_features_at_the_ends_of_blocks_and_labels_count_beside(
    came: tuple[Net, convrewrite.Result], images: Tensor
) -> None:
    labels = came[0](images).argmax(1)
    plain, features, labelled = (
        recovered(came, images, epochs=4, **asked) for asked in ({}, {"features": 0.5}, {"labels": labels})
    )
    assert state_bytes(plain.model) != state_bytes(features.model) != state_bytes(labelled.model)
    assert all(result.report.recovered and not result.report.recovered.unchanged for result in (features, labelled))
    with pytest.raises(UsageError, match="labels: expected 64 whole numbers"):
        recovered(came, images, labels=labels[:10])


def test_augmentation_changes_what_is_trained_on_and_must_keep_shapes(
    came: tuple[Net, convrewrite.Result], images: Tensor
) -> None:
    seen: list[int] = []

    def mirrored(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        return torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(3), batch)

    one, two = (recovered(came, images, augment=mirrored, epochs=2) for _ in range(2))
    assert set(seen) == {16}
    assert state_bytes(one.model) == state_bytes(two.model) != state_bytes(recovered(came, images, epochs=2).model)
    with pytest.raises(UsageError, match="augmentation: expected it to give what it takes"):
        recovered(came, images, augment=lambda batch: batch[:, :1])
    with pytest.raises(UsageError, match="augmentation: calling it raised ZeroDivisionError"):
        recovered(came, images, augment=lambda batch: batch / (1 // 0))


@pytest.mark.parametrize("kind", ["values", "embedding", "multilabel"])
def test_outputs_that_are_no_class_scores_are_recovered_as_what_they_are(images: Tensor, kind: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(Net(6), nn.Sigmoid()).eval() if kind == "multilabel" else Net(6).eval()
    result = convrewrite.optimize(model, images[:1], [HALF], "weights", measure=False, outputs={"output": kind})
    found = convrewrite.recover(result, model, images, epochs=20, batch=16, rate=0.02, measure=False)
    told = found.report.recovered
    assert told is not None and told.after < 0.5 * told.before
    assert found.report.fidelity[0].taken_for == kind


class Killed(Exception):
    """Stands for a signal."""


def test_a_run_that_was_killed_goes_on_to_the_same_result(
    came: tuple[Net, convrewrite.Result], images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recovered(came, images, checkpoint=tmp_path / "whole")
    saved = Checkpoint.save

    def killed(checkpoint: Checkpoint, path: Path) -> None:
        saved(checkpoint, path)
        if checkpoint.standing.step >= 24:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", killed)
        with pytest.raises(Killed):
            recovered(came, images, checkpoint=tmp_path / "state")
    again = recovered(came, images, checkpoint=tmp_path / "state")
    assert state_bytes(again.model) == state_bytes(whole.model)
    assert "went on from step 24" in " ".join(again.report.notes)
    anew = recovered(came, images, checkpoint=tmp_path / "state", resume=False)
    assert state_bytes(anew.model) == state_bytes(whole.model)
    assert "went on" not in " ".join(anew.report.notes)


def test_a_checkpoint_of_another_run_is_not_gone_on_with_and_other_files_are_left_alone(
    came: tuple[Net, convrewrite.Result], images: Tensor, tmp_path: Path
) -> None:
    recovered(came, images, checkpoint=tmp_path / "state", epochs=2)
    earlier = (tmp_path / "state").read_bytes()
    other = recovered(came, images, checkpoint=tmp_path / "state", epochs=2, seed=5)
    assert "went on" not in " ".join(other.report.notes)
    [aside] = tmp_path.glob("state.*")
    assert aside.read_bytes() == earlier != (tmp_path / "state").read_bytes()
    assert f"was set aside as {aside.name}" in " ".join(other.report.notes)
    (tmp_path / "mine").write_text("my only copy")
    with pytest.raises(UsageError, match="expected a checkpoint of a training, found something else"):
        recovered(came, images, checkpoint=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "my only copy"
    broken = bytearray((tmp_path / "state").read_bytes())
    broken[-4:] = b"\xff\xff\xff\xff"  # no number
    (tmp_path / "state").write_bytes(bytes(broken))
    with pytest.raises(UsageError, match="expected finite numbers; the checkpoint is broken"):
        recovered(came, images, checkpoint=tmp_path / "state", epochs=2, seed=5)


def test_a_saved_result_is_recovered_measured_and_saved_whole(
    came: tuple[Net, convrewrite.Result], images: Tensor, tmp_path: Path
) -> None:
    model, result = came
    folder = result.save(tmp_path / "out")
    found = convrewrite.recover(folder, model, images, epochs=4, batch=16, rate=0.02)
    assert found.report.parity and all(row.passed for row in found.report.parity)
    assert found.report.totals.onnx_latency_seconds is not None
    assert found.plan == result.plan
    found.save(folder)
    loaded = convrewrite.load(folder, model)
    assert state_bytes(loaded) == state_bytes(found.model)
    report = Report.model_validate_json((folder / "report.json").read_text())
    assert report.recovered == found.report.recovered
    assert (folder / "model.onnx").is_file()


def test_a_recovered_result_is_timed_where_it_was_and_tells_what_was_asked(
    came: tuple[Net, convrewrite.Result], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, result = came
    trained = recovery._trained
    monkeypatch.setattr(recovery, "_trained", lambda *given: replace(trained(*given), seconds=90.0))
    elsewhere = replace(result, report=result.report.model_copy(update={"runtime": "torch"}))
    timer = FalseTimer()
    found = recovered((model, elsewhere), images, epochs=1, measure=True, timer=timer, threads=2)
    assert (set(timer.targets), timer.threads, found.report.threads) == ({"torch"}, {2}, 2)
    told = found.report.recovered
    assert told is not None and told.minutes == 1.5
    assert told.settings == {
        "epochs": 1, "rate": 0.02, "batch": 16, "temperature": Recovery().temperature, "features": 0.0,
        "trained": "rewritten sites", "seed": 0,
    }  # fmt: skip


def test_errors_of_sites_are_told_of_as_long_as_they_are_there(
    came: tuple[Net, convrewrite.Result], images: Tensor
) -> None:
    model, result = came
    refined = "refined in 9 steps: the effect on held-out inputs fell from 0.2 to 0.1"
    told = (refined + notes.SITES_AS_FITTED,)
    refined_result = replace(result, report=result.report.model_copy(update={"notes": told}))
    assert recovered((model, refined_result), images, rate=1e3).report.notes[0] == told[0]
    assert recovered((model, refined_result), images, epochs=1).report.notes[0] == refined


def test_the_curve_is_in_every_form_of_the_report(came: tuple[Net, convrewrite.Result], images: Tensor) -> None:
    report = recovered(came, images, epochs=4).report
    told = report.recovered
    assert told is not None
    assert "Held-out effect" in render_text(report)
    page, text = render_html(report), render_markdown(report)
    assert page.count("<svg") == 1 and "effect on held-out inputs" in page
    assert all(f"| {step} | {effect:.3g} |" in " ".join(text.split()) for step, effect in told.curve)
    assert all(site.output_error is None for site in report.sites)


def test_what_cannot_be_recovered_is_refused(came: tuple[Net, convrewrite.Result], images: Tensor) -> None:
    with pytest.raises(CalibrationError, match="expected at least 2 inputs"):
        recovered(came, images[:1])
    with pytest.raises(PlanError, match="other weights"):
        convrewrite.recover(came[1], Net(), images, images[:1], measure=False)
    for name, value in {"rate": -1.0, "epochs": math.inf, "minutes": 0.0, "batch": 0, "temperature": 0.0}.items():
        asked = {"epochs": None, name: value}
        with pytest.raises(UsageError, match=f"^{name}"):
            recovered(came, images, **asked)
    with pytest.raises(UsageError, match="found both"):
        recovered(came, images, minutes=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'speed'"):
        recovered(came, images, speed=1)


class Counting(Net):
    """A running mean, updated in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(12))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        self.mean.mul_(0.9).add_(x.mean((0, 2, 3)))
        out: Tensor = self.head(torch.relu(x + self.norm(self.conv(x))).mean((2, 3)))
        return out


def test_buffers_that_a_forward_updates_are_not_those_of_the_training(images: Tensor) -> None:
    torch.manual_seed(1)
    model = Counting().eval()
    came = convrewrite.optimize(model, images[:1], [HALF], images, measure=False, fast=True, refine=False)
    found = convrewrite.recover(came, model, images, epochs=4, batch=16, measure=False)
    for one in (model, came.model, found.model):
        assert torch.equal(one.get_buffer("mean"), torch.ones(12))
        assert not one.get_buffer("mean").requires_grad
    trained = [name for name, p in found.model.named_parameters() if not torch.equal(p, came.model.get_parameter(name))]
    assert trained
