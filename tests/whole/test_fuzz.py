"""Mutated files of every kind that is read: an error of ours or a success comes out, in bounded time, and nothing else.

The functions below the command line are called, so that its net for what nobody foresaw cannot hide anything.
"""

import io
import re
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import images, small_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from convrewrite import plan
from convrewrite.calibration.batches import peek_example, read_calibration
from convrewrite.errors import ConvRewriteError
from convrewrite.loading.checkpoints import read_safetensors
from convrewrite.loading.files import load_model
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.onnx_files.probing import require_well_behaved
from convrewrite.results.folder import save_plan
from convrewrite.results.reading import read_plan
from convrewrite.rules.files import builtin_rules, load_rule_file
from convrewrite.runtime.onnx_export import export

EXAMPLE = (torch.zeros(1, 3, 16, 16),)
SOAK = 20
"""How many times more inputs the long form takes."""

ODD_NUMBERS = ("0", "-1", "1e308", "-1e-308", "1000000000", "18446744073709551616", "9" * 5000, "nan", "1.5", "true")
ODD_TEXTS = (
    '""',
    '"\\u0000"',
    '"../../x"',
    '"(a+)+$"',
    '"' + "x" * 3000 + '"',
    "null",
    "[]",
    "{}",
    "[" * 500 + "]" * 500,
    '"é\\ud800"',
)

Edit = tuple[str, float, int]
edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "repeat", "insert", "zero", "splice")),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=4,
)
"""Each: what is done, where, and how."""

swaps = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 2**16)), min_size=1, max_size=3)
"""Each: which number or text of a structured file is replaced, and by what."""


def inputs(count: int) -> Callable[[Any], Any]:
    """So many inputs, the same ones every time; each within ten seconds."""
    return settings(
        max_examples=count, derandomize=True, deadline=timedelta(seconds=10), database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def mutated(data: bytes, changes: list[Edit]) -> bytes:
    """Bytes with these edits."""
    for what, where, how in changes:
        at, length = int(where * len(data)), 1 + how % 64
        if what == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << how % 8)]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + (data[at + length :] if how % 2 else b"")
        elif what == "repeat":
            data = data[: at + length] + data[at:]
        elif what == "insert":
            data = data[:at] + how.to_bytes(4, "little") * (1 + how % 3) + data[at:]
        elif what == "zero":
            data = data[:at] + bytes(length) + data[at + length :]
        elif what == "splice":
            source = int(how / 2**16 * len(data))
            data = data[:at] + data[source : source + length] + data[at + length :]
    return data


def swapped(text: str, changes: list[tuple[float, int]]) -> bytes:
    """A structured text, some of its numbers and quoted texts replaced by odd ones."""
    for where, how in changes:
        places = list(re.finditer(r'"[^"\n]*"|-?\b\d+(\.\d+)?\b', text))
        place = places[int(where * len(places))]
        odd = (*ODD_NUMBERS, *ODD_TEXTS)[how % (len(ODD_NUMBERS) + len(ODD_TEXTS))]
        text = text[: place.start()] + odd + text[place.end() :]
    return text.encode("utf-8", "surrogatepass")


def member_mutated(data: bytes, member: str, changes: list[Edit]) -> bytes:
    """An archive whose member alone is mutated, so that its checksums hold."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w") as made:
        for name in archive.namelist():
            content = archive.read(name)
            made.writestr(name, mutated(content, changes) if name.endswith(member) else content)
    return out.getvalue()


def survives(path: Path, data: bytes, read: Callable[[Path], object]) -> None:
    """An error of ours, with words, or a success."""
    path.write_bytes(data)
    told = "success"
    try:
        read(path)
    except ConvRewriteError as error:
        told = str(error)
    assert told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one valid file of every kind."""
    folder = tmp_path_factory.mktemp("valid")
    torch.manual_seed(0)
    network, few = small_network(), images(12).numpy()
    torch.save(network, folder / "model.pt")
    torch.save(network.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"x": torch.from_numpy(few), "labels": torch.arange(12)}, folder / "calibration.pt")
    np.savez(folder / "stored.npz", x=few, labels=np.arange(12))
    np.savez_compressed(folder / "packed.npz", x=few)
    np.save(folder / "array.npy", few)
    save_file(network.state_dict(), folder / "weights.safetensors")
    (folder / "rule.toml").write_bytes(builtin_rules()["balanced"].read_bytes())
    save_plan(plan(network, EXAMPLE[0], calibration="weights", measure=False), folder / "plan.json")
    export(network, EXAMPLE[0], folder / "model.onnx")
    return folder


def calibration(path: Path) -> None:
    peek_example(str(path), ("x",))
    read_calibration(path, EXAMPLE, memory=1 << 26)


def opened(path: Path) -> None:
    require_well_behaved(path, 20.0)
    OnnxModel(path, probe=20.0)(*EXAMPLE)


BYTES: dict[str, tuple[int, Callable[[Path], object]]] = {
    "model.pt": (200, load_model),
    "legacy.pt": (200, load_model),
    "calibration.pt": (200, calibration),
    "stored.npz": (150, calibration),
    "packed.npz": (150, calibration),
    "array.npy": (200, calibration),
    "weights.safetensors": (200, read_safetensors),
    "rule.toml": (150, load_rule_file),
    "plan.json": (150, read_plan),
}
"""File -> how many inputs, and its reader."""

MEMBERS: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "model.pt": ("/data.pkl", 300, load_model),
    "calibration.pt": ("/data.pkl", 150, calibration),
    "stored.npz": ("x.npy", 150, calibration),
}

TEXTS: dict[str, tuple[int, Callable[[Path], object]]] = {
    "rule.toml": (200, load_rule_file),
    "plan.json": (200, read_plan),
}


def fuzz_bytes(place: Path, folder: Path, name: str, count: int) -> None:
    valid, read = (place / name).read_bytes(), BYTES[name][1]

    @inputs(count)
    @given(edits)
    def run(changes: list[Edit]) -> None:
        survives(folder / name, mutated(valid, changes), read)

    run()


def fuzz_member(place: Path, folder: Path, name: str, count: int) -> None:
    member, _, read = MEMBERS[name]
    valid = (place / name).read_bytes()

    @inputs(count)
    @given(edits)
    def run(changes: list[Edit]) -> None:
        survives(folder / name, member_mutated(valid, member, changes), read)

    run()


def fuzz_text(place: Path, folder: Path, name: str, count: int) -> None:
    valid, read = (place / name).read_text(encoding="utf-8"), TEXTS[name][1]

    @inputs(count)
    @given(swaps)
    def run(changes: list[tuple[float, int]]) -> None:
        survives(folder / name, swapped(valid, changes), read)

    run()


def fuzz_onnx(place: Path, folder: Path, count: int) -> None:
    valid = (place / "model.onnx").read_bytes()

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(edits)
    def run(changes: list[Edit]) -> None:
        survives(folder / "model.onnx", mutated(valid, changes), opened)

    run()


def test_at_least_two_thousand_inputs_are_tried() -> None:
    counts = [count for count, _ in (*BYTES.values(), *TEXTS.values())] + [count for _, count, _ in MEMBERS.values()]
    assert sum(counts) >= 2000


@pytest.mark.parametrize("name", [*BYTES, "model.onnx"])
def test_the_valid_files_are_read(place: Path, name: str) -> None:
    read = opened if name == "model.onnx" else BYTES[name][1]
    if name == "legacy.pt":  # a state dict, which needs its network
        with pytest.raises(ConvRewriteError, match="--factory"):
            read(place / name)
    else:
        read(place / name)


@pytest.mark.parametrize("name", BYTES)
def test_mutated_bytes(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_bytes(place, tmp_path, name, BYTES[name][0])


@pytest.mark.parametrize("name", MEMBERS)
def test_mutated_members(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_member(place, tmp_path, name, MEMBERS[name][1])


@pytest.mark.parametrize("name", TEXTS)
def test_odd_values(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_text(place, tmp_path, name, TEXTS[name][0])


def test_mutated_graphs(place: Path, tmp_path: Path) -> None:
    fuzz_onnx(place, tmp_path, 12)


@pytest.mark.soak
@pytest.mark.parametrize("name", BYTES)
def test_mutated_bytes_for_long(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_bytes(place, tmp_path, name, SOAK * BYTES[name][0])


@pytest.mark.soak
@pytest.mark.parametrize("name", MEMBERS)
def test_mutated_members_for_long(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_member(place, tmp_path, name, SOAK * MEMBERS[name][1])


@pytest.mark.soak
@pytest.mark.parametrize("name", TEXTS)
def test_odd_values_for_long(place: Path, tmp_path: Path, name: str) -> None:
    fuzz_text(place, tmp_path, name, SOAK * TEXTS[name][0])


@pytest.mark.soak
def test_mutated_graphs_for_long(place: Path, tmp_path: Path) -> None:
    fuzz_onnx(place, tmp_path, SOAK * 12)
