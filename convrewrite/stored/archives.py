"""The sizes of what a zip archive of ``torch.save`` holds, checked before anything is unpacked."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from convrewrite.stored.bounds import LONGEST_PICKLE, ExcessiveError

MOST_MEMBERS = 200_000
"""Most members of an archive: one for each storage, and a few more."""

_STORAGES = "data/"


def stored_sizes(path: Path) -> dict[str, int]:
    """Bytes of every storage by its key.

    Raises ExcessiveError for an archive that unpacks to more bytes than it has, or whose pickle is too long; OSError, ValueError
    and RuntimeError for a damaged one.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    _require_no_more(sum(member.file_size for member in members), size)
    if len(members) > MOST_MEMBERS or len({member.filename for member in members}) < len(members):
        raise ExcessiveError(f"expected at most {MOST_MEMBERS} members, each once, found {len(members)}")
    sizes = _sizes_in(path, members)
    _require_no_more(sum(sizes.values()), size)
    if "data.pkl" not in sizes or sizes["data.pkl"] > LONGEST_PICKLE:
        raise ExcessiveError(
            f"expected a pickle of at most {LONGEST_PICKLE} bytes, found {sizes.get('data.pkl', 'none')}"
        )
    return {name.removeprefix(_STORAGES): count for name, count in sizes.items() if name.startswith(_STORAGES)}


def _sizes_in(path: Path, members: Sequence[zipfile.ZipInfo]) -> dict[str, int]:
    """Bytes of every record as PyTorch's own reader sees them, since another reader may see others. Before version 2.13 it
    reports no sizes: then it must see the same records as ``zipfile``, whose sizes count."""
    reader = torch._C.PyTorchFileReader(str(path))
    names = set(reader.get_all_records())
    if hasattr(reader, "get_record_size"):
        return {name: reader.get_record_size(name) for name in names}
    sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
    if names != set(sizes):
        raise ExcessiveError("expected one list of what it holds, found two that differ")
    return sizes


def pickle_of(path: Path) -> bytes:
    """The pickle of an archive whose sizes have been checked."""
    content: bytes = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    return content


def is_script(path: Path) -> bool:
    """Whether PyTorch would take an archive for a TorchScript module."""
    return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


def _require_no_more(unpacked: int, size: int) -> None:
    if unpacked > size:
        raise ExcessiveError(
            f"its members unpack to {unpacked} bytes, the file has {size}; torch.save does not compress"
        )
