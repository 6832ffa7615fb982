"""Labels, where a training is given any: one whole number for each input, in the order of the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from convrewrite.calibration.sources import LABEL_NAMES
from convrewrite.errors import CalibrationError, ConvRewriteError, UsageError
from convrewrite.escaping import summary
from convrewrite.stored import Archive, map_array, read_pickle


def read_labels(path: Path, memory: int) -> Tensor:
    """``(N,)`` int64 from an ``.npy`` or ``.pt``, or from the array of an ``.npz`` that is called like labels.

    Raises CalibrationError for a file that is missing, or holds no such numbers.
    """
    if not path.is_file():
        kind = "regular" if path.exists() else "such"
        raise CalibrationError(f"{path}: expected labels (.npy, .npz or .pt), found no {kind} file")
    try:
        values = _as_tensor(_found(path, memory))
    except ConvRewriteError:
        raise
    except Exception as error:  # whatever a broken file makes a reader raise
        raise CalibrationError(
            f"{path}: expected labels, but reading it raised {summary(error)}; save it again"
        ) from error
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise CalibrationError(
            f"{path}: expected one whole number for each input, (N,), found {values.dtype} {tuple(values.shape)}"
        )
    return values.long()


def require_order(data: object) -> None:
    """Raise UsageError for a loader that shuffles: no labels are in the order of its inputs."""
    sampler = getattr(data, "sampler", None)
    if isinstance(data, DataLoader) and isinstance(
        sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler
    ):
        raise UsageError(
            f"labels: expected inputs that come in the order of the labels, found a DataLoader with a {type(sampler).__name__}; "
            "make one that does not shuffle"
        )


def _found(path: Path, memory: int) -> Any:
    if path.suffix.lower() == ".npy":
        return map_array(path)
    if path.suffix.lower() in (".pt", ".pth"):
        found = read_pickle(path)
        return _named(found, path) if isinstance(found, Mapping) else found
    if path.suffix.lower() == ".npz":
        array = _named(Archive(path, memory), path)
        return array[range(array.shape[0])] if array.shape else np.empty((), array.dtype)
    raise CalibrationError(f"{path}: expected labels as .npy, .npz or .pt, found {path.suffix or 'no suffix'}")


def _as_tensor(found: Any) -> Tensor:
    """Torch knows only the machine's own byte order."""
    if isinstance(found, Tensor):
        return found
    array = np.array(found)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _named(arrays: Mapping[Any, Any], path: Path) -> Any:
    names = [name for name in arrays if str(name).lower() in LABEL_NAMES]
    if len(names) != 1:
        raise CalibrationError(
            f"{path}: expected one array called {', '.join(sorted(LABEL_NAMES))}, found {len(names)}; give it as .npy"
        )
    return arrays[names[0]]
