"""Output that nobody reads and streams that are closed: a command says nothing of it, and does what it was asked."""

import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import INPUT, small_network

from convrewrite.cli import main, progress_bars
from convrewrite.cli.entry import NOBODY_READS
from convrewrite.cli.voice import LIBRARY, speaking
from convrewrite.results import read_report

UNREAD = 'set -o pipefail; "$@" | true'
BOTH_UNREAD = 'set -o pipefail; "$@" 2>&1 | true'


def in_shell(line: str, words: tuple[object, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of bash, ``"$@"`` the command, as it is installed."""
    command = [sys.executable, "-m", "convrewrite", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        ["bash", "-c", line, "bash", *command], capture_output=True, text=True, env=environment, cwd=folder
    )


@pytest.mark.parametrize("line", [UNREAD, BOTH_UNREAD])
@pytest.mark.parametrize("words", [("optimize", "--help"), ("--help",)])
def test_what_nobody_reads_ends_a_command_without_a_word(line: str, words: tuple[str, ...], tmp_path: Path) -> None:
    ran = in_shell(line, words, tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (NOBODY_READS, "", "")


def test_an_error_that_nobody_reads_keeps_its_code(tmp_path: Path) -> None:
    ran = in_shell(BOTH_UNREAD, ("analyze", "--nothing-like-it"), tmp_path)
    assert (ran.returncode, ran.stderr) == (2, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_are_no_fault(closed: str, tmp_path: Path) -> None:
    assert in_shell(f'"$@" {closed}', ("--help",), tmp_path).returncode == 0
    ran = in_shell(f'"$@" {closed}', ("analyze", "--nothing-like-it"), tmp_path)
    assert ran.returncode == 2 and "fault of convrewrite" not in ran.stderr


def test_a_result_is_whole_that_was_made_with_all_streams_closed(tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    words = ("optimize", "net.pt", *INPUT, "--calib", "weights", "--no-onnx", "-o", "out")
    assert in_shell('"$@" <&- >&- 2>&-', words, tmp_path).returncode == 0
    assert read_report(tmp_path / "out").sites


class Full(io.StringIO):
    """A stream on a disk without room."""

    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_progress_log_and_errors_that_cannot_be_written_change_no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Full())
    with speaking(quiet=False, verbose=1), progress_bars("fit") as tell:
        tell("fit", 0, 2, "conv1")
        logging.getLogger(f"{LIBRARY}.planning").info("decided")
    assert main(["analyze", "--nothing-like-it"]) == 2


def test_a_disk_that_is_full_is_not_taken_for_that_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a command writes is whole only where it is the output that finds no room."""

    def without_room(_folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("convrewrite.results.read_report", without_room)
    assert main(["report", "out"]) == 2
    assert capsys.readouterr().err.startswith(
        "convrewrite: expected room for what is written, temporary files included"
    )
    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["rules", "list"]) == 2
    assert "standard output: cannot be written (No space left on device); send it" in capsys.readouterr().err
    sys.stdout.close()  # what was put there instead, until the process ends


@pytest.mark.skipif(os.name != "posix", reason="a folder that is worked in cannot be removed elsewhere")
def test_a_working_folder_that_was_removed_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = (
        "import os, sys; from convrewrite.cli.entry import run; "
        "os.rmdir(os.getcwd()); sys.argv = ['convrewrite', 'rules', 'list']; run()"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=gone, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "expected a working folder" in ran.stderr and "(cd)" in ran.stderr
