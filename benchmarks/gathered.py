"""Rows that a benchmark measured, in a file: a row that is there is not measured again, so that several runs can gather a table.

The file says which runs wrote it, each with its arguments and versions, and of every row which run measured it, what was asked
and what was found.
"""

import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import convrewrite

RESULTS = Path(__file__).parent / "results"
"""Where the results lie that documents show."""


def versions() -> dict[str, str]:
    """What the figures of a run depend on besides its arguments."""
    return {
        "convrewrite": convrewrite.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "processors": str(os.cpu_count()),
    }


def _shown(argument: str) -> str:
    """An argument as the file says it: where a folder lies on one machine is nobody else's."""
    return Path(argument).name.upper() if Path(argument).is_absolute() else argument


class Gathered:
    """The rows of one file, or of none where ``path`` is None; written anew after every row that was measured."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        held: dict[str, Any] = {"runs": [], "rows": []}
        if path is not None and path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
        self._runs: list[Any] = held["runs"]
        self._rows: list[dict[str, Any]] = held["rows"]
        self._begun = False

    def row(self, asked: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What was found for this, now or in an earlier run. Prints it where it is new."""
        wanted = json.loads(json.dumps(asked))
        for row in self._rows:
            if row["asked"] == wanted:
                return dict(row["found"])
        found: dict[str, Any] = json.loads(json.dumps(measure()))
        self._note_run()
        self._rows.append({"run": len(self._runs) - 1, "asked": wanted, "found": found})
        self._write()
        print(" ".join(str(value) for value in (*wanted.values(), found)), file=sys.stderr, flush=True)
        return found

    def _note_run(self) -> None:
        """Note this run before its first row; a run that finds all its rows in the file leaves it as it is."""
        if not self._begun:
            self._begun = True
            self._runs.append({"arguments": [_shown(word) for word in sys.argv[1:]], "versions": versions()})

    def _write(self) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(exist_ok=True, parents=True)
        beside = self._path.with_suffix(".writing")
        beside.write_text(json.dumps({"runs": self._runs, "rows": self._rows}, indent=1) + "\n", encoding="utf-8")
        beside.replace(self._path)


def held(path: Path) -> Any:
    """What a file of results holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What was asked and what was found of every row of a file, in one dictionary each."""
    return [row["asked"] | row["found"] for row in held(path)["rows"]]
