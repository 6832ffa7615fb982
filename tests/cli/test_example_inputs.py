"""The command line with models of several inputs: shapes, examples by name, and calibration files."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import Ran, call, small_network
from model_files import forget_modules_below
from onnx_texts import graph
from torch import nn

from convrewrite.cli.example_inputs import as_images, for_graph, given_example
from convrewrite.cli.known_sizes import KnownSizes
from convrewrite.errors import UsageError
from convrewrite.onnx_files import OnnxModel
from convrewrite.reporting.report import Report

MODEL = """
import torch
from torch import nn

class Tagged(nn.Module):
    '''An image, and a tag that chooses the shift of its channels.'''

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.table = nn.Embedding(5, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, image, tag):
        x = torch.relu(self.stem(image) + self.table(tag)[:, :, None, None])
        return self.conv(x)

class Shifted(Tagged):
    def forward(self, image, shift):
        return self.conv(torch.relu(self.stem(image) + shift[:, :, None, None]))

def tagged():
    torch.manual_seed(0)
    return Tagged()

def shifted():
    torch.manual_seed(0)
    return Shifted()

IMAGE = torch.ones(1, 3, 16, 16)
pair = (IMAGE, torch.tensor([2]))
keywords = {"tag": torch.tensor([2]), "image": IMAGE}
both = ((IMAGE,), {"tag": torch.tensor([2])})

def made():
    return keywords

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        tags = torch.randint(5, (8,), generator=generator)
        yield {"tag": tags, "label": tags, "image": torch.randn(8, 3, 16, 16, generator=generator)}

def text():
    return "an image"

def broken():
    raise OSError("no such camera")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("several")
    (folder / "several_inputs.py").write_text(MODEL)
    random = np.random.default_rng(0)
    pixels, tags = random.random((24, 3, 16, 16), np.float32), random.integers(0, 5, 24)
    np.savez(folder / "named.npz", tag=tags, labels=tags, image=pixels)
    np.savez(folder / "half.npz", image=pixels, other=tags)
    yield folder
    forget_modules_below(folder)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_this_machine(monkeypatch, FalseTimer())


def optimized(folder: Path, name: str, *arguments: object) -> tuple[Ran, Report]:
    out = folder / "out"
    ran = call("optimize", f"{folder}/several_inputs.py:{name}", "-o", out, *arguments)
    assert ran.code == 0, ran.err
    return ran, Report.model_validate_json((out / "report.json").read_text())


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("example", ["pair", "keywords", "both", "made"])
def test_an_example_by_name(place: Path, example: str) -> None:
    target = f"{place}/several_inputs.py:{example}"
    ran = call("analyze", f"{place}/several_inputs.py:tagged", "--input", target, "--rule", "separable")
    assert ran.code == 0, ran.err
    assert any(line.endswith(" yes") for line in ran.out.splitlines())


@pytest.mark.usefixtures("untimed")
def test_optimize_and_verify_with_an_example_and_batches_by_name(place: Path) -> None:
    example = ("--input", f"{place}/several_inputs.py:keywords")
    calib = ("--calib", f"{place}/several_inputs.py:batches")
    _, report = optimized(place, "tagged", *example, *calib, "--budget", "macs=0.9")
    assert report.input_shapes == ((1, 3, 16, 16), (1,))
    assert (report.calibration.fitted_on, report.calibration.held_out) == (19, 5)
    assert [row.action for row in report.sites] == ["kept", "rewritten"]
    assert [row.passed for row in report.parity] == [True]
    files = (place / "out" / "model.onnx", *example)
    same = call("verify", f"{place}/several_inputs.py:tagged", *files, "--expect", "fidelity")
    assert same.code == 0, same.err
    on_batches = call("verify", place / "out", *files, *calib, "--factory", f"{place}/several_inputs.py:tagged")
    assert on_batches.code == 0, on_batches.err
    assert "on 24 calibration inputs" in on_batches.said
    timed = call("bench", f"{place}/several_inputs.py:tagged", *files, "--rounds", 3)
    assert timed.code == 0, timed.err
    assert "input 1x3x16x16, 1, 1 thread" in timed.said


KEPT = """
import torch
from torch import nn

class Kept(nn.Module):
    def __init__(self, *examples):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.example_input_array = examples

    def forward(self, image, scale):
        return self.conv(image) * scale

def kept():
    return Kept(torch.ones(4, 2, 9, 7), torch.ones(4, 1, 1, 1))

def other():
    return Kept(torch.ones(4, 3, 9, 7), torch.ones(4, 1, 1, 1))

def single():
    return Kept(torch.ones(4, 2, 9, 7), torch.tensor(0.5))

def empty():
    return Kept(torch.ones(0, 2, 9, 7), torch.ones(0, 1, 1, 1))
"""


def test_a_module_of_lightning_keeps_an_example(tmp_path: Path) -> None:
    (tmp_path / "lightning_kept.py").write_text(KEPT)
    ran = call("analyze", f"{tmp_path}/lightning_kept.py:kept")
    assert ran.code == 0 and "input size 1x2x9x7, 1x1x1x1 is that of the model's example_input_array" in ran.said
    for kept in ("other", "single", "empty"):  # it does not run on that, and these have no first example
        refused = call("analyze", f"{tmp_path}/lightning_kept.py:{kept}")
        assert refused.code == 2 and "forward takes 2 inputs" in refused.message


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_without_a_channel_and_single_images_are_taken_for_images(channels: int) -> None:
    peeked = (torch.zeros(1, 9, 7),)
    assert as_images(peeked, nn.Conv2d(channels, 4, 3))[0].shape == (1, channels, 9, 7)
    adding = nn.Sequential(nn.Unflatten(0, (1, 1)), nn.Conv2d(1, 4, 3))  # which takes three axes alone
    assert as_images(peeked, adding) == as_images(peeked, nn.Linear(7, 2)) == peeked


@pytest.mark.usefixtures("untimed")
def test_a_calibration_file_gives_sizes_and_integers(place: Path) -> None:
    _, report = optimized(place, "tagged", "--calib", place / "named.npz")
    assert report.input_shapes == ((1, 3, 16, 16), (1,))
    assert any("input size 1x3x16x16, 1 taken from" in note for note in report.notes)
    assert report.calibration.fitted_on == 19


@pytest.mark.usefixtures("untimed")
def test_a_shape_for_each_input(place: Path) -> None:
    shapes = ("--input", "1x3x16x16", "--input", "1x16")
    _, report = optimized(place, "shifted", *shapes, "--calib", "weights")
    assert report.input_shapes == ((1, 3, 16, 16), (1, 16))
    files = (place / "out" / "model.pt", place / "out" / "model.onnx")
    verified = call("verify", *files, "--factory", f"{place}/several_inputs.py:shifted")
    assert verified.code == 0, verified.err
    assert "on 8 random inputs" in verified.said


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            (),
            2,
            "forward takes 2 inputs (image, tag); give the shape of each, as --input 1x3x64x64 --input 1x10, or an",
        ),
        (
            ("--input", "{file}:pair", "--input", "1x3"),
            2,
            "--input: expected shapes, as 1x3x64x64, or one FILE.py:NAME",
        ),
        (("--input", "{file}:text"), 2, "text: expected a tensor, a tuple of tensors"),
        (("--input", "{file}:broken"), 2, "broken: calling it without arguments raised OSError: no such camera"),
        (("--input", "{file}:absent"), 3, "expected absent in"),
        (("--input", "1x3x16x16", "--input", "2x16"), 2, "expected the batch as first axis of every input"),
    ],
)
def test_what_is_wrong_is_said_before_the_long_work(
    place: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    file = f"{place}/several_inputs.py"
    ran = call("analyze", f"{file}:tagged", *(text.format(file=file) for text in arguments))
    assert ran.code == code
    assert words in ran.message


def test_names_of_a_model_that_names_no_inputs() -> None:
    class AnyNumber(nn.Module):
        def forward(self, *images: torch.Tensor) -> torch.Tensor:
            return images[0]

    assert given_example(AnyNumber(), ["1x2", "1x3"])[1].shape == (1, 3)
    for given in (["a=1x2"], ["a=1x2", "1x3"]):
        with pytest.raises(UsageError, match="expected shapes without names, as the model names no inputs"):
            given_example(AnyNumber(), given)


@pytest.mark.parametrize("reported", [False, True])
def test_shapes_of_a_graph_may_be_those_of_its_inputs_with_examples(reported: bool) -> None:
    text = "(float[N, 4, H] x, float rate) => (float[N, 4, H] y) { y = Mul(x, rate) }"
    known = KnownSizes(((1, 4, 9),), Path("out/report.json")) if reported else None
    session = OnnxModel(graph(text).SerializeToString())
    example, _ = for_graph(session, () if reported else ("1x4x9",), None, known, of_examples=("x",))
    assert isinstance(example, dict) and {name: tuple(x.shape) for name, x in example.items()} == {"x": (1, 4, 9)}
    with pytest.raises(UsageError, match="expected 2 shapes, in the order of the inputs x, rate"):
        for_graph(session, ("1x4x9", "1", "2"), None, known, of_examples=("x",))


def test_a_file_with_only_some_of_the_names_is_refused(place: Path) -> None:
    ran = call("optimize", f"{place}/several_inputs.py:tagged", "-o", place / "no", "--calib", place / "half.npz")
    assert ran.code == 2
    assert "expected 2 arrays, named image, tag or input.0 to input.1, found image, other" in ran.message


def test_a_file_whose_examples_the_model_does_not_take_is_named(place: Path) -> None:
    np.savez(place / "grey.npz", image=np.zeros((4, 1, 16, 16), np.float32), tag=np.zeros(4, np.int64))
    for command in (("optimize", "-o", place / "no"), ("quantise", place / "out", "--model")):
        model = f"{place}/several_inputs.py:tagged"
        words = (command[0], model, *command[1:]) if command[0] == "optimize" else (*command, model)
        ran = call(*words, "--calib", place / "grey.npz")
        assert ran.code == 2, ran.err
        assert "grey.npz: expected examples as the model takes them; Tagged: the model does not run" in ran.message


def test_shapes_by_name_for_two_models(place: Path) -> None:
    model = f"{place}/several_inputs.py:shifted"
    shapes = ("--input", "shift=2x16", "--input", "image=2x3x16x16")
    ran = call("verify", model, model, *shapes)
    assert ran.code == 0, ran.err
    assert "on 2 random inputs" in ran.said
    stranger = call("verify", model, model, *shapes, "--input", "mask=2x3")
    assert stranger.code == 2
    assert "--input: expected names of inputs (image, shift), found 'mask'" in stranger.message


def test_inputs_that_neither_of_two_models_takes(place: Path) -> None:
    model = f"{place}/several_inputs.py:shifted"
    ran = call("verify", model, model, "--input", "1x1x16x16", "--input", "1x16")
    assert ran.code == 3
    assert "Shifted: the model does not run on input 1x1x16x16, 1x16" in ran.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_two_models_are_given_numbers_of_their_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(small_network().to(dtype), tmp_path / "m.pt")
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 16, 16), np.float32))
    model = tmp_path / "m.pt"
    for words in ((), ("--calib", tmp_path / "x.npy"), ("--input", "2x3x16x16")):
        ran = call("verify", model, model, *words)
        assert ran.code == 0, ran.err
