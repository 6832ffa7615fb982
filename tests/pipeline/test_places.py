"""Where results and plans may be put, and what is never replaced by them."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from commands import INPUT, call, listing, small_network

from convrewrite.errors import UsageError
from convrewrite.results.folder import check_file, check_writable, save_plan
from convrewrite.results.reading import read_plan

OPTIONS = (*INPUT, "--calib", "weights", "--no-onnx")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.save(small_network(), tmp_path / "net.pt")
    return tmp_path


@pytest.fixture
def out(place: Path) -> Path:
    assert call("optimize", place / "net.pt", "-o", place / "out", *OPTIONS).code == 0
    return place / "out"


def test_a_model_that_stands_alone_is_not_taken_for_a_result(place: Path) -> None:
    (place / "model").mkdir()
    (place / "net.pt").rename(place / "model" / "model.pt")
    before = (place / "model" / "model.pt").read_bytes()
    ran = call("optimize", place / "model" / "model.pt", "-o", place / "model", *OPTIONS)
    assert (ran.code, ran.message) == (
        2,
        f"{place / 'model'}: holds model.pt, which would be lost; name a new folder, or an earlier result",
    )
    assert (place / "model" / "model.pt").read_bytes() == before


def test_a_result_that_is_rewritten_again_is_kept(out: Path) -> None:
    before = (out / "model.pt").read_bytes()
    for model in (out / "model.pt", out / ".." / "out" / "model.pt"):
        ran = call("optimize", model, "-o", out, *OPTIONS)
        assert (ran.code, ran.message) == (
            2,
            f"{out}: holds {model}, which this run reads and would replace; name another folder with -o",
        )
    assert (out / "model.pt").read_bytes() == before


def test_a_result_is_applied_over_itself(out: Path, place: Path) -> None:
    weights = (out / "weights.safetensors").read_bytes()
    ran = call("apply", place / "net.pt", out / "plan.json", "-o", out, *OPTIONS)
    assert ran.code == 0, ran.err
    assert (out / "weights.safetensors").read_bytes() == weights
    assert {path.name for path in place.iterdir()} == {"net.pt", "out"}


def test_a_link_stays_one(out: Path, place: Path) -> None:
    (place / "link").symlink_to(out)
    (out / "report.md").write_text("an earlier one")
    assert call("optimize", place / "net.pt", "-o", place / "link", *OPTIONS).code == 0
    assert (place / "link").is_symlink()
    assert (out / "report.md").read_text() != "an earlier one"
    (place / "plan").symlink_to("real.json")
    (place / "real.json").write_text("")
    assert call("plan", place / "net.pt", "-o", place / "plan", *OPTIONS).code == 0
    assert (place / "plan").is_symlink()
    assert (place / "real.json").stat().st_size > 0
    assert {path.name for path in place.iterdir()} == {"net.pt", "out", "link", "plan", "real.json"}


def test_the_working_folder_is_not_pulled_away(out: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out)
    for name in (".", str(out), "../out"):
        ran = call("optimize", place / "net.pt", "-o", name, *OPTIONS)
        assert ran.code == 2
        assert "a folder that is mounted, or worked in, cannot be replaced; name one inside it" in ran.message


def test_a_mounted_folder(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(UsageError, match="a folder that is mounted"):
            check_writable(tmp_path)
        check_writable(tmp_path / "inside")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "nul\0byte", "broken", "file/below"])
def test_names_that_cannot_be(place: Path, name: str) -> None:
    (place / "broken").symlink_to("nowhere")
    (place / "file").touch()
    before = listing(place)
    for check in (check_writable, check_file):
        with pytest.raises(UsageError, match=r"cannot be written|is a link to nowhere"):
            check(place / name)
    assert listing(place) == before


@pytest.mark.parametrize("name", ["net.pt", "notes.md", "report.json", "pipe"])
def test_a_plan_replaces_nothing_but_a_plan(place: Path, out: Path, name: str) -> None:
    (place / "notes.md").write_text("mine")
    (place / "report.json").write_bytes((out / "report.json").read_bytes())
    os.mkfifo(place / "pipe")  # and no device: whoever is root would lose one of the machine's if this failed
    before = (place / name).stat()
    ran = call("plan", place / "net.pt", "-o", place / name, *OPTIONS)
    found = "holds something else than a plan, which would be lost; name another file with -o"
    if name == "pipe":
        found = "expected a file for the plan, found a pipe or a device; name a file with -o"
    assert (ran.code, ran.message) == (2, f"{place / name}: {found}")
    after = (place / name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_earlier_plan_is_replaced(place: Path, out: Path) -> None:
    for text in ("", (out / "plan.json").read_text(), (out / "plan.json").read_text()[:300]):
        (place / "plan.json").write_text(text)
        check_file(place / "plan.json")
        save_plan(read_plan(out / "plan.json"), place / "plan.json")
        assert read_plan(place / "plan.json") == read_plan(out / "plan.json")
