"""onnxruntime sessions, and what a child process does to try out a file from elsewhere. torch is not imported here."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from convrewrite.escaping import one_line
from convrewrite.machine import end_with_parent, limit_memory, limit_processor
from convrewrite.targets import session_options

LONGEST = 400
"""Most characters of an error that are shown."""


def open_session(source: Path | bytes, threads: int = 1, folder: Path | None = None) -> ort.InferenceSession:
    """An onnxruntime session on the CPU, all graph optimisations on. ``folder``: where the weights of a model given as bytes
    lie."""
    options = session_options(threads)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(
        source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
    )


def try_out(path: str, seconds: int, memory: int, folder: str | None = None) -> None:
    """Open a file, run it on the arrays that come in as ``.npz`` if any do, and write ``{"fault": ...}`` as JSON.

    ``folder`` is where its weights lie if not beside it. Called in a process of its own, which may hang, crash, or be stopped.
    """
    end_with_parent()
    limit_memory(memory, address_space=True)
    limit_processor(seconds)
    json.dump({"fault": _fault_of(path, sys.stdin.buffer.read(), folder)}, sys.stdout)
    sys.stdout.flush()


def shortened(text: str) -> str:
    """Both ends of an error of onnxruntime: the place comes first, and the cause last."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 3]} ... {text[-half:]}"


def _fault_of(path: str, feed: bytes, folder: str | None) -> str | None:
    try:
        source = Path(path) if folder is None else Path(path).read_bytes()
        session = open_session(source, folder=None if folder is None else Path(folder))
        if feed:
            with np.load(io.BytesIO(feed), allow_pickle=False) as arrays:
                inputs: dict[str, Any] = {
                    entry.name: arrays[f"input.{index}"] for index, entry in enumerate(session.get_inputs())
                }
            session.run(None, inputs)
    except MemoryError:
        return "it ran out of memory"
    except Exception as error:  # onnxruntime's own exceptions share no public base class
        return shortened(one_line(error))
    return None
