"""Where results and timings are kept, also for a user without a home."""

import os
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from convrewrite.folders import user_cache
from convrewrite.folders.lasting import FOLDER_VARIABLE
from convrewrite.runtime.timing_cache import TimingCache
from convrewrite.stored import ResultCache


def test_the_folder_that_was_named_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert user_cache() == tmp_path


def test_a_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As platformdirs raises it where HOME is not set, and the user is in no list of users."""

    def no_home(_name: str) -> str:
        raise RuntimeError("could not determine the home directory for '~/.cache'")

    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setattr(platformdirs, "user_cache_dir", no_home)
    timings, results = TimingCache(), ResultCache()
    timings.put({"a": 0.5})
    results.put("a", {}, {})
    assert (timings.get("a"), results.get("a")) == (None, None)
    assert not timings.folder.exists() and not results.folder.exists()


def test_entries_are_put_without_a_look_at_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be tens of thousands, and a run puts thousands."""
    looked: list[str] = []
    scandir = os.scandir

    def counted(path: Any) -> Any:
        looked.append(str(path))
        return scandir(path)

    timings, results = TimingCache(tmp_path / "timings"), ResultCache(tmp_path / "results", 1.0)
    monkeypatch.setattr(os, "scandir", counted)
    for number in range(5):
        timings.put({f"{number}": 0.5})
        results.put(f"{number}", {}, {})
    folders = [looked.count(str(cache.folder)) for cache in (timings, results)]
    assert folders == [1, 2]  # for what ended runs left, and for how much there is
    assert timings.get("4") == 0.5 and results.get("4") is not None
