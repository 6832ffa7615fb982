"""Values in memory up to a limit, the others on disk, all of them given back as they were."""

import tempfile
from pathlib import Path

import pytest
import torch

from convrewrite.rewriting.store import Store

TENSOR = 40
"""Bytes of ten numbers in float32."""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def on_disk(folder: Path) -> int:
    return len([path for path in folder.rglob("*.pt") if path.is_file()])


@pytest.mark.parametrize(("limit", "files"), [(0, 5), (2 * TENSOR, 3), (5 * TENSOR, 0)])
def test_what_is_beyond_the_limit_waits_on_disk(limit: int, files: int, own_folder: Path) -> None:
    store = Store(limit)
    values = [torch.randn(10) for _ in range(5)]
    kept = [store.put(value.clone(), shared=False) for value in values]
    assert on_disk(own_folder) == files
    assert all(torch.equal(store.get(k), value) for k, value in zip(kept, values, strict=True))
    store.close()
    assert on_disk(own_folder) == 0


def test_a_lower_limit_moves_what_came_last(own_folder: Path) -> None:
    store = Store(10 * TENSOR)
    kept = [store.put(torch.full((10,), float(i)), shared=False) for i in range(4)]
    store.shrink(2 * TENSOR)
    assert [k.path is None for k in kept] == [True, True, False, False]
    assert [float(store.get(k)[0]) for k in kept] == [0, 1, 2, 3]
    store.drop(kept[0])
    store.put(torch.zeros(10), shared=False)
    assert on_disk(own_folder) == 2, "a value that was dropped gives its room back"
    store.close()


def test_shared_memory_and_other_values_stay(own_folder: Path) -> None:
    store = Store(0)
    tensor = torch.arange(10.0)
    assert store.get(store.put(tensor, shared=True)) is tensor
    assert store.get(store.put(None, shared=False)) is None
    assert store.get(store.put((1, 2), shared=False)) == (1, 2)
    assert on_disk(own_folder) == 0
