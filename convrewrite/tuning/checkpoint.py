"""The state of a training in one file, which is written in one step: numbers as safetensors, the rest as JSON in the same file.
Reading it runs no code."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from convrewrite.errors import UsageError
from convrewrite.escaping import one_line
from convrewrite.folders import made_aside, write_errors
from convrewrite.records import Record, first_fault
from convrewrite.tuning.trainable import at_least_single

STATE = "convrewrite.training"
"""Key of the file's metadata that holds the rest; it distinguishes a checkpoint from any other file."""

KINDS = ("now", "best", "average", "first", "second")
"""Prefixes of parameter names: what the parameters hold, what they held at the best, their running average, and Adam's
moments."""


class Point(Record):
    """How far the outputs were from the original's on the held-out inputs after some steps."""

    step: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    effect: Annotated[float, Field(ge=0)]


class Standing(Record):
    """The state of a training without its tensors. ``run`` identifies the training: one of other inputs or another recipe is not
    continued."""

    schema_version: Literal[1] = 1
    run: str
    step: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    curve: Annotated[tuple[Point, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a training; the tensors by the names of the parameters."""

    standing: Standing
    now: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Replace an earlier checkpoint, if any. Raises UsageError where that fails, or where the file is something else."""
        require_place(path)
        tensors = {
            f"{kind}:{name}": tensor.detach().cpu().contiguous()
            for kind in KINDS
            for name, tensor in getattr(self, kind).items()
        }
        with made_aside(path, "another place with -o") as made:
            save_file(tensors, str(made), {STATE: self.standing.model_dump_json()})


def load_checkpoint(path: Path, run: str, parameters: Mapping[str, Tensor]) -> Checkpoint | None:
    """The checkpoint of this very ``run``; None where there is none, or only one of another run.

    Raises UsageError for a file that is not a checkpoint, or a broken one.
    """
    if not path.exists():
        return None
    standing = _standing(path)
    if standing.run != run:
        return None
    with _opened(path) as file:
        keys = set(file.keys())
        named = {kind: _tensors(path, file, keys, kind, parameters) for kind in KINDS}
    return Checkpoint(standing, **named)


def set_aside(path: Path, run: str) -> Standing | None:
    """Make ``path`` the place of this ``run``: the checkpoint of another one gets a name of its own beside it, and that of this
    run, where it was set aside in its turn, comes back. A word of a command that differs must not cost hours of training.

    Returns the standing of what was set aside. Raises UsageError where that fails.
    """
    require_place(path)
    other = _standing(path) if path.exists() else None
    if other is not None and other.run == run:
        return None
    with write_errors(path):
        if other is not None:
            require_place(place_aside(path, other.run))
            os.replace(path, place_aside(path, other.run))
        own = place_aside(path, run)
        if own.exists():
            os.replace(own, path)
    return other


def place_aside(path: Path, run: str) -> Path:
    """Where the checkpoint of a run lies while ``path`` has another one's: each run has a name of its own, and one only."""
    return path.with_name(f"{path.name}.{hashlib.sha256(run.encode()).hexdigest()[:8]}")


def require_place(path: Path) -> None:
    """Raise UsageError where the file exists and is not a checkpoint, and for a name that the file system cannot look up."""
    with write_errors(path):
        exists = path.exists()
    if exists:
        _standing(path)


def _standing(path: Path) -> Standing:
    with _opened(path) as file:
        text = (file.metadata() or {}).get(STATE)
    if text is None:
        raise UsageError(f"{path}: expected a checkpoint of a training, found something else; move it away")
    try:
        standing = Standing.read(text)
    except ValueError as error:
        raise UsageError(f"{path}: {first_fault(error)}; the checkpoint is broken: remove it") from error
    if not all(math.isfinite(point.seconds) for point in standing.curve):
        raise UsageError(f"{path}: curve: expected finite seconds; the checkpoint is broken: remove it")
    return standing


def _opened(path: Path) -> Any:
    if not path.is_file():  # to open a pipe would never end, nor hear of Ctrl-C
        raise UsageError(f"{path}: expected a checkpoint of a training, found no regular file; move it away")
    try:
        return safe_open(str(path), framework="pt")
    except Exception as error:  # the library raises its own errors
        raise UsageError(
            f"{path}: expected a checkpoint of a training, found something else ({one_line(error)}); move it away"
        ) from error


def _tensors(path: Path, file: Any, keys: set[str], kind: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        key = f"{kind}:{name}"
        shape = tuple(file.get_slice(key).get_shape()) if key in keys else None
        if shape != tuple(parameter.shape):
            raise UsageError(
                f"{path}: {key}: expected numbers of shape {tuple(parameter.shape)}, found {shape or 'none'}; the "
                "checkpoint is broken: remove it"
            )
        tensor = file.get_tensor(key)
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{path}: {key}: expected finite numbers; the checkpoint is broken: remove it")
        found[name] = tensor.to(parameter.device, at_least_single(parameter))
    return found


def fingerprint(**facts: object) -> str:
    """Text that identifies a run: the facts by name."""
    return json.dumps(facts, sort_keys=True, default=str)
