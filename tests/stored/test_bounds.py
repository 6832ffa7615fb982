"""Pickles of nothing but allowed names and steps that would take time or memory out of proportion, or are of another format."""

import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from model_files import write_archive

from convrewrite.calibration.batches import read_calibration
from convrewrite.errors import CalibrationError, ModelLoadError
from convrewrite.loading.files import load_model
from convrewrite.stored import bounds, unpickling
from convrewrite.stored.bounds import SPARE_ELEMENTS, Bounds, ExcessiveError

EXAMPLE = (torch.zeros(1, 3, 16, 16),)


def step(part: bytes | int | str) -> bytes:
    if isinstance(part, bytes):
        return part
    text = part.encode() if isinstance(part, str) else part.to_bytes(8, "little", signed=True)
    return b"X" + len(text).to_bytes(4, "little") + text if isinstance(part, str) else b"\x8a\x08" + text


def steps(*parts: bytes | int | str) -> bytes:
    """A pickle of these opcodes; numbers and texts are pushed."""
    return b"\x80\x02" + b"".join(map(step, parts)) + b"."


PYRAMID = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (k, k, k + 1) for k in range(60))
"""A tuple of the same tuple twice, and so on: its hash would take 2**60 steps."""
BIG = b"]q\x00(" + b"K\x01" * 50_000 + b"e"
EMPTY_LAYER = b"ctorch.nn.modules.container\nSequential\n)\x81q\x00"


def pushes(numbers: Iterable[int]) -> bytes:
    return b"".join(b"J" + number.to_bytes(4, "little") for number in numbers)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "many steps": (steps(b"N" * 5_000_001), "more than 5000000 steps"),
    "a long text": (steps(b"X\xff\xff\xff\xff"), "pickle of at most 268435456 bytes"),
    "a key on many ways": (steps(PYRAMID, b"}h\x3cK\x01s"), "a key of more than 1000 parts"),
    "a set of one on many ways": (steps(PYRAMID, b"cbuiltins\nset\n]h\x3ca\x85R"), "a key of more than 1000 parts"),
    "ways": (steps(PYRAMID), "more than 10000000 ways lead"),
    "a deep list": (steps(b"]" * 200_000, b"a" * 199_999), "nested more than 400 deep"),
    "a deep list at the bottom of another": (
        steps(b"]" * 601, b"a" * 299, b"q\x00", b"a" * 301, b"h\x00a"),
        "nested more than 400 deep",
    ),
    "a deep dictionary": (steps(b"}" + b"K\x01}" * 9_000, b"s" * 9_000), "nested more than 400 deep"),
    "a deep key": (steps(b"})" + b"\x85" * 9_000, b"K\x01s"), "nested more than 400 deep"),
    "chosen hashes": (
        steps(b"}(" + b"".join(pushes([k, k]) + b"\x86N" for k in range(10_001)), b"u"),
        "more than 10000 keys",
    ),
    "a list in many sets": (steps(BIG, b"cbuiltins\nfrozenset\nh\x00\x85R" * 201), "more than 10000000 entries"),
    "pairs that are none": (steps(b"ccollections\nOrderedDict\n]]K\x01aa\x85R"), "a dictionary has no pairs"),
    "slices in slices": (steps(b"cbuiltins\nslice\ncbuiltins\nslice\nN\x85R\x85R"), "it makes a slice of something"),
    "a storage": (steps(b"ctorch.storage\nUntypedStorage\n", 1 << 30, b"\x85\x81"), "it makes a UntypedStorage"),
    "a storage of no size": (
        steps(b"(", "storage", b"ctorch\nFloatStorage\n", "0", "cpu", -1, b"tQ"),
        "without a size",
    ),
    "a reference to a function": (steps(b"(", "module", b"ctorch.nn.functional\nrelu\nNNtQ"), "a module of no class"),
    "a module in itself": (
        steps(EMPTY_LAYER, b"}(", "_modules", b"}", "a", b"h\x00s", "_parameters", b"}", "_buffers", b"}ub"),
        "a module is part of itself",
    ),
}


LOWERED: dict[str, tuple[ModuleType, str, int]] = {
    "many steps": (unpickling, "MOST_STEPS", 50_000),
    "a list in many sets": (bounds, "MOST_ENTRIES", 100_000),
}
"""Limits that take long to be reached, and what takes their place where they are met again."""


@pytest.mark.parametrize("name", LOWERED)
def test_limits_that_take_long_to_be_reached_hold(tmp_path: Path, name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(ModelLoadError, match=message):
        load_model(write_archive(tmp_path / "m.pt", data))


@pytest.mark.parametrize("legacy", [False, True], ids=["archive", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_pickles_that_saving_never_writes_are_refused_in_either_format(
    tmp_path: Path, name: str, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = HOSTILE[name]
    if name in LOWERED:
        module, limit, lower = LOWERED[name]
        message = message.replace(f"{getattr(module, limit)}", f"{lower}")
        monkeypatch.setattr(module, limit, lower)
        assert f"{lower}" in message
    path = write_archive(tmp_path / "m.pt", data)
    if legacy:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        whole = io.BytesIO(path.read_bytes())
        for _ in range(3):  # magic number, protocol, system
            pickle.load(whole)
        path.write_bytes(whole.getvalue()[: whole.tell()] + data)
    with pytest.raises(ModelLoadError, match=message):
        load_model(path)
    with pytest.raises(CalibrationError):
        read_calibration(path, EXAMPLE)


def test_a_tar_archive_that_begins_like_an_old_file_is_not_opened(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    start = (tmp_path / "m.pt").read_bytes()[:17]
    with tarfile.open(tmp_path / "m.pt", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("x" * 17))
    header = bytearray(start + (tmp_path / "m.pt").read_bytes()[17:])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    (tmp_path / "m.pt").write_bytes(header)
    with pytest.raises(ModelLoadError, match="it is a tar archive"):
        load_model(tmp_path / "m.pt")


def test_a_storage_has_the_bytes_that_the_archive_says() -> None:
    account = Bounds(100, {"a": 40, "b": 0})
    for _ in range(2):
        account.require_storage("a", 40)
    account.require_storage("b", 0)
    with pytest.raises(ExcessiveError, match="storage 'a' should have 41 bytes, found 40"):
        account.require_storage("a", 41)
    with pytest.raises(ValueError, match="storage 'c' is missing"):
        account.require_storage("c", 0)


def test_in_the_old_format_all_storages_together_have_the_bytes_of_the_file() -> None:
    account = Bounds(100, None)
    for key, size in (("a", 60), ("b", 40), ("a", 60), ("c", 0)):
        account.require_storage(key, size)
    with pytest.raises(ExcessiveError, match="storage 'a' should have 59 bytes, and 60 before"):
        account.require_storage("a", 59)
    with pytest.raises(ExcessiveError, match="its storages take more than 100 bytes"):
        account.require_storage("d", 1)


def test_tensors_have_a_few_elements_for_each_byte_of_the_file() -> None:
    account = Bounds(100, {})
    account.spend_elements((SPARE_ELEMENTS + 100, 1))
    account.spend_elements((3, 100))
    with pytest.raises(ExcessiveError, match=r"a tensor of shape 1 its tensors have more elements than four"):
        account.spend_elements((1,))
