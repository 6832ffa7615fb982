"""ONNX files from elsewhere are tried out in a process of their own before they are used in this one.

A graph can loop for ever, also while onnxruntime folds its constants, ask for more memory than there is, or crash the
runtime. None of these can be caught here, so a child without torch opens the file, and later runs it once on the same
inputs, under a limit of time and one of memory.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from convrewrite.errors import ModelLoadError
from convrewrite.machine import memory_bytes

SESSIONS = Path(__file__).with_name("sessions.py")
"""Module that is run as a file of its own: the face of this wing would import torch."""

OF_MEMORY = re.compile("allocat|bad_alloc|out of memory", re.IGNORECASE)
"""What onnxruntime says where memory did not suffice."""

ADVICE = (
    (OF_MEMORY, "give smaller inputs, or a machine with more memory; else export it again, for smaller inputs"),
    (
        re.compile("Numpy type"),
        "let its outputs be float32, or of another type that numpy has: onnxruntime hands over no others",
    ),
    (
        re.compile("external data|external_data", re.IGNORECASE),
        "put the file of its weights where it was, beside the model",
    ),
    (
        re.compile(r"No Op registered|NOT_IMPLEMENTED|Type Error|opset|IR version|ir_version", re.IGNORECASE),
        "export it again with operators and types that this version of onnxruntime has on a processor, as float32 and an older "
        "opset, or install a newer onnxruntime",
    ),
)
"""What onnxruntime says, and what to do about it."""

_PROGRAM = (
    "import runpy, sys; try_out = runpy.run_path(sys.argv[1])['try_out']; "
    "try_out(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] if len(sys.argv) > 5 else None)"
)


def require_well_behaved(
    path: Path,
    seconds: float,
    inputs: Sequence[Tensor] | None = None,
    *,
    memory: int | None = None,
    folder: Path | None = None,
    source: str | None = None,
) -> None:
    """Raise ModelLoadError unless onnxruntime opens the file, and runs it on ``inputs`` where they are given, within the limits.

    The limits are ``seconds`` and bytes of ``memory``, which are half of the machine's if not given. ``folder`` is where its
    weights lie if not beside it; ``source`` what messages call it.
    """
    memory, name = memory or memory_bytes() // 2, source or str(path)
    feed = b"" if inputs is None else _packed(inputs)
    # The package is found where this one was; -P keeps files of the working folder from being imported.
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"}
    # A limit of processor time, a bit longer, ends the child even if this process has ended by then.
    command = [sys.executable, "-P", "-c", _PROGRAM, str(SESSIONS), str(path), str(int(seconds) + 30), str(memory)]
    command += [] if folder is None else [str(folder)]
    deed = "opens" if inputs is None else "runs on these inputs"
    expected = (
        f"{name}: expected an ONNX file that onnxruntime {deed} within {seconds:g} s and {memory} bytes of memory"
    )
    try:
        ran = subprocess.run(
            command, input=feed, capture_output=True, timeout=seconds, check=False, env=environment
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelLoadError(
            f"{expected}, found that it does not end in that time; give it more if it is only slow (--timeout 300, in Python "
            "timeout=300)"
        ) from error
    if ran.returncode != 0:
        raise ModelLoadError(f"{expected}, found that {_ending(ran.returncode)}; export it again")
    fault = json.loads(ran.stdout)["fault"]
    if fault is not None:
        cannot = "cannot open it" if inputs is None else "cannot run it on these inputs"
        limit = f" within {memory} bytes of memory" if OF_MEMORY.search(fault) else ""
        advice = next((text for pattern, text in ADVICE if pattern.search(fault)), "export it again")
        raise ModelLoadError(f"{name}: onnxruntime {cannot}{limit}: {fault}; {advice}")


def _packed(inputs: Sequence[Tensor]) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"input.{index}": x.detach().cpu().numpy() for index, x in enumerate(inputs)}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _ending(code: int) -> str:
    if code >= 0:
        return f"the process that tried it ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"onnxruntime crashed ({name})"
