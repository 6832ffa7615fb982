"""The documentation as a site: it builds without a warning, names every command, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from convrewrite.cli.commands import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    return folder


def test_every_document_is_a_page_and_in_the_navigation(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    for name in [*(path.stem for path in (ROOT / "docs").glob("*.md")), "commands", "readme"]:
        assert (site / f"{name}.html").is_file()
        assert name == "index" or f'href="{name}.html"' in start, name


def test_every_command_has_its_options_there(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        assert f'<h2 id="{name}' in page, name
        for option in (
            word for one in command.params for word in one.opts if word.startswith("--") and word != "--help"
        ):
            assert f"<code>{option}</code>" in page, f"{name} {option}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=\"?([^\"\s>]+)|<link[^>]*href=\"?([^\"\s>]+)", text)
        assert [one for one in loaded if any("//" in part for part in one)] == [], page.name
