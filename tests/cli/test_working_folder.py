"""A working folder that may be a stranger's: nothing in it runs because the tool was started there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import INPUT, small_network

from convrewrite.__main__ import leave_working_folder
from convrewrite.process import safe_path

LIBRARIES = (
    "accelerate", "dataclasses", "json", "numpy", "onnx", "onnxruntime", "platform", "pydantic", "re", "rich", "sympy", "tomllib",
    "torch", "torchvision", "typer", "typing", "z3",
)  # fmt: skip
"""What the command imports, or torch does where it is there."""

MODEL = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())\n"


def called_like_libraries(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r})\n")


def python(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_files_called_like_libraries_do_not_run(tmp_path: Path) -> None:
    called_like_libraries(tmp_path, LIBRARIES)
    torch.save(small_network(), tmp_path / "net.pt")
    ran = python(
        tmp_path, "-m", "convrewrite", "optimize", "net.pt", *INPUT, "--calib", "weights", "-o", "out", "--no-onnx"
    )
    assert "Written to out" in ran.stdout, ran.stderr
    assert not (tmp_path / "ran").exists()


def test_code_that_was_named_is_still_found_there(tmp_path: Path) -> None:
    (tmp_path / "own_nets.py").write_text(MODEL)
    ran = python(tmp_path, "-m", "convrewrite", "analyze", "own_nets:net", "--input", "1x3x8x8")
    assert ran.returncode == 0, ran.stderr


def test_a_package_that_lies_there_is_found_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), "/elsewhere"])
    monkeypatch.setattr("convrewrite.__main__.__file__", str(tmp_path / "convrewrite" / "__main__.py"))
    leave_working_folder()
    assert sys.path == ["/elsewhere", str(tmp_path)]
    leave_working_folder()  # where the first place is another one, nobody put the working folder there
    assert sys.path == ["/elsewhere", str(tmp_path)]


def test_processes_that_python_starts_leave_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called_like_libraries(tmp_path, ("json",))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with safe_path():
        assert subprocess.run([sys.executable, "-c", "import json"], check=False).returncode == 0
    assert not (tmp_path / "ran").exists()
    assert "PYTHONSAFEPATH" not in os.environ
