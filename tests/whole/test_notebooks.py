"""The notebooks of the examples run, and show what they say."""

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


QUIET = ("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")


def outputs_of(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[Any]:
    """What the cells of a notebook show, once it has run."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(folder))
    notebook = nbformat.read(ROOT / "examples" / name, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.filterwarnings(*QUIET)
def test_the_first_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = outputs_of("first_steps.ipynb", monkeypatch, tmp_path)
    shown = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(shown) == 3, "an analysis, a plan and a result"
    assert all("<table>" in html for html in shown)
    displayed = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    texts = [data["text/plain"] for data in displayed if "text/html" not in data]
    assert [text for text in texts if "fit 0:" in text] != [], "progress, as it was in the end"
    assert printed(outputs) == [], "library code prints nothing"


@pytest.mark.soak
@pytest.mark.filterwarnings(*QUIET)
def test_the_frontier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outputs = outputs_of("frontier.ipynb", monkeypatch, tmp_path)
    shown = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(shown) == 2, "a sweep and a result"
    assert "<table>" in shown[0] and "0.35" in shown[0]
    assert any("'separable': " in output.get("data", {}).get("text/plain", "") for output in outputs)
    assert printed(outputs) == []


def printed(outputs: list[Any]) -> list[Any]:
    return [one for one in outputs if one["output_type"] == "stream" and one["name"] == "stdout"]
