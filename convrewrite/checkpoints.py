"""Model files -> Python objects, without running the file's code.

A pickle is a program. :func:`read_checkpoint` reads it with PyTorch's ``weights_only`` unpickler, which builds nothing
but tensors and what an allow-list names, and computes that list from the names the file asks for: network classes of
torch, torchvision, timm and this package, classes the user named, and a few plain values. The list is closed: a hostile
file can call what is on it, with arguments of its own, and the model can call it again in its forward pass. Everything
else is refused, unless the caller trusts the file.
"""

import dataclasses
import functools
import importlib
import pickletools
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError
from convrewrite.pickle_scan import HarmfulFile, require_harmless

TRUST_NOTE = "the file was loaded by executing the code it holds, as --trust allows"

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first before PyTorch 1.6
_NAMES_SHOWN = 4

# Modules whose classes may be built. A file can make us import modules below these, so nothing else may stand here.
_CLASS_HOMES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "convrewrite.conv",
    "convrewrite.layers",
)
_ACTIVATIONS = (
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid",
    "mish", "normalize", "relu", "relu6", "selu", "sigmoid", "silu", "softmax", "softplus", "tanh",
)  # fmt: skip
_PLAIN: dict[str, Any] = {
    "builtins.frozenset": frozenset,
    "builtins.range": range,
    "builtins.slice": slice,
    "collections.defaultdict": defaultdict,
    "functools.partial": functools.partial,
    "torch._C._nn.gelu": nn.functional.gelu,
    "torch.nn.parallel.data_parallel.DataParallel": nn.DataParallel,
    **{f"torch.nn.functional.{name}": getattr(nn.functional, name) for name in _ACTIVATIONS},
}
_NEVER = (torch.fx.GraphModule, torch.jit.ScriptModule)


def read_checkpoint(path: Path, *, classes: Mapping[str, type], trust: bool) -> tuple[object, tuple[str, ...]]:
    """The object a ``torch.save`` file holds, on the CPU, or an exported program; and notes on how it was read.

    ``classes`` maps names a file may ask for to classes the user vouches for. With ``trust`` a file that is refused
    otherwise is loaded by executing its code; an exported ``.pt2`` program needs it always. Raises
    :class:`ModelLoadError`.
    """
    members = _archive_members(path)
    if path.suffix.lower() == ".pt2" or _is_program(members):
        return _read_program(path, trust)
    if members is None:
        return _read_legacy(path, trust)
    if any(name.endswith("/constants.pkl") for name in members):
        raise ModelLoadError(
            f"{path}: expected a pickled nn.Module or a state dict, found a TorchScript archive, which PyTorch cannot "
            "turn back into modules; save torch.jit.load(FILE).state_dict() and pass --factory with the Python class"
        )
    if not any(name.endswith("/data.pkl") for name in members):
        raise ModelLoadError(
            f"{path}: expected a file written by torch.save, found a zip archive without data.pkl "
            f"({shown(members) or 'empty'}); give the .pt file itself"
        )
    return _read_archive(path, classes, trust)


def read_safetensors(path: Path) -> object:
    """The tensors of a safetensors file by name; the format holds no code. Raises :class:`ModelLoadError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"{path}: expected a safetensors file, found a damaged or truncated one ({summary(error)}); "
            "save or download it again"
        ) from error


def fault_of(tensor: Tensor) -> str:
    """What makes a parameter or buffer unusable, and what to do; empty if nothing does."""
    if is_lazy(tensor):
        return "not yet initialised (a lazy module); run the model once before it is saved or returned"
    if tensor.is_meta:
        return "on the meta device, which has no values; load the weights before the model is saved or returned"
    if not tensor.is_floating_point():
        return ""
    if tensor.dtype.itemsize == 1:
        return f"of type {tensor.dtype}; convert the model with model.float()"
    if torch.isnan(tensor).any():
        return "with NaN in it; use a checkpoint from before the training diverged"
    # Buffers may hold infinity on purpose: attention masks do.
    if isinstance(tensor, nn.Parameter) and torch.isinf(tensor).any():
        return "with infinity in it; use a checkpoint from before the training diverged"
    return ""


def is_lazy(tensor: Tensor) -> bool:
    """Whether a lazy module has not yet given this tensor a shape."""
    return isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)


def _archive_members(path: Path) -> list[str] | None:
    """The names in a zip archive; None if the file is no zip."""
    with path.open("rb") as file:
        if not file.read(4).startswith(b"PK"):
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # a foreign file can make the reader fail in any way
        raise _unreadable(path, error) from error


def _is_program(members: list[str] | None) -> bool:
    return any(
        name.endswith(("/archive_format", "serialized_exported_program.json")) or "/models/" in name
        for name in members or ()
    )


def _read_program(path: Path, trust: bool) -> tuple[object, tuple[str, ...]]:
    if not trust:
        raise ModelLoadError(
            f"{path}: expected a file that can be read without running code, found an exported program (.pt2): "
            "torch.export.load can execute code hidden in one; pass --trust if you know where it comes from, "
            "or give a state dict and --factory"
        )
    try:
        return torch.export.load(path), (TRUST_NOTE,)
    except Exception as error:  # a foreign file can make the reader fail in any way
        raise _unreadable(path, error) from error


def _read_archive(path: Path, classes: Mapping[str, type], trust: bool) -> tuple[object, tuple[str, ...]]:
    try:
        require_harmless(path, lambda name: _resolve(name, classes))
        asked = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        found = {name: _resolve(name, classes) for name in asked}
        refused = sorted(name for name, value in found.items() if value is None)
        if not refused:
            allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (value, name) for name, value in found.items() if value is not None
            ]
            with torch.serialization.safe_globals(allowed):
                return _torch_load(path, weights_only=True), ()
    except Exception as error:  # a foreign file can make the reader fail in any way
        if not trust:
            raise _unreadable(path, error) from error
    else:
        if not trust:
            raise _refusal(path, refused)
    return _read_trusted(path)


def _read_legacy(path: Path, trust: bool) -> tuple[object, tuple[str, ...]]:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_MAGIC))
    if start != _LEGACY_MAGIC:
        raise ModelLoadError(
            f"{path}: expected a file written by torch.save or safetensors, found one that begins with {start!r}; "
            "save the model with torch.save(model.state_dict(), FILE)"
        )
    try:
        require_harmless(path)
        return _torch_load(path, weights_only=True), ()
    except Exception as error:  # a foreign file can make the reader fail in any way
        if trust:
            return _read_trusted(path)
        names = _names_asked_by_legacy(path)
        if not names or isinstance(error, HarmfulFile):
            raise _unreadable(path, error) from error
        raise ModelLoadError(
            f"{path}: expected a state dict, found a file in the old, non-zip format that asks for {shown(names)}; "
            "whole modules in this format can only be loaded with --trust, which executes the file's code; "
            "or save a state dict and pass --factory"
        ) from error


def _read_trusted(path: Path) -> tuple[object, tuple[str, ...]]:
    try:
        return _torch_load(path, weights_only=False), (TRUST_NOTE,)
    except Exception as error:  # trusted code can fail in any way
        raise _unreadable(path, error) from error


def _torch_load(path: Path, *, weights_only: bool) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on pickle protocols and old storages: nothing the user could act upon
        loaded: object = torch.load(path, map_location="cpu", weights_only=weights_only)
    return loaded


def _resolve(name: str, classes: Mapping[str, type]) -> Any | None:
    """What a file gets for a name it asks for; None if it must not have it."""
    if name in classes:
        return classes[name]
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _NUMPY:
        return _NUMPY[name]
    if re.fullmatch(r"torch\.nn\.init\.[a-z]\w*", name):
        function = getattr(nn.init, name.rpartition(".")[2], None)
        return function if isinstance(function, FunctionType) and function.__module__ == "torch.nn.init" else None
    return _network_class(name)


def _network_class(name: str) -> type | None:
    """A class of a known network library, under its present or a former name."""
    home, _, attribute = name.rpartition(".")
    if not _is_at_home(home) or not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII):
        return None
    try:
        found = getattr(importlib.import_module(home), attribute, None)
    except Exception:  # not installed, without such a module, or broken: in any case there is no such class
        return None
    return found if _may_be_built(found) and _is_at_home(found.__module__) else None


def _is_at_home(module: str) -> bool:
    return any(module == home or module.startswith(home + ".") for home in _CLASS_HOMES)


def runs_no_stored_code(candidate: object) -> TypeGuard[type]:
    """Whether this is a class, and none whose instances execute source text or bytecode from the file."""
    return isinstance(candidate, type) and not issubclass(candidate, _NEVER)


def _may_be_built(candidate: object) -> bool:
    """Whether a file may make instances: layers without stored code, enumerations, and records."""
    if not runs_no_stored_code(candidate):
        return False
    is_record = dataclasses.is_dataclass(candidate) or (issubclass(candidate, tuple) and hasattr(candidate, "_fields"))
    return is_record or issubclass(candidate, nn.Module | Enum)


def _names_asked_by_legacy(path: Path) -> list[str]:
    """Classes and functions a state dict does not need, from the four leading pickles, read without running them."""
    names: set[str] = set()
    # A broken rest is no matter: what was found before it is worth telling.
    with path.open("rb") as file, suppress(Exception):
        for _ in range(4):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.add(str(argument).replace(" ", "."))
    usual = ("collections.OrderedDict", "torch._utils.")
    return sorted(name for name in names if not name.startswith(usual) and not name.endswith("Storage"))


def _refusal(path: Path, refused: list[str]) -> ModelLoadError:
    if any("quantized" in name.split(".") for name in refused):
        return ModelLoadError(
            f"{path}: expected a floating-point model, found a quantized one (it asks for {shown(refused)}); "
            "optimise the float model, then quantize the result"
        )
    return ModelLoadError(
        f"{path}: expected a state dict or a model of torch, torchvision or timm layers, found a file that asks for "
        f"{shown(refused)}; pass --factory FILE.py:NAME naming the code that defines these classes, or save a state "
        "dict and pass --factory, or pass --trust, which loads it anyway by executing the file's code"
    )


def _unreadable(path: Path, error: Exception) -> ModelLoadError:
    if isinstance(error, HarmfulFile):
        return ModelLoadError(f"{path}: expected a model as torch.save writes it, found a file that is not: {error}")
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # without torch's advice to trust the file
    reason = reason.splitlines()[0][:200] if reason else "no reason given"
    return ModelLoadError(
        f"{path}: expected a complete model file, found one that is damaged, truncated or of an unknown layout "
        f"({type(error).__name__}: {reason}); save it again with torch.save(model.state_dict(), FILE)"
    )


def shown(names: list[str]) -> str:
    """The first few names, and how many follow."""
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def summary(error: BaseException | None) -> str:
    """Type and first line of an error, for a message of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class _StoredDtype:
    """Stands in for ``numpy.dtype`` in a file: numbers only.

    The real one takes a state that declares any bytes to be object references, which hands a hostile file the memory
    of this process.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        del align, copy  # part of the stored call, without meaning for numbers
        if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code, re.ASCII):
            raise ValueError(f"numpy dtype {code!r} is not a number type")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
            raise ValueError("a numpy dtype with fields or sub-arrays is not a number type")
        self.numpy = self.numpy.newbyteorder(state[1])


class _StoredArray(np.ndarray[Any, np.dtype[Any]]):
    """Stands in for ``numpy.ndarray`` in a file: numbers only; it is pickled as a plain array again."""

    def __new__(cls) -> "_StoredArray":
        return super().__new__(cls, (0,))

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran_order, data = state
        if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes):
            raise ValueError("expected an array of numbers")
        stored: Any = (1, shape, dtype.numpy, bool(fortran_order), data)
        super().__setstate__(stored)

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


def _stored_array(kind: object, shape: object, code: object) -> _StoredArray:
    """Stands in for numpy's ``_reconstruct``: an empty array, which takes its content from the state that follows."""
    del kind, shape, code
    return _StoredArray()


def _stored_scalar(dtype: object, data: object) -> Any:
    """Stands in for numpy's ``scalar``: one number from its bytes."""
    if not isinstance(dtype, _StoredDtype) or not isinstance(data, bytes):
        raise ValueError("expected a number")
    return np.frombuffer(data, dtype.numpy)[0]


_NUMPY: dict[str, Any] = {
    "numpy.dtype": _StoredDtype,
    "numpy.ndarray": _StoredArray,
    **{f"numpy.{core}.multiarray._reconstruct": _stored_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _stored_scalar for core in ("core", "_core")},
}
