"""ONNX files are tried out in children of one process that has imported onnxruntime: tests try out hundreds, and an import takes
longer than most of them do.

As a script it is that process: it reads one order a line from its input, the bytes of the inputs behind it, and answers with how
the child ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from convrewrite.onnx_files import sessions

TURN = 0.001
"""Seconds between two looks at whether a child has ended."""


class Probes:
    """What stands in place of :mod:`subprocess` in :mod:`convrewrite.onnx_files.probing`."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self, program: str, process: "subprocess.Popen[bytes]") -> None:
        self._program, self._process = program, process

    def run(self, command: Sequence[str], *, input: bytes, timeout: float, **options: Any) -> Any:
        """As :func:`subprocess.run`; any other program than the usual one is run by that."""
        place = command.index("-c") + 1
        if command[place] != self._program:
            return subprocess.run(command, input=input, timeout=timeout, **options)
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"words": command[place + 2 :], "seconds": timeout, "size": len(input), "folder": os.getcwd()}
        self._process.stdin.write(json.dumps(order).encode() + b"\n" + input)
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        if found["code"] is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, found["code"], found["out"])


@contextmanager
def probes(program: str) -> Iterator[Probes]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Probes(program, process)


def serve(orders: BinaryIO) -> None:
    for line in orders:
        order = json.loads(line)
        with TemporaryFile() as given, TemporaryFile() as out:
            given.write(orders.read(order["size"]))
            given.seek(0)
            child = os.fork()
            if child == 0:
                _try_out(order["words"], order["folder"], given, out)
            code = _waited_for(child, order["seconds"])
            out.seek(0)
            print(json.dumps({"code": code, "out": out.read().decode()}), flush=True)


def _try_out(words: Sequence[str], folder: str, given: Any, out: Any) -> None:
    """The child: what the usual program does with its words."""
    code = 1
    try:
        os.chdir(folder)
        os.dup2(given.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - until the process ends
        path, seconds, memory, *weights = words
        sessions.try_out(path, int(seconds), int(memory), *weights)
        code = 0
    finally:
        os._exit(code)


def _waited_for(child: int, seconds: float) -> int | None:
    """The code that a child ends with; None where it does not in this time, and is ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(TURN)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    serve(sys.stdin.buffer)
