"""Changes that are not released yet: every fragment becomes an entry of the next version."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAGMENTS = sorted(path for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md")
TYPES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]["type"]


def spaced(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("fragment", FRAGMENTS, ids=lambda path: path.name)
def test_a_fragment_is_named_as_contributing_says(fragment: Path) -> None:
    types = "|".join(kind["directory"] for kind in TYPES)
    assert re.fullmatch(rf"\+[a-z0-9-]+\.({types})(\.[0-9]+)?\.md", fragment.name)


def test_every_fragment_becomes_an_entry() -> None:
    pytest.importorskip("towncrier", reason="towncrier is not installed")
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("## 9.9.9\n")
    for fragment in FRAGMENTS:
        entry = spaced(fragment.read_text(encoding="utf-8"))
        assert entry and f"- {entry}" in spaced(ran.stdout), fragment.name
