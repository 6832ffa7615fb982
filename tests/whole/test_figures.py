"""Figures in documents are what benchmarks wrote into files, and no others stand beside them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import gathered
import pytest

README = figures.ROOT / "README.md"

MEASURED = re.compile(
    r"\d[\d.,]*(?:x| ?(?:%|s|ms|us|GB|MB|nats|points|minutes))(?![\w-])|^\|.*\d\.\d.*\|$", re.MULTILINE
)
"""Numbers with the units of what is measured, and rows of tables; a setting that is asked for has no unit."""


@pytest.mark.parametrize("document", figures.DOCUMENTS, ids=lambda path: path.name)
def test_marked_figures_are_what_the_files_hold(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert figures.written(text) == text, "python benchmarks/figures.py --write"


def measured(text: Callable[[], str]) -> bool:
    try:
        return bool(text())
    except (LookupError, FileNotFoundError):
        return False


def test_whatever_was_measured_is_in_a_document() -> None:
    marked = [
        name for path in figures.DOCUMENTS for name, _ in figures.MARKED.findall(path.read_text(encoding="utf-8"))
    ]
    assert sorted(marked) == sorted(name for name, text in figures.TEXTS.items() if measured(text))


def test_marks_come_in_pairs() -> None:
    for document in figures.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert (
            text.count("<!-- figures: ") == text.count("<!-- end of figures -->") == len(figures.MARKED.findall(text))
        )


@pytest.mark.parametrize("path", sorted(gathered.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_name_no_folder_of_a_machine(path: Path) -> None:
    runs = json.loads(path.read_text(encoding="utf-8"))
    words = [word for run in runs["runs"] for word in run["arguments"]] if "runs" in runs else []
    assert [word for word in words if Path(word).is_absolute()] == []


def test_the_readme_has_no_figure_that_is_not_marked() -> None:
    rest = figures.MARKED.sub("", README.read_text(encoding="utf-8"))
    assert MEASURED.findall(rest) == []


@pytest.mark.parametrize("figure", ["92.64 %", "0.34x", "64 s", "2.2 GB", "0.57 points", "41 %"])
def test_a_figure_is_known_when_it_is_seen(figure: str) -> None:
    assert MEASURED.findall(f"It takes {figure}, they say.") == [figure]


@pytest.mark.parametrize("words", ["224 x 224", "`macs=0.25`", "1,024 unlabelled images", "Python 3.11 or newer"])
def test_what_is_asked_for_is_no_figure(words: str) -> None:
    assert MEASURED.findall(f"It takes {words}, they say.") == []


def test_another_figure_in_a_file_changes_the_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = gathered.held(gathered.RESULTS / "few_inputs.json")
    rows[0]["lost"] = 0.1234
    (tmp_path / "few_inputs.json").write_text(json.dumps(rows), encoding="utf-8")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "| 32 | 12.34 |" in figures.written("<!-- figures: few-inputs -->\nold\n<!-- end of figures -->\n")


def test_a_row_in_the_file_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    measured: list[int] = []

    def measure() -> dict[str, Any]:
        measured.append(1)
        return {"lost": 0.5}

    for _ in range(2):
        assert gathered.Gathered(path).row({"network": "example", "asked": (0.5,)}, measure) == {"lost": 0.5}
    assert measured == [1]
    assert gathered.rows_of(path) == [{"network": "example", "asked": [0.5], "lost": 0.5}]
    gathered.Gathered(path).row({"network": "vgg", "asked": (0.5,)}, measure)
    held = gathered.held(path)
    assert [row["run"] for row in held["rows"]] == [0, 1]
    assert held["runs"][0]["versions"]["torch"]


def test_without_a_file_every_row_is_measured() -> None:
    rows = gathered.Gathered(None)
    assert rows.row({"asked": 1}, lambda: {"found": 2}) == {"found": 2}
