"""Commands in processes of their own that are forked from a warm one, so that hundreds can be interrupted in a minute.

As a script it is the warm process: it reads one order a line from its input, forks, ends the child as it was told to, and
answers with what came of it.
"""

import atexit
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from commands import INPUT, small_network

WATCHED = ("open", "os.", "shutil.", "tempfile.", "ctypes.call", "fcntl.")
"""Audit events that are counted: those of the file system."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``code`` is negative for a signal; ``events`` are those of the file system, if it could count."""

    code: int
    err: str
    seconds: float
    events: int

    @property
    def message(self) -> str:
        assert "Traceback" not in self.err, self.err
        assert "Exception ignored" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("convrewrite: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("convrewrite: ")


class Warm:
    """The warm process. ``run`` forks a command from it; ``signal`` ends that, after seconds or at an event's number."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    def run(self, *arguments: object, **order: Any) -> Ended:
        return self.run_all([{"arguments": [str(argument) for argument in arguments], **order}])[0]

    def run_all(self, orders: list[dict[str, Any]]) -> list[Ended]:
        """Several at once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return [Ended(**answer) for answer in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def warm(folder: Path) -> Iterator[Warm]:
    """A warm process whose temporary files and timings lie below ``folder``."""
    (folder / "tmp").mkdir()
    process = Warm({"TMPDIR": str(folder / "tmp"), "CONVREWRITE_CACHE": str(folder / "cache")})
    try:
        yield process
    finally:
        process.close()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up()
    gc.collect()
    gc.freeze()  # what is imported is no garbage in any child
    for line in sys.stdin:
        children = [_Child(order) for order in json.loads(line)]
        print(json.dumps([child.ended() for child in children]), file=answers, flush=True)


def _warm_up() -> None:
    """Import and start all that a command would when it is first needed."""
    from convrewrite.cli import entry

    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "net.pt"
        torch.save(small_network(), network)
        code = entry.main(["optimize", str(network), "-o", f"{folder}/out", *INPUT, "--calib", "weights", "--no-onnx"])
        assert code == 0


class _Child:
    """One forked command."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._read, write = os.pipe()
        self._counted, counter = os.pipe()
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(write, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.close(0)
            _be_command(order, counter)
        os.close(write)
        os.close(counter)

    def ended(self) -> dict[str, Any]:
        err = b""
        killed = self._order.get("after") is None
        while True:
            left = None if killed else max(0.0, self._began + self._order["after"] - time.monotonic())
            if select.select([self._read], [], [], left)[0]:
                part = os.read(self._read, 1 << 16)
                if not part:
                    break
                err += part
            elif not killed:
                os.kill(self.pid, self._order["signal"])
                killed = True
        _, status = os.waitpid(self.pid, 0)
        events = os.read(self._counted, 64)
        os.close(self._read)
        os.close(self._counted)
        return {
            "code": os.waitstatus_to_exitcode(status), "err": err.decode(errors="replace"),
            "seconds": time.monotonic() - self._began, "events": int(events or 0),
        }  # fmt: skip


def _be_command(order: dict[str, Any], counter: int) -> None:
    """The child: the installed command, as it would start."""
    from convrewrite.cli import entry

    if "file_size" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], order["file_size"]))
    os.environ.update(order.get("environment", {}))
    os.chdir(order.get("folder", "."))
    events = [0]

    def count(event: str, _arguments: object) -> None:
        if event.startswith(WATCHED):
            events[0] += 1
            if events[0] == order.get("event"):
                os.kill(os.getpid(), order["signal"])

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(count)
    sys.argv = ["convrewrite", *order["arguments"]]
    code = 1
    try:
        entry.run()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os.write(counter, str(events[0]).encode())
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)  # a fork must not take down the threads that it does not have


if __name__ == "__main__":
    serve()
