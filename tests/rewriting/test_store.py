"""Values in memory up to a limit, the others on disk, all of them given back as they were."""

import tempfile
from pathlib import Path

import pytest
import torch

from convrewrite.rewriting import store as module
from convrewrite.rewriting.store import Store

TENSOR = 40
"""Bytes of ten numbers in float32."""


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def on_disk(folder: Path) -> int:
    return len([path for path in folder.rglob("*.numbers") if path.is_file()])


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
    assert [k.waiting is None for k in kept] == [True, True, False, False]
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


VALUES = {
    "float64": torch.randn(3, 4, dtype=torch.float64),
    "bfloat16": torch.randn(3, 4).bfloat16(),
    "booleans": torch.arange(10) > 4,
    "whole numbers": torch.arange(10),
    "complex": torch.randn(3, 4, dtype=torch.complex64),
    "conjugate": torch.randn(3, 4, dtype=torch.complex64).conj(),
    "one number": torch.tensor(3.0),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "with gaps": torch.randn(6, 8)[::2, 1::3],
    "a part of a larger one": torch.randn(100)[40:60],
    "repeated": torch.randn(1, 4).expand(5, 4),
    "turned": torch.randn(3, 4).T,
}


@pytest.mark.parametrize("name", VALUES)
def test_what_comes_back_from_disk_is_the_same(name: str, own_folder: Path) -> None:
    store, value = Store(0), VALUES[name]
    kept = store.put(value, shared=False)
    assert on_disk(own_folder) == 1
    found = store.get(kept)
    assert found.dtype == value.dtype
    assert torch.equal(found, value)
    if value.dim() == 4:
        assert found.stride() == value.stride()
    store.drop(kept)
    assert torch.equal(found, value), "it outlives its file"
    assert on_disk(own_folder) == 0
    store.close()


def test_work_in_place_leaves_what_waits_as_it_is() -> None:
    store = Store(0)
    kept = store.put(torch.zeros(10), shared=False)
    store.get(kept).add_(1)
    assert torch.equal(store.get(kept), torch.zeros(10))
    store.close()


def test_what_is_more_than_numbers_stays(own_folder: Path) -> None:
    store = Store(0)
    for value in (torch.eye(3).to_sparse(), torch.nn.Parameter(torch.zeros(3))):
        assert store.get(store.put(value, shared=False)) is value
    assert on_disk(own_folder) == 0
    store.close()


def test_a_file_is_read_where_it_cannot_be_removed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAPPED", False)
    store = Store(0)
    value = torch.randn(10)
    kept = store.put(value, shared=False)
    assert torch.equal(store.get(kept).add_(0), value)
    store.close()
