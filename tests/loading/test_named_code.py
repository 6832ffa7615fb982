"""Code that the caller named, and what it may do to a command: end it, raise what has no text, give what is no model."""

from pathlib import Path

import pytest
import torch
from commands import INPUT, Ran, call, small_network

MODELS = {
    "forward exits": ("class N(nn.Module):\n    def forward(self, x): sys.exit(7)", "ended the process (sys.exit(7))"),
    "factory exits": ("def N(): sys.exit(0)", "found SystemExit: 0"),
    "text of an error": ("def N(): raise ValueError('\\x1b[31mred')", r"ValueError: \x1b[31mred"),
    "text that fails": ("def N(): raise E()", "found E; correct it"),
    "text that is none": ("def N(): raise F()", "found F; correct it"),
    "forward's text fails": ("class N(nn.Module):\n    def forward(self, x): raise E()", "does not run on input"),
    "a coroutine": ("async def N(): return nn.ReLU()", "found an object of type coroutine"),
    "a name with an escape": (
        "N = type('\\x1b[31m', (nn.Module,), {'forward': lambda s, x: 1 / 0})",
        r"\x1b[31m: the model",
    ),
}
SOURCES = {
    "needs_arguments": "raised TypeError",
    "raises": r"raised ValueError: \x1b[31mred",
    "fails_to_tell": "raised E",
    "negative": "raised ValueError",
    "of_numbers": "expected a tensor",
    "endless": "expected a tensor",
    "nothing": "found NoneType",
    "sparse": "expected dense tensors, whose numbers are all there, found a sparse_coo one",
    "missing": "named.py:missing: expected missing in",
}
PRELUDE = """
import sys, torch
from torch import nn
class E(Exception):
    def __str__(self): raise ValueError
class F(Exception):
    def __str__(self): return 5
"""
CALIBRATION = """
def needs_arguments(x): return x
def raises(): raise ValueError("\x1b[31mred")
def fails_to_tell(): raise E()
class of_numbers:
    def __len__(self): return 8
    def __getitem__(self, index): return 1
class negative(of_numbers):
    def __len__(self): return -1
def endless():
    while True: yield 1
def nothing(): return None
def sparse(): return torch.zeros(4, 3, 16, 16).to_sparse()
"""


def analyze(folder: Path, name: str, code: str) -> Ran:
    path = folder / f"{name.replace(' ', '_').replace(chr(39), '')}.py"
    path.write_text(PRELUDE + code)
    return call("analyze", f"{path}:N", *INPUT)


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str) -> None:
    code, part = MODELS[name]
    ran = analyze(tmp_path, name, code)
    assert ran.code == 3
    assert part in ran.message


@pytest.mark.parametrize("name", SOURCES)
def test_calibration_inputs(tmp_path: Path, name: str) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    (tmp_path / "named.py").write_text(PRELUDE + CALIBRATION)
    ran = call(
        "plan", tmp_path / "net.pt", *INPUT, "-o", tmp_path / "plan.json", "--calib", f"{tmp_path / 'named.py'}:{name}"
    )
    assert ran.code == (3 if name == "missing" else 2)
    assert SOURCES[name] in ran.message


def test_a_factory_has_the_name_that_is_given(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    (tmp_path / "other.py").write_text("def make(): return None\n")
    ran = call("analyze", tmp_path / "net.pt", *INPUT, "--factory", f"{tmp_path / 'other.py'}:made")
    assert ran.code == 3
    assert "expected made in" in ran.message
    assert "found only make; name one that is there" in ran.message


def test_a_broken_program_is_told_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.pt2").write_bytes(b"\x80\x02.")
    ran = call("analyze", tmp_path / "net.pt2", "--trust", *INPUT)
    assert ran.code == 3
    assert "net.pt2: expected a complete model file" in ran.message
    assert capfd.readouterr().err == "", "what torch logs of it"
