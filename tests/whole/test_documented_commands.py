"""Every command that the documents tell is run, on small files of the names that they use, in their order.

What is left out or done on a smaller scale is listed here, with the reason.
"""

import re
import shlex
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import call
from PIL import Image
from torch import Tensor, nn
from typer.main import get_command

import convrewrite
from convrewrite.cli.commands import app
from convrewrite.tables import WIDTH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")])

NAMES = r"(?<![\w.])[A-Z]+(?!\w|\.\w)"
"""A word of capitals stands for something: such a line says how a command is put together."""

ELSEWHERE = {
    "examples/fashion": "run by test_fashion.py and test_fashion_onnx.py",
    "fashion.onnx": "run by test_fashion_onnx.py",
    "examples/detection": "run by test_examples.py",
    "--runtime openvino": "run by tests/targets",
    "timings.json": "run by test_profiles.py, which makes that file first",
}
"""Words of commands that other tests run."""

SMALLER = {
    "net.pt --output": "scored.py:Scored --input 1x3x12x12 --output",
    "1x3x64x64": "1x3x12x12",
    "1x3x224x224": "1x3x12x12", "1x3x640x640": "1x3x12x12", "640x640": "12x12", "0.8..0.1": "0.8..0.6:2",
    "--cluster local:2": "--cluster local:1 --budgets 0.8..0.6:2",
}  # fmt: skip
"""Sizes and ranges that only take longer."""


AS_IT_IS = {"rules show", "--json", "--help"}
"""What prints a file, JSON, or in the width of the terminal."""

MADE_OF_ONNX = {"--int8", "--export", "--half", "--opset", "--free-axes"}
"""Options that need the ONNX file."""


def commands_of(document: Path) -> Iterator[str]:
    """The commands in blocks of code, each on one line, without what is told behind ``#``."""
    text = re.sub(r"\\\n\s+", "", document.read_text(encoding="utf-8"))
    for line in text.splitlines():
        found = re.fullmatch(r"(?: {4})?(convrewrite [a-z]+ .*|convrewrite [a-z]+)", line)
        if found and (line.startswith(" ") or "```" in text) and re.search(NAMES, found[1]) is None:
            yield found[1].partition(" #")[0].strip()


COMMANDS = [
    (document.relative_to(ROOT).as_posix(), command)
    for document in DOCUMENTS
    for command in commands_of(document)
    if command.split()[1] in get_command(app).commands  # a sentence may begin with the tool's name
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of all names that documents use."""
    folder = tmp_path_factory.mktemp("documented")
    torch.manual_seed(0)
    inner = OrderedDict(conv1=nn.Conv2d(8, 16, 3, padding=1), relu=nn.ReLU(), conv2=nn.Conv2d(16, 16, 3, padding=1))
    layers = OrderedDict(
        stem=nn.Conv2d(3, 8, 3, padding=1), relu=nn.ReLU(), layer3=nn.Sequential(nn.Sequential(inner)),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(16, 10),
    )  # fmt: skip
    model = nn.Sequential(layers).eval()
    for name in ("resnet18", "net", "model", "best"):
        torch.save(model, folder / f"{name}.pt")
    convrewrite.export(model, (torch.zeros(1, 3, 12, 12),), folder / "model.onnx")
    for name, text in SOURCES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    np.savez(
        folder / "inputs.npz",
        image=noise[:, :, :, :].transpose(0, 3, 1, 2) / np.float32(255),
        vector=np.ones((24, 10), np.float32),
    )
    convrewrite.export(Net(), (torch.zeros(1, 3, 12, 12), torch.zeros(1, 10)), folder / "net.onnx")
    renamed(folder / "net.onnx", {"input.0": "image", "input.1": "vector"})
    made = call(
        "optimize", folder / "resnet18.pt", "-o", folder / "ready", "--calib", folder / "images",
        "--input", "1x3x12x12", "--fast", "--any-speed",
    )  # fmt: skip
    assert made.code == 0, made.err
    return folder


def renamed(path: Path, names: dict[str, str]) -> None:
    """Give a graph's inputs other names."""
    graph = onnx.load(path)
    for entry in graph.graph.input:
        entry.name = names[entry.name]
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(graph, path)


class Net(nn.Module):
    """Two inputs, by the names that documents use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(26, 5)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        pooled = self.conv(self.stem(image).relu()).relu().mean((2, 3))
        return self.fc(torch.cat((pooled, vector), 1))


SOURCES = {
    "net": f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_documented_commands import Net as make
""",
    "data": """
import torch

def example():
    return torch.rand(1, 3, 12, 12), torch.rand(1, 10)

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(8, 3, 12, 12, generator=generator), torch.rand(8, 10, generator=generator)) for _ in range(3)]
""",
    "scored": """
import torch
from torch import nn

class Scored(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x):
        y = self.conv(self.stem(x).relu()).relu().mean((2, 3))
        return {"boxes": y[:, :4], "logits": y[:, 4:], "aux": y * 2}
""",
}
"""Programs: of two inputs, their examples and calibration, and with outputs of these names."""


def test_documents_have_commands() -> None:
    assert {document for document, _ in COMMANDS} >= {"README.md", "docs/cli.md", "docs/onnx.md", "examples/yolo.md"}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d}-{i}" for i, (d, _) in enumerate(COMMANDS)])
def test_the_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, document: str, command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0] not in ("optimize", "apply"):
        shutil.rmtree(folder / "out", ignore_errors=True)
        shutil.copytree(folder / "ready", folder / "out")
    subcommand = get_command(app).commands[words[0]]
    known = {option for parameter in subcommand.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}
    if any(word in command for word in ELSEWHERE):
        return
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONVREWRITE_CACHE", str(folder / "cache"))
    ran = call(*shlex.split(adjusted(command))[1:], *quicker(words, known))
    assert ran.code == 0, ran.err
    if not AS_IT_IS & {" ".join(words[:2]), *words} and words[0] != "schema":
        assert max(map(len, ran.out.splitlines()), default=0) <= WIDTH, ran.out


def adjusted(command: str) -> str:
    """Small sizes; and what a network takes that is done in microseconds says nothing, so that a budget is one of MACs."""
    for long, short in SMALLER.items():
        command = command.replace(long, short)
    return re.sub(r"latency=[\d.]+", "macs=0.8", command)


def quicker(words: list[str], known: set[str]) -> list[str]:
    """Options that leave out what takes long, where a command has them: images are made 224 x 224 where nothing is said."""
    leave = ("--fast", "--any-speed") if MADE_OF_ONNX & set(words) else ("--fast", "--any-speed", "--no-onnx")
    small = ("--input", "1x3x12x12") if "images/" in words and "--input" not in words and ".pt" in words[1] else ()
    return [*small, *(option for option in leave if option in known and option not in words)]
