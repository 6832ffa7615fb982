"""What is uploaded: a wheel and an sdist that are made without a network, and hold what a user needs."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TEMPLATES = "convrewrite/reporting/templates/"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_the_wheel_made_of_the_sdist_is_whole(made: Path) -> None:
    [wheel] = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = message_from_bytes(archive.read(metadata))
        [entries] = [name for name in names if name.endswith("entry_points.txt")]
        assert b"convrewrite = convrewrite.cli:run" in archive.read(entries)
    assert {
        "convrewrite/py.typed",
        *(f"{TEMPLATES}{name}" for name in ("report.html.j2", "page.css", "page.js")),
    } <= names
    assert {f"convrewrite/_rules/{path.name}" for path in (ROOT / "rules").glob("*.toml")} <= names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "convrewrite").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}, "all of the package, and nothing else"
    assert told["License-Expression"] == "MIT"
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_has_what_tests_and_documents_need(made: Path) -> None:
    [sdist] = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "mkdocs.yml",
        "constraints.txt",
        "constraints-lowest.txt",
        "Makefile",
    }
    assert wanted <= names
    assert {"tests/conftest.py", "docs/api.md", "examples/first_steps.ipynb", "rules/balanced.toml"} <= names


def test_the_changelog_begins_with_this_version() -> None:
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]
    assert headings[0].split()[1] == PROJECT["version"]


def test_every_lower_bound_is_one_that_is_tried() -> None:
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    tried = {one.name: one for one in map(Requirement, (line for line in lines if not line.startswith("#")))}
    extras = (one for extra in ("recover", "cluster") for one in PROJECT["optional-dependencies"][extra])
    asked = map(Requirement, (*PROJECT["dependencies"], *extras))
    for requirement in asked:
        [bound] = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        [pinned] = [Version(part.version) for part in tried.pop(requirement.name).specifier]
        assert pinned.release[: len(bound.release)] == bound.release, f"{requirement} is tried with {pinned}"
    assert tried == {}


def test_every_constraint_is_met_by_what_is_asked_for() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {one.name.lower(): one for one in map(Requirement, (line for line in lines if not line.startswith("#")))}
    for text in (
        *PROJECT["dependencies"],
        *(one for extra in PROJECT["optional-dependencies"].values() for one in extra),
    ):
        requirement = Requirement(text)
        [version] = [part.version for part in pinned[requirement.name.lower()].specifier]
        assert version in requirement.specifier, text
