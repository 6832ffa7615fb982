"""``convrewrite recover``: what the command takes, writes, and says; in one process, and in two that gloo joins."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clocks import FalseTimer
from commands import call, images, listing, small_network
from safetensors.torch import load_file

import convrewrite
from convrewrite import pipeline
from convrewrite.calibration import Reading
from convrewrite.cli import recovering
from convrewrite.cli.interrupts import Interrupted, tells_what_stands
from convrewrite.cli.networks import GivenNetwork, given_network
from convrewrite.cli.recovering import with_whole_numbers
from convrewrite.errors import UsageError
from convrewrite.reporting import Report
from convrewrite.results import read_report
from convrewrite.rules import Rule
from convrewrite.tuning import processes
from convrewrite.tuning.processes import PRECISION

RULE = Rule(name="low", structures=("asymmetric",), ratio=0.3)
BRIEF = ("--epochs", "4", "--batch", "16", "--rate", "0.02", "--no-onnx")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A result beside its model and its inputs; the report names the model's file."""
    network = small_network()
    torch.save(network, tmp_path / "model.pt")
    np.save(tmp_path / "x.npy", images(60).numpy())
    name = str(tmp_path / "model.pt")
    result = convrewrite.optimize(network, images(1), [RULE], "weights", measure=False, name=name)
    return result.save(tmp_path / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def recover(out: Path, *arguments: object) -> tuple[object, ...]:
    return ("recover", out, "--data", out.parent / "x.npy", *BRIEF, *arguments)


def test_a_result_is_recovered_in_its_place_and_no_checkpoint_is_left(out: Path) -> None:
    before = weights(out)
    ran = call(*recover(out))
    assert ran.code == 0, ran.err
    assert "Held-out effect" in ran.said and f"Written to {out}" in ran.said
    told = Report.model_validate_json((out / "report.json").read_text()).recovered
    assert told is not None and told.after < told.before
    assert any(not torch.equal(value, before[name]) for name, value in weights(out).items())
    assert not [name for name in listing(out.parent) if "recovering" in name]


def test_indices_are_taken_from_the_data(tmp_path: Path) -> None:
    """The shapes in a report do not tell that an input holds whole numbers."""

    class Tagged(torch.nn.Module):
        def forward(self, image: torch.Tensor, tag: torch.Tensor) -> torch.Tensor:
            return image + tag

    network = GivenNetwork(Tagged(), (torch.ones(2, 3, 4, 4), torch.ones(2, 5)), ())
    torch.save({"tag": torch.arange(10).view(2, 5), "image": torch.zeros(2, 3, 4, 4)}, tmp_path / "x.pt")
    image, tag = with_whole_numbers(network, str(tmp_path / "x.pt")).inputs
    assert torch.equal(image, network.inputs[0]) and tag.tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.save({"tag": torch.arange(8).view(2, 4), "image": torch.zeros(2, 3, 4, 4)}, tmp_path / "x.pt")
    for data in (str(tmp_path / "x.pt"), str(tmp_path), "code.py:batches"):  # another size, or none
        assert with_whole_numbers(network, data).inputs[1] is network.inputs[1]


def test_inputs_that_forward_does_not_name_are_taken_from_the_data(tmp_path: Path) -> None:
    class All(torch.nn.Module):
        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return inputs[0]

    class First(All):
        def forward(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            return first

    one, two = (torch.ones(2, 3, 4, 4),), (torch.ones(2, 3, 4, 4), torch.ones(2, 5))
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 4, 4), np.float32))
    torch.save((torch.zeros(2, 3, 4, 4), torch.arange(10).view(2, 5)), tmp_path / "x.pt")
    assert with_whole_numbers(GivenNetwork(All(), one, ()), str(tmp_path / "x.npy")).inputs[0] is one[0]
    for model in (All(), First()):
        _, tag = with_whole_numbers(GivenNetwork(model, two, ()), str(tmp_path / "x.pt")).inputs
        assert tag.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_another_folder_augmentation_labels_and_a_model_may_be_named(out: Path) -> None:
    (out.parent / "mine.py").write_text("def flipped(batch):\n    return batch.flip(3)\n")
    np.savez(out.parent / "y.npz", labels=np.arange(60) % 10)
    before = weights(out)
    ran = call(
        *recover(out, "-o", out.parent / "new", "--augment", f"{out.parent / 'mine.py'}:flipped"),
        "--labels", out.parent / "y.npz", "--model", out.parent / "model.pt", "--all",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "augmentation flipped" in ran.said and "all parameters" in ran.said and "labels given" in ran.said
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())
    assert (out.parent / "new" / "report.html").is_file()


def test_what_was_asked_reaches_the_training(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def train(*given: object, **named: object) -> None:
        asked.update(named, result=given[0], example=given[3])
        raise UsageError("not here")

    def network_of(*given: Any) -> GivenNetwork:
        return replace(given_network(*given), notes=("of another code", *read_report(out).notes))

    monkeypatch.setattr(pipeline, "recover", train)
    monkeypatch.setattr(recovering, "given_network", network_of)
    words = ("--input", "1x3x12x12", "--no-resume", "--mean", "0,0,0", "--std", "1,1,2", "--resize", "20x24")
    assert call(*recover(out, *words)).message == "not here"
    assert asked["result"] == out and asked["checkpoint"] == out.with_name("out.recovering")
    assert [tensor.shape for tensor in asked["example"]] == [(1, 3, 12, 12)]  # type: ignore[attr-defined]
    assert asked["reading"] == Reading(mean=[0, 0, 0], std=[1, 1, 2], resize=(20, 24)) and asked["resume"] is False
    assert asked["notes"] == ["of another code"], "the others are in the report already"


def test_an_absurd_rate_is_said_and_the_result_as_it_was(out: Path) -> None:
    before = weights(out)
    ran = call("recover", out, "--data", out.parent / "x.npy", "--epochs", "4", "--rate", "1e9", "--no-onnx")
    assert ran.code == 0 and "returned unchanged" in ran.said
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())


def test_the_onnx_file_of_a_result_that_stays_is_described(tmp_path: Path) -> None:
    network, folder = small_network(), tmp_path / "out"
    torch.save(network, tmp_path / "model.pt")
    np.save(tmp_path / "x.npy", images(60).numpy())
    name = str(tmp_path / "model.pt")
    asked = convrewrite.Settings(timer=FalseTimer())
    convrewrite.optimize(network, images(1), [RULE], "weights", settings=asked, name=name).save(folder)
    before = (folder / "model.onnx").read_bytes()
    for _ in range(2):  # the second time by what the first one's report says of the folder
        ran = call("recover", folder, "--data", tmp_path / "x.npy", "--epochs", "4", "--rate", "1e9", "--no-onnx")
        assert ran.code == 0 and "returned unchanged" in ran.said, ran.err
    assert (folder / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "1"), "minutes, epochs: expected one of them, found both"),
        (("--rate", "-1"), "rate: expected"),
        (("--model", "gone.pt"), "gone.pt"),
        (("--labels", "gone.npy"), "gone.npy: expected labels (.npy, .npz or .pt), found no such file"),
        (("--augment", "gone.py:f"), "gone.py"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    out: Path, arguments: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    before = listing(out.parent)
    asked = [word for word in recover(out) if word not in (() if "--rate" not in arguments else ("--rate", "0.02"))]
    ran = call(*asked, *arguments)
    assert ran.code in (2, 3) and message in ran.message
    assert listing(out.parent) == before


def test_a_report_names_no_code_that_would_be_imported(out: Path) -> None:
    report = Report.model_validate_json((out / "report.json").read_text())
    (out / "report.json").write_text(report.model_copy(update={"model": "os:getcwd"}).model_dump_json())
    ran = call(*recover(out))
    assert (
        ran.code == 2
        and "no file here; name the file, or the code that builds the original, with --model" in ran.message
    )


def test_a_process_whose_result_nobody_would_write_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several by its number, on a device where accelerate joins none without a number within the machine."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(processes, "_on_processor", lambda _: False)
    ran = call(*recover(out))
    assert ran.code == 2 and "expected LOCAL_RANK" in ran.message and "torchrun" in ran.message


def test_without_accelerate_one_line_says_what_to_install(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    ran = call(*recover(out))
    assert ran.code == 2 and "pip install 'convrewrite[recover]'" in ran.message


def free_port() -> int:
    """One that no connection of another test is given meanwhile: those come from 32768 on."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def joined(arguments: Sequence[object]) -> list[subprocess.Popen[str]]:
    """The command in two processes that gloo joins, as torchrun starts them."""
    port = free_port()
    words = [sys.executable, "-m", "convrewrite", *map(str, arguments)]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            words, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "eps"),
    [("no", 1e-4), pytest.param(None, 4 * torch.finfo(torch.bfloat16).eps, marks=pytest.mark.soak)],
)
def test_two_processes_give_what_one_does_and_the_main_one_alone_writes_and_prints(
    out: Path, precision: str | None, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rounding of the steps, which are in bfloat16 where the processor is made for it and nobody says otherwise."""
    monkeypatch.delenv(PRECISION, raising=False)
    if precision is not None:
        monkeypatch.setenv(PRECISION, precision)
    assert call(*recover(out, "-o", out.parent / "one")).code == 0
    first, second = joined(recover(out, "-o", out.parent / "two"))
    (told, error), (silence, _) = first.communicate(timeout=300), second.communicate(timeout=300)
    assert (first.returncode, second.returncode) == (0, 0), error
    assert "Held-out effect" in told and silence == ""
    one, two = weights(out.parent / "one"), weights(out.parent / "two")
    for name, value in one.items():
        size = float(value.abs().max())
        assert torch.allclose(two[name], value, rtol=eps, atol=eps * size), name


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_which_goes_on_from_its_checkpoint(out: Path) -> None:
    asked = ("recover", out, "--data", out.parent / "x.npy", "--batch", "16", "--no-onnx", "--epochs", "600")
    first, second = joined(asked)
    state = out.parent / "out.recovering"
    deadline = time.monotonic() + 300
    while not state.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()
    second.communicate(timeout=60)
    _, error = first.communicate(timeout=300)
    assert first.returncode == 1, error
    assert "another process of the run has ended" in error and "start the same command again" in error
    assert state.exists() and (out / "plan.json").is_file()


@pytest.mark.parametrize(
    ("resume", "told"), [(True, "command goes on"), (False, "command without --no-resume goes on")]
)
def test_an_interrupt_says_that_the_state_of_the_training_was_written(resume: bool, told: str, tmp_path: Path) -> None:
    @tells_what_stands
    def recover(*, out: Path, resume: bool, saves: bool) -> None:
        if saves:
            (tmp_path / "out.recovering").write_text("")
        raise KeyboardInterrupt

    for saves, wanted in ((False, "nothing was written"), (True, f"no result yet; .* is in out.recovering .*{told}")):
        with pytest.raises(Interrupted, match=wanted):
            recover(out=tmp_path / "out", resume=resume, saves=saves)


def test_a_result_that_cannot_be_written_leaves_the_state_of_its_training_as_is_told(tmp_path: Path) -> None:
    @tells_what_stands
    def recover(*, out: Path, saves: bool) -> None:
        if saves:
            (tmp_path / "out.recovering").write_text("")
        raise UsageError(f"{out}: cannot be written (No space left on device); name another folder with -o")

    with pytest.raises(UsageError, match=r"with -o$"):
        recover(out=tmp_path / "out", saves=False)
    with pytest.raises(
        UsageError, match=r"-o; the state of the training is in out\.recovering .* command goes on from"
    ):
        recover(out=tmp_path / "out", saves=True)


def test_an_interrupt_behind_its_end_names_the_folder_that_was_written(tmp_path: Path) -> None:
    @tells_what_stands
    def recover(*, out: Path, new: Path) -> None:
        assert out != new
        new.mkdir()
        (new / "plan.json").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="second holds the new result, whole"):
        recover(out=tmp_path / "first", new=tmp_path / "second")
