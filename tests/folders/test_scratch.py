"""Temporary folders: those of living processes stay, those of dead ones go, and nobody else's are touched."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from commands import listing

from convrewrite.errors import ExportError, UsageError
from convrewrite.folders import scratch
from convrewrite.folders.scratch import (
    LOCK,
    Scratch,
    cleared_later,
    disk_full,
    remove_leftovers,
    temporary,
    unwritable,
    write_errors,
)
from convrewrite.interrupts import Terminated, held, signals_raised

HOLDING = """
import sys, pathlib
from convrewrite.folders.scratch import Scratch
made = Scratch(pathlib.Path(sys.argv[1]))
(made.path / "file").write_text("mine")
print(made.path, flush=True)
sys.stdin.read()
"""


def test_a_folder_goes_with_its_object(tmp_path: Path) -> None:
    with Scratch(tmp_path) as made:
        assert listing(tmp_path) == {made.path.name, f"{made.path.name}/{LOCK}"}
        assert made.path.stat().st_mode & 0o777 == 0o700
    forgotten = Scratch(tmp_path)
    assert forgotten.path.is_dir()
    del forgotten
    assert listing(tmp_path) == set()


def test_a_folder_whose_object_outlives_its_modules_goes_in_silence(tmp_path: Path) -> None:
    outliving = "import contextlib, signal, sys, pathlib\nfrom convrewrite.folders.scratch import Scratch\n" + "".join(
        f"{module}.kept = Scratch(pathlib.Path(sys.argv[1]))\n" for module in ("contextlib", "signal", "sys")
    )
    ended = subprocess.run(
        [sys.executable, "-c", outliving, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert ended.stderr == ""
    assert listing(tmp_path) == set()


def test_a_living_process_keeps_its_folder_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        remove_leftovers(tmp_path)
        assert (folder / "file").read_text() == "mine"
        other.kill()
        other.wait()
        assert folder.is_dir()
        with Scratch(tmp_path) as mine:
            assert not folder.exists()
            assert mine.path.is_dir()
    assert listing(tmp_path) == set()


def test_a_fork_does_not_clear_what_is_its_parents(tmp_path: Path) -> None:
    made = Scratch(tmp_path)
    made._entry.process += 1
    made.close()
    assert made.path.is_dir()


def test_what_only_looks_like_one_stays(tmp_path: Path) -> None:
    for name in (
        ".convrewrite-run-mine",
        "convrewrite-run-ABCDEFGH",
        "convrewrite-results",
        ".convrewrite-run-abcdefg1",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".convrewrite-run-aaaaaaaa").symlink_to(tmp_path / "convrewrite-results")
    (tmp_path / ".convrewrite-run-bbbbbbbb").mkdir()  # one whose process was killed before it could lock it
    before = listing(tmp_path)
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == before - {".convrewrite-run-bbbbbbbb"}


def test_a_folder_swept_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = tempfile.mkdtemp, []

    def slow(**named: str) -> str:
        calls.append(real(**named))
        if len(calls) == 1:
            remove_leftovers(tmp_path)
        return calls[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", slow)
    with Scratch(tmp_path) as made:
        assert str(made.path) == calls[1]
        assert not Path(calls[0]).exists()


def test_without_locks_nothing_of_others_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    first, second = Scratch(tmp_path), Scratch(tmp_path)
    assert first.path.is_dir()
    first.close()
    second.close()
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("variable", ["TMPDIR", "TEMP", "TMP"])
def test_the_folder_that_was_named_is_used_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    with temporary() as made:
        assert made.path.parent == tmp_path
    monkeypatch.setenv(variable, str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"missing: cannot be written \(No such file or directory\); .* in TMPDIR"):
        temporary()


def test_no_folder_for_temporary_files_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    def refused(**_where: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(UsageError, match=r"^/tmp: cannot be written \(Read-only file system\); .* in TMPDIR"):
        temporary()


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.ENOSPC, "x"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "x"), errno.EDQUOT),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "x"), None),
        (RuntimeError("unexpected pos"), None),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: Exception, found: int | None) -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = error
    assert disk_full(wrapped) == disk_full(error) == (None if found is None else os.strerror(found))


def test_errors_of_other_kinds_pass(tmp_path: Path) -> None:
    for error in (ExportError("no form"), RuntimeError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)), write_errors(tmp_path):
            raise error
    with (
        pytest.raises(UsageError, match=r"cannot be written \(odd\); name another place"),
        write_errors(tmp_path),
    ):
        raise OSError("odd")


def test_what_lies_in_a_scratch_folder_is_told_by_the_folder_that_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with Scratch(tmp_path) as beside, temporary() as among, Scratch(among.path) as inner:
        for path in (beside.path / "a.onnx", beside.path / "made" / "a.onnx"):
            assert str(unwritable(path, "full")) == f"{tmp_path}: cannot be written (full); name another place"
        for path in (among.path / "a.onnx", inner.path / "made" / "a.onnx"):
            assert str(unwritable(path, "full")).startswith(
                f"{tmp_path / 't'}: cannot be written (full); name another folder for"
            )


# --- interrupts


@pytest.mark.parametrize("failing", [False, True])
def test_ctrl_c_waits_for_the_end(failing: bool) -> None:
    steps = []

    def interrupted() -> None:
        with held(), held():
            signal.raise_signal(signal.SIGINT)
            steps.append("after the signal")
            if failing:
                raise OSError("fails as well")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_a_folder_is_collected_comes_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = scratch._clear

    def interrupted(folder: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        real(folder)

    def collected() -> None:
        made = Scratch(tmp_path)
        monkeypatch.setattr(scratch, "_clear", interrupted)
        del made
        assert listing(tmp_path) == set()
        time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        collected()


def test_within_a_command_nothing_runs_as_a_folder_is_collected(tmp_path: Path) -> None:
    """An interrupt would be lost there, and the command go on."""
    called: list[str] = []
    with cleared_later():
        made = [Scratch(tmp_path)]
        sys.setprofile(lambda _frame, event, _what: called.append(event))
        made.pop()
        sys.setprofile(None)
        assert "call" not in called
        assert len(listing(tmp_path)) == 2
    assert listing(tmp_path) == set()


def test_an_interrupt_as_one_that_waited_is_cleared_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scratch._clear

    def interrupted(folder: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        real(folder)

    with cleared_later():
        path = Scratch(tmp_path).path
        assert path.is_dir()
        with monkeypatch.context() as patched:
            patched.setattr(scratch, "_clear", interrupted)
            with pytest.raises(KeyboardInterrupt):
                Scratch(tmp_path)
        assert not path.exists()
    assert listing(tmp_path) == set()


def test_a_signal_that_would_kill_is_raised_and_can_wait() -> None:
    steps = []
    before = signal.getsignal(signal.SIGTERM)

    def terminated() -> None:
        with signals_raised(), held():
            signal.raise_signal(signal.SIGTERM)
            steps.append("after the signal")

    with pytest.raises(Terminated) as caught:
        terminated()
    assert (steps, caught.value.number) == (["after the signal"], signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raised(), held():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_pipe_in_a_folder_of_such_a_name_does_not_hold_up_a_run(tmp_path: Path) -> None:
    """It may have come with a folder of a stranger's."""
    left = tmp_path / ".convrewrite-run-abcdefgh"
    (left / "earlier").mkdir(parents=True)
    (left / LOCK).touch()
    os.mkfifo(left / "place")
    cleared = threading.Thread(target=remove_leftovers, args=(tmp_path,), daemon=True)
    cleared.start()
    cleared.join(30)
    assert not cleared.is_alive() and listing(tmp_path) == set()


@pytest.mark.parametrize("name", [b"a\0b", b"\xff", b"a" * 10_000, b"", b".."])
def test_a_place_that_no_path_can_have_does_not_end_a_run(tmp_path: Path, name: bytes) -> None:
    """It may have come with a folder of a stranger's."""
    left = tmp_path / ".convrewrite-run-abcdefgh"
    (left / "earlier").mkdir(parents=True)
    (left / LOCK).touch()
    (left / "place").write_bytes(name)
    with Scratch(tmp_path) as made:
        assert made.path.is_dir()
