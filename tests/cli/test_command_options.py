"""What the commands share: options given once, loading, calibration, and progress on the error stream."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import INPUT, call, images, small_network

from convrewrite import values
from convrewrite.cli import sweeping
from convrewrite.cli.options import APPLIED, SETTING, SWEPT, Sources, runner_of
from convrewrite.cli.progress import progress_bars
from convrewrite.cli.voice import say
from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.runtime import export
from convrewrite.settings import FLAG, GIGABYTE, Flag, Settings


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.save(small_network(), folder / "net.pt")
    export(small_network(), images(1), folder / "net.onnx")
    return folder


@pytest.mark.parametrize("command", ["optimize", "plan", "analyze"])
def test_an_option_of_one_value_is_given_once(place: Path, command: str) -> None:
    """Where several may be given, as rules, all count."""
    ran = call(command, place / "net.pt", *INPUT, "--factory", "a:b", "--factory", "c:d")
    assert ran.code == 2
    assert ran.message == "--factory: expected once, found more than once; give one value"


def test_one_of_several_values_is_given_as_often_as_wanted(place: Path) -> None:
    ran = call("analyze", place / "net.pt", *INPUT, "--rule", "separable", "--rule", "grouped")
    assert ran.code == 0
    assert "grouped" in ran.out


def test_an_onnx_file_and_a_model_are_callables_on_the_same_inputs(place: Path) -> None:
    x = images(2)
    module = runner_of(str(place / "net.pt"), None, False, 30.0)
    onnx = runner_of(str(place / "net.onnx"), None, False, 30.0)
    assert isinstance(onnx, OnnxModel)
    with torch.no_grad():
        expected = module(x)
    found = onnx(x)
    [tensor] = found.values() if isinstance(found, dict) else [found]
    assert torch.allclose(expected, torch.as_tensor(tensor), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file; expected an ONNX file"), (b"no graph", "export it again")],
    ids=["missing", "broken"],
)
def test_an_onnx_file_that_is_none_is_a_model_that_cannot_be_loaded(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        runner_of(str(path), None, False, 30.0)


def test_a_result_folder_is_its_model_or_with_a_factory_is_rebuilt(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--rule", "separable", "--calib", "weights", "--no-onnx")
    assert call("optimize", place / "net.pt", "-o", out, *INPUT, *options).code == 0
    factory = tmp_path / "factory.py"
    factory.write_text("from commands import small_network\n")
    saved = runner_of(str(out), None, False, 30.0)
    rebuilt = runner_of(str(out), f"{factory}:small_network", False, 30.0)
    with torch.no_grad():
        assert torch.equal(saved(images(2)), rebuilt(images(2)))


OWN = """
import torch
from torch import nn

class Own(nn.Sequential):
    pass

def own():
    torch.manual_seed(0)
    return Own(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
"""


def test_a_factory_is_for_what_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_net.py").write_text(OWN)
    made = ("own_net.py:own", "--input", "1x3x8x8")
    said = ("--rule", "separable", "--calib", "weights", "--no-onnx")
    assert call("optimize", *made, *said, "-o", "out").code == 0
    for command in ("verify", "bench"):
        lacking = call(command, *made, "out")
        assert lacking.code == 3 and "--factory" in lacking.message
        shown = call(command, "own_net.py:own", "out", *made[1:], "--factory", "own_net.py:own")
        assert shown.code == 0, shown.err
        twice = call(command, "own_net.py:own", "own_net.py:own", *made[1:], "--factory", "own_net.py:own")
        assert twice.code == 2
        assert twice.message.startswith(
            "--factory: expected a PyTorch model that it builds, found none in own_net.py:own and"
        )


@pytest.mark.parametrize("calib", [(), ("--calib", "weights")], ids=["none", "weights"])
@pytest.mark.parametrize("option", [("--std", "1,1,1"), ("--resize", "20x20")], ids=["std", "resize"])
def test_without_inputs_there_is_nothing_to_normalise(
    place: Path, tmp_path: Path, calib: tuple[str, ...], option: tuple[str, str]
) -> None:
    ran = call("optimize", place / "net.pt", "-o", tmp_path / "out", *INPUT, *calib, *option)
    assert ran.code == 2
    assert ran.message == f"{option[0]}: expected calibration inputs that it applies to, found none; add --calib"


def test_what_is_said_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31mname\n\tof a layer")
    said = capsys.readouterr()
    assert said.err == ""
    assert "\x1b" not in said.out
    assert said.out.endswith("\n\tof a layer\n")


def test_progress_goes_to_the_error_stream_and_leaves_nothing_where_there_was_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bars():
        pass
    assert capsys.readouterr() == ("", "")
    with progress_bars() as progress:
        progress("fit", 1, 2, "layer1.conv")
    said = capsys.readouterr()
    assert said.out == ""
    assert "layer1.conv" in said.err


def test_the_command_that_makes_a_point_of_a_sweep_again_has_every_option_of_both() -> None:
    """But for those of outputs, which the plan says, and of resuming, which changes no result."""
    sources = Sources(["1x1x8x8"], "a.py:b", "c.npy", [0.0], [1.0], (8, 8))
    settings = Settings(
        runtime="torch", timings="t.json", device="cpu", timeout=5, memory=1 << 29, threads=2, refine=True
    )
    words = {*sweeping._words(sources, settings, True), *sweeping._words(Sources(), Settings(measure=False), False)}
    flags = [one.metadata[FLAG] for one in fields(Sources)]
    flags += [SETTING[name].metadata[FLAG] for name in {*APPLIED} & {*SWEPT} - {"outputs", "resume"}]
    assert {word for word in words if word.startswith("--")} == {"--trust", *map(_given, flags)}


def test_the_command_of_a_point_has_numbers_as_they_were_given() -> None:
    for memory in (values.LARGEST_MEMORY, values.SMALLEST_MEMORY, 1.23456789):
        words = sweeping._words(Sources(), Settings(memory=int(memory * GIGABYTE), timeout=12.3456789), False)
        said = {name: float(text) for name, text in zip(words[::2], words[1::2], strict=True)}
        assert int(values.memory(said["--memory"]) * GIGABYTE) == int(memory * GIGABYTE)
        assert said["--timeout"] == 12.3456789


def _given(flag: Flag) -> str:
    """The word that asks for what is not the default."""
    return "--no-onnx" if flag.names == ("--onnx/--no-onnx",) else flag.names[0].partition("/")[0]
