"""Results that outlive a run: what is kept comes back, and nothing else does, whatever lies in the folder."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convrewrite.errors import UsageError
from convrewrite.stored.result_cache import (
    FORMAT,
    LIMIT_VARIABLE,
    ResultCache,
    RunCache,
    tensors_digest,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3).double(), "b": torch.tensor([True, False])}


def kept(folder: Path) -> tuple[ResultCache, Path]:
    cache = ResultCache(folder, 1.0)
    cache.put("key", {"x": [0.1, None]}, TENSORS)
    return cache, next(folder.glob("*.safetensors"))


def test_what_is_kept_comes_back_byte_for_byte_and_only_under_its_key(tmp_path: Path) -> None:
    cache, _ = kept(tmp_path / "new" / "folder")
    entry = cache.get("key")
    assert entry is not None and entry.facts == {"x": [0.1, None]}
    assert tensors_digest(entry.tensors) == tensors_digest(TENSORS)
    assert cache.get("another key") is None
    assert ResultCache(tmp_path / "new" / "folder", 1.0).get("key") is not None


def test_a_umask_that_lets_the_group_write_leaves_the_cache_in_use(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        cache, path = kept(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o077 == 0 and cache.get("key") is not None


def test_a_file_is_ones_own_that_the_user_in_whose_name_files_are_made_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, path = kept(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)  # a program that runs in another user's name
    assert cache.get("key") is not None
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert cache.get("key") is None


class Runs:
    """What leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(path.parent / "ran")))


def _torch_pickled(path: Path) -> None:
    torch.save(Runs(path.parent / "ran"), path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def _claims_terabytes(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 1 << 43]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def _claims_a_long_header(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def _a_link(path: Path) -> None:
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_suffix(".other"))


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _writable_by_all(path: Path) -> None:
    path.chmod(0o666)


def _writable_by_the_group(path: Path) -> None:
    path.chmod(0o620)


def _of_another_key(path: Path) -> None:
    save_file(TENSORS, str(path), {"format": FORMAT, "key": "other", "facts": "{}", "sum": ""})


def _without_a_sum(path: Path) -> None:
    save_file(TENSORS, str(path), {"format": FORMAT, "key": "key", "facts": "{}"})


def _without_metadata(path: Path) -> None:
    save_file(TENSORS, str(path))


@pytest.mark.parametrize(
    "harm",
    [
        _pickled, _torch_pickled, _cut, _one_bit, _claims_terabytes, _claims_a_long_header, _a_link, _a_pipe, _a_folder,
        _writable_by_all, _writable_by_the_group, _of_another_key, _without_a_sum, _without_metadata,
    ],
)  # fmt: skip
def test_a_file_that_is_broken_or_of_others_counts_as_missing_and_runs_nothing(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    cache, path = kept(tmp_path)
    harm(path)
    assert cache.get("key") is None
    assert not (tmp_path / "ran").exists()
    cache.put("key", 1, {})  # in its place, where that can be
    assert path.is_dir() or cache.get("key") is not None


def test_the_oldest_go_where_there_are_too_many_and_what_is_used_is_not_old(tmp_path: Path) -> None:
    size = {"a": torch.zeros(1000, dtype=torch.float64)}
    cache = ResultCache(tmp_path, 30_000 / (1 << 30))
    for number in range(3):
        cache.put(f"{number}", number, size)
        path = cache._file(f"{number}")
        os.utime(path, (number + 1, number + 1))
    assert cache.get("0") is not None
    cache.put("3", 3, size)
    assert [number for number in range(4) if cache.get(f"{number}") is not None] == [0, 2, 3]
    cache.put("4", 4, {"a": torch.zeros(10_000, dtype=torch.float64)})  # which alone is too much
    assert cache.get("4") is None and cache.get("3") is not None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 30_000


def test_a_folder_that_cannot_be_used_leaves_no_cache_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ResultCache(tmp_path / "file" / "results", 1.0)
    cache.put("key", 1, TENSORS)
    assert cache.get("key") is None


def test_what_lies_in_a_folder_that_can_only_be_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That an entry was used cannot be written down there."""
    cache, _ = kept(tmp_path)

    def refused(_path: Path) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert cache.get("key") is not None


def test_numbers_that_are_none_are_not_kept(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, 1.0)
    cache.put("key", float("nan"), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_is_a_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(UsageError, match=LIMIT_VARIABLE):
        ResultCache()


def test_nothing_is_kept_without_room(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, 0)
    cache.put("key", 1, {})
    assert not cache.keeps and list(tmp_path.iterdir()) == []


def test_runs_of_another_context_find_nothing(tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, 1.0)
    RunCache(cache, "one").put("fit", [1], 1, {})
    assert RunCache(cache, "one").get("fit", [1]) is not None
    assert [RunCache(cache, "two").get("fit", [1]), RunCache(cache, "one").get("fit", [2])] == [None, None]
    assert RunCache().get("fit", [1]) is None


def test_a_digest_tells_shapes_dtypes_names_and_layouts_apart() -> None:
    x = torch.zeros(1, 2, 2, 2)
    tensors = [x, x.double(), x.reshape(8), x + 1, x.to(memory_format=torch.channels_last), x[:0]]
    assert len({tensors_digest({"x": tensor}) for tensor in tensors} | {tensors_digest({"y": x})}) == 7
