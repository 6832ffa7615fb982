"""What would take more time or memory than its file is worth is refused, with the number and the limit, before it is taken."""

import io
import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INPUT, call, images, small_network
from model_files import Call
from PIL import Image
from torch import nn

from convrewrite import machine, optimize, values
from convrewrite.calibration.batches import read_calibration
from convrewrite.cli.unforeseen import FAULT, unforeseen
from convrewrite.errors import CalibrationError, ModelLoadError, UsageError
from convrewrite.loading.files import load_model

EXAMPLE = (torch.zeros(1, 3, 16, 16),)


def network_with(value: object) -> nn.Module:
    model = small_network()
    model.extra = value  # type: ignore[assignment]
    return model


def doubled(levels: int) -> Any:
    pair: Any = ()
    for _ in range(levels):
        pair = (pair, pair)
    return pair


def branching(levels: int) -> nn.Module:
    """Both branches of every level are modules of their own that hold the same next level: 2**levels ways lead down."""
    model: nn.Module = nn.Conv2d(3, 3, 3)
    for _ in range(levels):
        model = nn.Sequential(OrderedDict(a=nn.Sequential(model), b=nn.Sequential(model)))
    return model


def nested(levels: int) -> nn.Module:
    model: nn.Module = nn.Conv2d(3, 3, 3)
    for _ in range(levels):
        model = nn.Sequential(model)
    return model


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


class Outgrown:
    """A tensor that ends far behind its storage, which PyTorch would enlarge."""

    def __reduce__(self) -> Any:
        storage = torch.zeros(3)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**6, 10**6), (10**6, 1), False, OrderedDict())


def many_layers() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.LSTM(3, 4))
    model[1].__dict__["num_layers"] = 10**9
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network_with(Call(range, 10**9)), "a range of 1000000000 numbers, the limit is 1000000"),
        (lambda: network_with(Call(bytearray, 10**9)), "it makes a bytearray of another type"),
        (lambda: network_with(Call(frozenset, range(10**6))), "it makes a frozenset of another type"),
        (lambda: network_with(Call(nn.Linear, 10**5, 10**5)), "it calls Linear"),
        (lambda: network_with(Call(nn.functional.relu, torch.zeros(2))), "it calls relu"),
        (lambda: network_with(torch.zeros(1).expand(10**6, 10**6)), "shape 1000000x1000000 .* more elements than four"),
        (lambda: network_with(Outgrown()), "ends at element 1000000000000 of a storage of 3"),
        (lambda: network_with(doubled(60)), "more than 10000000 ways lead"),
        (lambda: network_with({i * (2**61 - 1): 0 for i in range(9)}), "a key of 61 bits .*, the limit is 60"),
        (lambda: branching(40), "more than 10000000 ways lead"),
        (lambda: nested(150), "nested more than 400 deep"),
        (many_layers, "num_layers is 1000000000, the limit is 10000"),
    ],
)
def test_what_a_pickle_would_build_is_known_before(
    make: Callable[[], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # to write what is nested too deeply
    try:
        torch.save(make(), tmp_path / "m.pt")
    finally:
        sys.setrecursionlimit(limit)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / "m.pt")


def test_a_number_of_layers_that_is_no_plain_number(tmp_path: Path) -> None:
    model = many_layers()
    vars(model[1])["num_layers"] = np.int64(10**9)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"num_layers is a int64, the limit is 10000"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "make",
    [
        lambda: network_with(torch.zeros(1, 1).expand(1000, 1000)),
        lambda: network_with(
            [range(5), slice(1, 2), frozenset([1, (2, 3)]), {1, 2}, {"a": [1.0, None]}, b"\xff", 2**70]
        ),
        lambda: network_with([np.arange(5.0), np.float32(3), torch.float16, torch.device("cpu"), torch.Size([1, 2])]),
        lambda: network_with([torch.zeros(3, 4).t(), torch.zeros(9)[2:7:2], torch.zeros(0, 3), torch.tensor(1.0)]),
        lambda: nn.Sequential(*[nn.Conv2d(3, 3, 3)] * 50),
        lambda: nested(60),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.LSTM(3, 4, 2, bidirectional=True)),
    ],
)
def test_what_models_hold_is_loaded_as_before(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    torch.save(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt").model
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_members_that_unpack_to_more_than_the_file(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("m/data/99", bytes(50 << 20))
    with pytest.raises(ModelLoadError, match=r"members unpack to 52\d{6} bytes, the file has"):
        load_model(tmp_path / "m.pt")


def test_a_storage_that_is_not_as_large_as_said(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data.replace(b"K\x03N", b"J\xff\xff\xff\x7fN"))
    with pytest.raises(ModelLoadError, match=r"storages take more than \d+ bytes"):
        load_model(tmp_path / "m.pt")
    torch.save(torch.zeros(1).expand(10**6, 10**6), tmp_path / "c.pt")
    with pytest.raises(CalibrationError, match="more elements than four"):
        read_calibration(tmp_path / "c.pt", EXAMPLE)


def npy_header(shape: tuple[int, ...], kind: Any = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "kind", "message"),
    [
        ((10**9, 3, 16, 16), "<f4", "3072000000000 bytes, as its header says, found 0"),
        ((10**12, 0), "<f4", "at most 100000000 examples, found 1000000000000"),
        ((2, 3, 16, 16), "|O", "expected numbers, .* found an array of object"),
        ((2, 3, 16, 16), [("a", "<f4")], "expected numbers"),
    ],
)
def test_headers_of_arrays(tmp_path: Path, shape: tuple[int, ...], kind: Any, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy_header(shape, kind))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_header(shape, kind))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(CalibrationError, match=message):
            read_calibration(tmp_path / name, EXAMPLE)


def test_a_packed_array_is_bounded_by_memory_and_read_no_further_than_needed(tmp_path: Path) -> None:
    whole = np.arange(40 * 768, dtype=np.float32).reshape(40, 3, 16, 16) / 1e6
    np.savez_compressed(tmp_path / "c.npz", x=whole)
    with pytest.raises(CalibrationError, match=r"c\.npz: .* 122880 bytes, the limit is 100000.*--memory"):
        read_calibration(tmp_path / "c.npz", EXAMPLE, memory=100_000)
    read = read_calibration(tmp_path / "c.npz", EXAMPLE, memory=130_000)
    rows = torch.cat([x for (x,) in (*read.fit, *read.held_out)])
    assert torch.equal(rows[rows[:, 0, 0, 0].argsort()], torch.from_numpy(whole))
    with pytest.raises(CalibrationError, match="122880 bytes, the limit is 100000"):
        read_calibration(whole, EXAMPLE, memory=100_000)


@pytest.mark.parametrize("order", ["C", "F"])
def test_drawn_rows_of_an_archive_are_those_of_the_array(tmp_path: Path, order: Any) -> None:
    whole = np.asarray(np.random.default_rng(0).random((90, 3, 16, 16), np.float32), order=order)
    np.savez(tmp_path / "c.npz", x=whole)
    archived, plain = (read_calibration(source, EXAMPLE, limit=20) for source in (tmp_path / "c.npz", whole))
    assert all(torch.equal(a, b) for (a,), (b,) in zip(archived.fit, plain.fit, strict=True))


def test_extreme_values_are_named(tmp_path: Path) -> None:
    extreme = images(8)
    extreme[5, 0, 0, 0] = 1e30
    with pytest.raises(CalibrationError, match=r"up to 1e\+12, .* found 1e\+30, the first such in example 5"):
        read_calibration(extreme, EXAMPLE)
    with pytest.raises(CalibrationError, match="normalised: expected numbers up to"):
        read_calibration(images(8), EXAMPLE, std=(1e-30,))
    with pytest.raises(CalibrationError, match="mean: expected finite"):
        read_calibration(images(8), EXAMPLE, mean=(float("nan"),))


@pytest.mark.parametrize("budget", [None, {"macs": 0.8}])
def test_a_site_whose_numbers_overflow_is_kept_with_the_reason(budget: dict[str, float] | None) -> None:
    model = small_network()
    for name, scale in (("3.weight", 1e18), ("6.weight", 1e15)):
        model.get_parameter(name).data.mul_(scale)
    result = optimize(model, EXAMPLE[0], ["balanced"], images(), budget, measure=False)
    rows = {row.name: row for row in result.report.sites}
    assert rows["6"].action == "kept"
    assert re.match("expected inputs and weights of ordinary size, found .* --calib weights$", rows["6"].reason or "")
    assert torch.equal(result.model.get_submodule("6").weight, model.get_submodule("6").weight)
    assert rows["3"].action != "kept"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20000, 1), "at most 89478485 pixels, scaled to cover 224x224 it would have 4480000 x 224"),
        ((10000, 10000), "100000000 pixels.* 89478485|89478485 pixels, found 10000 x 10000"),
    ],
)
def test_images_of_odd_sizes(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(CalibrationError, match=message):
        read_calibration(tmp_path, (torch.zeros(1, 3, 224, 224),))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--seed", "99999999999999999999"], ["--seed", "9223372036854775807", "99999999999999999999"]),
        (["--seed", "-1"], ["--seed", "from 0 to"]),
        (["--memory", "inf"], ["--memory", "found inf"]),
        (["--memory", "nan"], ["--memory", "found nan"]),
        (["--memory", "1e30"], ["--memory", "found 1e+30"]),
        (["--threads", "1000000000"], ["--threads", f"at most {values.MOST_THREADS}", "1000000000"]),
        (["--input", "1x" + "9" * 5000], ["input shape", "67108864 numbers", "5002 characters"]),
        (["--input", "1x3x1000000x1000000"], ["input shape", "67108864", "which is 3000000000000"]),
        (["--resize", "99999999x1"], ["--resize", "at most 16384 pixels", "'99999999x1'"]),
        (["--mean", "nan"], ["--mean: expected finite numbers", "'nan'"]),
        (["--std", "1e400"], ["--std: expected finite numbers"]),
        (["--budget", "macs=0.5", "--budget", "macs=0.4"], ["--budget: expected each name once", "'macs'"]),
        (["--budget", "macs=0.5,macs=0.4"], ["--budget: expected each name once"]),
        (["--keep", "0.9", "--keep", "0.8"], ["--keep: expected once"]),
        (["--seed", "1", "--seed", "2"], ["--seed: expected once"]),
        (["--factory", ""], ["expected text in every argument"]),
        (["--factory", "a\0b"], ["without NUL", "a\\x00b"]),
        (["--factory", "a\udc80"], ["UTF-8"]),
        (["--calib", "/dev/zero"], ["a pipe or a device"]),
        (["--rule", "/dev/zero"], ["/dev/zero", "a pipe or a device"]),
        (["--calib", "x" * 5000], ["File name too long"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value[0].startswith("--") else "",
)
def test_values_beyond_every_use(tmp_path: Path, options: list[str], parts: list[str]) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    shape = () if "--input" in options else INPUT
    ran = call("optimize", tmp_path / "net.pt", "-o", tmp_path / "out", *shape, *options)
    assert ran.code in (2, 3)
    assert [part for part in parts if part not in ran.message] == [], ran.message


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["verify", "a.onnx", "b.onnx", "--agreement", "7"], "--agreement: expected a number in [0, 1]"),
        (["verify", "a.onnx", "b.onnx", "--agreement", "nan"], "--agreement: expected a number in [0, 1]"),
        (["verify", "a.onnx", "b.onnx", "--error", "-1"], "--error: expected a number of at least 0"),
        (["verify", "a.onnx", "b.onnx", "--timeout", "0"], "--timeout: expected seconds above 0"),
        (["bench", "a.onnx", "b.onnx", "--rounds", "1000000000"], "--rounds: expected a whole number from 3"),
        (["explain", "/dev/zero"], "a pipe or a device"),
    ],
)
def test_values_of_other_commands(options: list[str], part: str) -> None:
    ran = call(*options)
    assert ran.code == 2
    assert part in ran.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed: expected"), ({"seed": 2**63}, "seed: expected"), ({"threads": 10**9}, "threads: expected"),
        ({"memory": 0}, "memory: expected bytes"), ({"memory": 10**400}, "memory: expected bytes"),
    ],
)  # fmt: skip
def test_the_python_interface_has_the_same_limits(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        optimize(small_network(), EXAMPLE[0], calibration="weights", measure=False, **settings)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("c.npy", "r.toml", "p.json", "m.pt", "m.onnx"):
        os.mkfifo(tmp_path / name)
    torch.save(small_network(), tmp_path / "net.pt")
    model = tmp_path / "net.pt"
    for words in (
        ("optimize", model, "-o", tmp_path / "out", *INPUT, "--calib", tmp_path / "c.npy"),
        ("rules", "check", tmp_path / "r.toml"),
        ("explain", tmp_path / "p.json"),
        ("analyze", tmp_path / "m.pt"),
        ("verify", model, tmp_path / "m.onnx"),
    ):
        ran = call(*words)
        assert ran.code in (2, 3)
        assert ran.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("schema = " + "9" * 5000, "not valid TOML"),
        (
            'schema = 1\n[[rule]]\nname = "a"\nstructures = ["separable"]\nmatch = { name = "(?=a)" }',
            "without backreferences",
        ),
        (
            'schema = 1\n[[rule]]\nname = "a"\nstructures = ["separable"]\nmatch = { name = "(a)\\\\1" }',
            "without backref",
        ),
        ("x" * (1 << 21), "at most 1048576 bytes"),
    ],
)
def test_rule_files_that_go_too_far(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "r.toml").write_text(text)
    ran = call("rules", "check", tmp_path / "r.toml")
    assert ran.code == 2
    assert part in ran.message


def test_thousands_of_faults_are_told_in_a_few_lines(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("schema = 1\n" + "[[rule]]\n" * 2000)
    ran = call("rules", "check", tmp_path / "r.toml")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 21
    assert ran.err.rstrip().endswith("3980 more findings; mend these first")


def test_a_pattern_takes_no_longer_for_a_name_that_nearly_matches(tmp_path: Path) -> None:
    rule = 'schema = 1\n[[rule]]\nname = "a"\nstructures = ["separable"]\nmatch = { name = "(a+)+$" }\n[[rule.accepts]]\nname = "'
    conv = "conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }\n"
    (tmp_path / "r.toml").write_text(f'{rule}{"a" * 5000}b"\n{conv}')
    assert call("rules", "check", tmp_path / "r.toml").code == 1
    (tmp_path / "r.toml").write_text(f'{rule}{"a" * 5000}"\n{conv}')
    assert call("rules", "check", tmp_path / "r.toml").code == 0


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "or a lower --memory where the command has it"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "it is not enough"),
        (ImportError("_imaging.so: failed to map segment from shared object"), "it is not enough"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OSError(28, "No space left on device", "x"), "No space left on device"),
        (KeyError("x"), f"{FAULT} (KeyError: 'x')"),
        (ValueError("\x1b[31mred"), r"(ValueError: \x1b[31mred)"),
        (Unspeakable(), f"{FAULT} (Unspeakable)"),
    ],
)
def test_what_nobody_foresaw_is_one_line(error: Exception, part: str) -> None:
    text = unforeseen(error)
    assert part in text
    assert "\n" not in text


def test_the_command_line_catches_what_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr("convrewrite.rules.builtin_rules", fail)
    ran = call("rules", "list")
    assert ran.code == 3
    assert re.fullmatch(rf"convrewrite: {FAULT} \(ZeroDivisionError: one\); set CONVREWRITE_TRACEBACK=1 .*\n", ran.err)
    monkeypatch.setenv("CONVREWRITE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        call("rules", "list")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is one of Linux")
def test_a_limited_process_gets_an_error_and_not_the_machine() -> None:
    assert machine.memory_bytes() >= 1 << 28
    program = (
        "from convrewrite import machine; machine.limit_memory(1 << 28)\n"
        "try: bytearray(1 << 30)\nexcept MemoryError: print('refused')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "refused\n"
