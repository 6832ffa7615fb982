"""Every wrong input: its exit code, one message that says what to do, and nothing written."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import INPUT, call, images, listing, small_network
from torch import Tensor, nn

NOT_FINITE = images(4)
NOT_FINITE[2, 0, 0, 0] = float("nan")


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def spoiled_network() -> nn.Sequential:
    model = small_network()
    convolution = model[3]
    assert isinstance(convolution, nn.Conv2d)
    convolution.weight.data[0, 0, 0, 0] = float("nan")
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good model and good calibration inputs, and one wrong file of every sort."""
    folder = tmp_path_factory.mktemp("place")
    torch.save(small_network(), folder / "net.pt")
    torch.save(small_network().state_dict(), folder / "state.pt")
    torch.save(Unknown(), folder / "unknown.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), folder / "linear.pt")
    torch.save(spoiled_network(), folder / "nan.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and its files are still about
        torch.jit.save(torch.jit.script(small_network()), folder / "script.pt")
    whole = (folder / "net.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("this is not a model")
    (folder / "noise.onnx").write_bytes(b"this is not ONNX")
    np.save(folder / "good.npy", images().numpy())
    np.save(folder / "small.npy", np.zeros((4, 3, 9, 9), np.float32))
    np.save(folder / "nan.npy", NOT_FINITE.numpy())
    (folder / "file").write_text("in the way")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("not to be lost")
    for name, body in RULES.items():
        (folder / name).write_text(f'schema = 1\n[[rule]]\nname = "a"\n{body}\n')
    return folder


RULES = {
    "unknown-key.toml": 'structures = ["separable"]\nraito = 0.5',
    "range.toml": 'structures = ["separable"]\nratio = 1.5',
    "bad.toml": "structures = = 1",
    "structure.toml": 'structures = ["seperable"]',
    "kind.toml": 'structures = ["separable"]\nmatch = { kind = ["normal"] }',
}


@pytest.fixture
def optimize(place: Path) -> Callable[..., str]:
    """Run ``optimize`` where it must fail, with good values for what is not given; gives its message."""

    def run(code: int, model: str = "net.pt", *options: str, out: str = "out") -> str:
        before = listing(place)
        files = {path.name for path in place.iterdir()}
        values = [str(place / option) if option in files else option for option in options]
        calib = () if "--calib" in options else ("--calib", place / "good.npy")
        shape = () if "--input" in options else INPUT
        ran = call("optimize", place / model, "-o", place / out, *shape, *calib, *values)
        message = ran.message
        assert ran.code == code, message
        assert ran.out == ""
        assert listing(place) == before
        return message

    return run


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("missing.pt", ["missing.pt: no such file", "expected a model file"]),
        ("empty.pt", ["empty.pt", "found an empty file", "download it again"]),
        ("text.pt", ["text.pt", "expected a file written by torch.save", "this is not", "torch.save("]),
        ("cut.pt", ["cut.pt", "expected a complete model file", "truncated"]),
        ("script.pt", ["script.pt", "found a TorchScript archive", "--factory"]),
        ("unknown.pt", ["unknown.pt", "Unknown", "--factory FILE.py:NAME", "--trust"]),
        ("state.pt", ["state.pt", "found weights without their network", "--factory"]),
        ("nan.pt", ["nan.pt", "3.weight", "NaN"]),
        ("linear.pt", ["the model has no convolution", "nothing to rewrite"]),
        ("noise.onnx", ["noise.onnx: onnxruntime cannot open it", "export it again"]),
    ],
)
def test_models_that_are_none(optimize: Callable[..., str], model: str, parts: list[str]) -> None:
    message = optimize(3, model)
    assert [part for part in parts if part not in message] == [], message


def test_an_input_of_the_wrong_shape(optimize: Callable[..., str]) -> None:
    message = optimize(3, "net.pt", "--input", "1x4x16x16", "--calib", "weights")
    assert "does not run on input 1x4x16x16" in message
    assert "--input" in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--rule", "seperable"], ["seperable", "did you mean separable?"]),
        (["--rule", "missing.toml"], ["missing.toml", "cannot be read"]),
        (["--rule", "unknown-key.toml"], ["unknown-key.toml: rule[0].raito: unknown key", "did you mean ratio?"]),
        (["--rule", "range.toml"], ["range.toml: rule[0].ratio: expected a number in (0, 1), found 1.5"]),
        (["--rule", "bad.toml"], ["bad.toml: not valid TOML", "at line 4"]),
        (["--rule", "structure.toml"], ["rule a", "'seperable' is not known", "separable"]),
        (["--rule", "kind.toml"], ["kind.toml: rule[0].match.kind[0]", "standard", 'found "normal"']),
        (["--input", "1x3x0x16"], ["'1x3x0x16'", "positive integers joined by x", "1x3x224x224"]),
        (["--input", "3,16,16"], ["'3,16,16'", "positive integers joined by x"]),
        (["--input", ""], ["expected text in every argument", "''"]),
        (["--budget", "macs=2"], ["macs=2", "in (0, 1)", "macs=0.5"]),
        (["--budget", "macs=nan"], ["macs=nan", "in (0, 1)"]),
        (["--budget", "foo=0.5"], ["'foo'", "expected one of macs, params, latency"]),
        (["--budget", "macs=x"], ["--budget", "expected NAME=PART", "'macs=x'"]),
        (["--budget", "macs"], ["--budget", "expected NAME=PART", "'macs'"]),
        (["--budget", "macs=0.01"], ["macs=0.01 cannot be met", "at the least", "--rule balanced"]),
        (["--calib", "missing.npy"], ["missing.npy", "found no such file"]),
        (["--calib", "small.npy"], ["small.npy", "expected inputs of shape (N, 3, 16, 16), found (4, 3, 9, 9)"]),
        (["--calib", "nan.npy"], ["nan.npy", "NaN", "example 2"]),
        (["--calib", "file"], ["file", "expected .npy"]),
        (["--calib", "full"], ["full", "expected images", "found none"]),
        (["--calib", "net.pt"], ["net.pt", "expected tensors alone"]),
        (["--calib", "text.pt"], ["text.pt", "expected"]),
        (["--resize", "big"], ["--resize: expected HxW", "'big'"]),
        (["--resize", "16"], ["--resize: expected HxW", "'16'"]),
        (["--mean", "a,b"], ["--mean: expected numbers separated by commas", "'a,b'"]),
        (["--mean", "1,2"], ["expected 1 or 3 numbers", "found 2"]),
        (["--std", "0"], ["--std: expected positive numbers", "0"]),
        (["--std", "1,-1,1", "--calib", "weights"], ["--std: expected positive numbers", "1,-1,1"]),
        (["--mean", "0.5", "--calib", "weights"], ["--mean: expected calibration inputs", "add --calib"]),
        (["--resize", "32x32", "--calib", "weights"], ["--resize: expected calibration inputs", "add --calib"]),
        (["--threads", "0"], ["--threads", "greater than or equal to 1", "1 is the default"]),
        (["--seed", "x"], ["--seed", "integer", "--help"]),
        (["--quick"], ["No such option: --quick", "--help"]),
        (["--keep", "x"], ["--keep: expected a number as 0.98, or error=0.02, found 'x'"]),
        (["--keep", ""], ["expected text in every argument", "''"]),
        (["--keep", "98"], ["keep: expected agreement in (0, 1)", "found 98"]),
        (["--keep", "error=nan"], ["keep: expected error in (0, 1)", "found nan"]),
        (["--keep", "accuracy=0.9"], ["keep: expected a number", "found accuracy"]),
        (["--half", "--no-onnx", "--calib", "missing.npy"], ["export half: is made of the ONNX file, found none"]),
        (["--int8", "--no-onnx"], ["--int8: expected an ONNX file to quantise, found --no-onnx"]),
        (["--int8", "--runtime", "torch"], ["int8: expected a runtime of ONNX files", "found --runtime torch"]),
        (["--int8", "--calib", "weights"], ["--int8: expected inputs to calibrate on", "real ones"]),
        (["--keep", "0.9", "--calib", "weights"], ["keep: needs inputs to measure on", "--calib"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_options_that_are_wrong(optimize: Callable[..., str], options: list[str], parts: list[str]) -> None:
    message = optimize(2, "net.pt", *options)
    assert [part for part in parts if part not in message] == [], message


def test_int8_without_inputs_is_refused_before_any_work(place: Path) -> None:
    ran = call("optimize", place / "net.pt", "-o", place / "out", *INPUT, "--int8")
    assert ran.code == 2
    assert ran.message == "--int8: expected inputs to calibrate on, found none; give real ones (--calib)"
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("out", "parts"),
    [
        ("file", ["file: expected a folder for the results, found a file", "-o"]),
        ("full", ["full: holds thesis.tex, which would be lost", "name a new folder"]),
        ("file/below", ["file/below: cannot be written (Not a directory)", "-o"]),
    ],
)
def test_places_that_cannot_be_written(optimize: Callable[..., str], out: str, parts: list[str]) -> None:
    message = optimize(2, "net.pt", out=out)
    assert [part for part in parts if part not in message] == [], message


def test_the_place_is_checked_before_the_model_is_loaded(optimize: Callable[..., str]) -> None:
    assert "thesis.tex" in optimize(2, "missing.pt", out="full")


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (["optimise"], 2, ["No such command 'optimise'", "Did you mean 'optimize'?", "--help"]),
        (["analyze"], 2, ["MODEL", "--help"]),
        (["analyze", "linear.pt", *INPUT], 3, ["the model has no convolution"]),
        (["verify", "net.pt", "missing.onnx"], 3, ["missing.onnx: no such file"]),
        (["verify", "missing.pt", "net.pt"], 3, ["missing.pt: no such file"]),
        (["verify", "net.pt", "noise.onnx"], 3, ["noise.onnx: onnxruntime cannot open it", "export it again"]),
        (["verify", "net.pt", "net.pt", "--expect", "equality"], 2, ["--expect", "parity or fidelity", "equality"]),
        (["bench", "net.pt", "noise.onnx"], 3, ["noise.onnx: onnxruntime cannot open it"]),
        (["rules", "show", "seperable"], 2, ["did you mean separable?"]),
        (["analyze", "net.pt", *INPUT, "--rule", "structure.toml"], 2, ["rule a: structure 'seperable' is not known"]),
        (["rules", "check", "bad.toml"], 2, ["bad.toml: not valid TOML"]),
        (["rules", "check", "structure.toml"], 1, ["1 of 1 checks fail"]),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else str(value),
)
def test_other_commands(place: Path, arguments: list[str], code: int, parts: list[str]) -> None:
    before = listing(place)
    is_file = {path.name for path in place.iterdir()} | {"missing.pt", "missing.onnx"}
    ran = call(*(place / value if value in is_file else value for value in arguments))
    message = ran.message
    assert ran.code == code, message
    assert [part for part in parts if part not in message] == [], message
    assert listing(place) == before


def test_without_arguments_the_help_is_shown_and_no_error() -> None:
    ran = call()
    assert ran.code == 2
    assert "optimize" in ran.out + ran.err
    assert "convrewrite: " not in ran.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimize", "own.py:net", "--calib", "weights", "--keep", "0.98"), "keep: needs inputs to measure on"),
        (("plan", "own.py:net", "--calib", "weights", "--keep", "0.98"), "keep: needs inputs to measure on"),
        (("optimize", "own.py:net", "--mean", "0.5"), "--mean: expected calibration inputs"),
        (("plan", "own.py:net", "--std", "0.5"), "--std: expected calibration inputs"),
        (("sweep", "own.py:net", "--resize", "8x8"), "--resize: expected calibration inputs"),
        (("sweep", "own.py:net", "--timings", "none.json"), "none.json: cannot be read"),
        (("quantise", "out", "--model", "own.py:net", "--calib", "weights"), "quantise: expected inputs to calibrate on"),
    ],
)  # fmt: skip
def test_what_options_alone_tell_is_refused_before_a_model_is_loaded(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("raise ValueError('it was loaded')\n")
    ran = call(*words)
    assert ran.code == 2
    assert message in ran.message
    assert {path.name for path in tmp_path.iterdir()} == {"own.py"}
