"""Scripts as a user runs them, each in a process of its own: forked from one that has imported what takes every one seconds.

As a script it is that process: it reads one order a line from its input, and answers with what came of it.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a script ended, and what it printed."""

    code: int
    out: str
    err: str


class Scripts:
    """The process that scripts are forked from. What they time takes what its MACs ask, and their fits
    take few iterations, as in the tests themselves."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, script: Path | str, *arguments: object, folder: Path) -> Ended:
        """``python script arguments`` in a working folder, or ``python -m`` and the name of a module."""
        order = {"script": str(script), "arguments": [str(argument) for argument in arguments], "folder": str(folder)}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))


@contextmanager
def scripts() -> Iterator[Scripts]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Scripts(process)


def serve() -> None:
    import gc

    import torch
    from clocks import NeverSlower
    from short_fits import short_fits

    from convrewrite import pipeline, runtime
    from convrewrite.fitting import stages

    assert pipeline
    torch.set_num_threads(1)  # before a fork there may be no threads but one
    _export_once()
    runtime.THIS_MACHINE = NeverSlower()
    stages._minimise = short_fits(stages._minimise)
    gc.collect()
    gc.freeze()  # what is imported is no garbage in any child
    for line in sys.stdin:
        with TemporaryFile() as out, TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os._exit(_ran(**json.loads(line)))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps({"code": code, "out": _text(out), "err": _text(err)}), flush=True)


def _export_once() -> None:
    """The first export of a process imports and builds for seconds."""
    import torch

    from convrewrite.runtime import export

    with suppress(ImportError):  # where it is installed, the exporter shows bars by it, whose monitor is a thread
        importlib.import_module("tqdm").tqdm.monitor_interval = 0
    with TemporaryDirectory() as folder:
        export(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2), Path(folder) / "one.onnx")


def _ran(script: str, arguments: list[str], folder: str) -> int:
    """The child: the script, as Python would start it."""
    import runpy

    os.chdir(folder)
    is_file = script.endswith(".py")
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent) if is_file else folder
    code = 0
    try:
        (runpy.run_path if is_file else runpy.run_module)(script, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    serve()
