"""The command line called as a function, and small networks for it whose files need no factory."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.cli import main
from convrewrite.cli.unforeseen import FAULT

SHAPE = (3, 16, 16)
INPUT = ("--input", "1x3x16x16")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What was printed, whatever lines it was wrapped into."""
        return " ".join(self.out.split())

    @property
    def message(self) -> str:
        """The one error; a traceback, an empty line or a second error fails the test."""
        lines = self.err.splitlines()
        assert lines, "no error was printed"
        assert all(lines), f"empty lines: {self.err!r}"
        errors = [line for line in lines if line.startswith("convrewrite: ")]
        assert errors == [lines[-1]], self.err
        assert "Traceback" not in self.err
        assert FAULT not in self.err, "an error that nobody foresaw"
        assert "\x1b" not in self.err, "terminal colours of someone else's message"
        return lines[-1].removeprefix("convrewrite: ")


def call(*arguments: object) -> Ran:
    """``convrewrite ARGUMENTS`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def small_network(seed: int = 0) -> nn.Sequential:
    """(N, 3, 16, 16) -> (N, 10): a stem, two convolutions that the rule ``separable`` takes, and a pointwise."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


def images(count: int = 80, seed: int = 1) -> Tensor:
    """Smooth noise, as natural images are: neighbouring pixels are alike."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=SHAPE[1:], mode="bilinear", align_corners=False)


def listing(folder: Path) -> set[str]:
    """Everything below a folder, hidden files too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
