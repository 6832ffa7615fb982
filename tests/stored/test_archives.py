"""Sizes in archives, also where PyTorch's own reader does not tell them, as before version 2.12."""

import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from convrewrite.stored import Archive, archives
from convrewrite.stored.bounds import ExcessiveError

READER = torch._C.PyTorchFileReader


class Untold:
    """A reader that tells no sizes, and one record more or less than there are."""

    def __init__(self, path: str, more: tuple[str, ...] = ()) -> None:
        self._names = [*READER(path).get_all_records(), *more]

    def get_all_records(self) -> list[str]:
        return self._names


def saved(folder: Path) -> Path:
    torch.save({"a": torch.zeros(3), "b": torch.ones(5, dtype=torch.float64)}, folder / "state.pt")
    return folder / "state.pt"


def test_a_reader_that_tells_no_sizes_has_those_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "PyTorchFileReader", Untold)
    assert archives.stored_sizes(saved(tmp_path)) == {"0": 12, "1": 40}


def test_readers_that_see_different_records_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "PyTorchFileReader", lambda path: Untold(path, ("data/9",)))
    with pytest.raises(ExcessiveError, match="two that differ"):
        archives.stored_sizes(saved(tmp_path))


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(1 << 20))
    with pytest.raises(ExcessiveError, match=r"torch\.save does not compress"):
        archives.stored_sizes(tmp_path / "bomb.pt")


def test_a_header_of_an_array_is_not_read_before_its_length_is_known_to_be_one(tmp_path: Path) -> None:
    """Zeros take no room in an archive: a file of four megabytes could have a header of four gigabytes."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + (16 << 20).to_bytes(4, "little") + bytes(16 << 20))
    found = Archive(tmp_path / "x.npz", 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a header of 16777216 bytes, the limit is 10000"):
            found["x"]
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
