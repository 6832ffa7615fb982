"""A user's script is checked against the types of the package, as strictly as mypy can."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
from pathlib import Path

import torch
from torch import nn

import convrewrite


def smaller(model: nn.Module, images: torch.Tensor) -> nn.Module:
    settings = convrewrite.Settings(budget={"macs": 0.5}, measure=False)
    result: convrewrite.Result = convrewrite.optimize(model, images[:1], ["balanced"], images, settings=settings)
    place: Path = result.save("out")
    parts: float = result.report.totals.macs.ratio
    print(place, parts, result.refused or "a success")
    return convrewrite.load(place, model)


def chosen(model: nn.Module, images: torch.Tensor) -> convrewrite.Plan:
    for row in convrewrite.analyze(model, images[:1]):
        share: float = row.mac_share
        print(row.name, share)
    plan = convrewrite.plan(model, images[:1], ["balanced"], images, {"macs": 0.5})
    try:
        return convrewrite.apply(model, images[:1], plan, images, measure=False).plan
    except convrewrite.ConvRewriteError as error:
        raise SystemExit(error.exit_code) from error
"""


@pytest.mark.slow
def test_a_users_script_is_typed_and_a_mistake_in_it_is_found(tmp_path: Path) -> None:
    """One run over both, with the options and the cache of `make types`."""
    mistaken = (
        SCRIPT.replace("budget={", "budgets={")
        .replace("place: Path =", "place: int =")
        .replace("print(place, parts,", "print(parts,")
        .replace("load(place,", 'load("out",')
    )
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "mistaken.py").write_text(mistaken, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", str(tmp_path / "script.py"), str(tmp_path / "mistaken.py")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert ran.returncode == 1, ran.stdout
    assert all("mistaken.py:" in line for line in found), ran.stdout
    assert len(found) == 2
    assert 'Unexpected keyword argument "budgets"' in found[0]
    assert 'has type "Path", variable has type "int"' in found[1]
