"""Model files -> Python objects, without running the file's code.

A pickle is a program. :func:`read_checkpoint` says what a file may ask for by name: network classes of torch, torchvision, timm,
ultralytics and this package, classes the user named, and a few plain values. :mod:`convrewrite.stored.unpickling` then reads the
file, and lets it do with these only what saving a model does. Everything else is refused, unless the caller trusts the file.
"""

import dataclasses
import functools
import importlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError
from convrewrite.escaping import first_line, printable, summary
from convrewrite.process import no_warnings, quiet
from convrewrite.stored import (
    LEGACY_MAGIC,
    NUMPY,
    ExcessiveError,
    ForbiddenError,
    ForbiddenNameError,
    InstancesOnly,
    is_base,
    names_asked,
    read_pickle,
)
from convrewrite.values import some_of

TRUST_NOTE = "the file was loaded by executing the code it holds, as --trust allows"

# Most names in a refusal, and most letters of each: the file chose them.
_NAMES_SHOWN, _NAME_SHOWN = 4, 200

_QUANTIZED = "torch._utils._rebuild_qtensor"


# Modules whose classes may be built. A file can make us import modules below these, so nothing else may stand here.
_CLASS_HOMES = (
    "torch.nn.modules",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
    "ultralytics.nn.modules",
    "ultralytics.nn.tasks",
    "convrewrite.conv",
    "convrewrite.layers",
)
_ACTIVATIONS = (
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid",
    "mish", "normalize", "relu", "relu6", "selu", "sigmoid", "silu", "softmax", "softplus", "tanh",
)  # fmt: skip
_PLAIN: dict[str, Any] = {
    "functools.partial": functools.partial,
    "torch._C._nn.gelu": nn.functional.gelu,
    "torch.nn.parallel.data_parallel.DataParallel": nn.DataParallel,
    **{f"torch.nn.functional.{name}": getattr(nn.functional, name) for name in _ACTIVATIONS},
}

_RUNS_TEXT = "ultralytics."
"""Beginning of the homes of classes whose constructors evaluate text of their arguments, as the activation of a network's
description, or fetch weights. A file can have a layer call a class that the layer keeps, with arguments bound by the file."""

_NAMESPACES = ("ultralytics.utils.IterableSimpleNamespace",)
"""Records of a trainer's settings on a network: ultralytics leaves one on a network that is still being trained."""

_FOLLOWING = {"_features_fx", "features_fx", "fx_features", "feature_extraction"}
"""Modules of the zoos whose classes trace a model when they are made, and so compile code with the names of its parts."""

_NEVER = (torch.fx.GraphModule, torch.jit.ScriptModule)


def read_checkpoint(path: Path, *, classes: Mapping[str, type], trust: bool) -> tuple[object, tuple[str, ...]]:
    """The object a ``torch.save`` file holds, on the CPU, or an exported program; and notes on how it was read.

    ``classes`` maps names a file may ask for to classes the user vouches for. With ``trust`` a file that is refused
    otherwise is loaded by executing its code; an exported ``.pt2`` program always needs it. Raises
    :class:`ModelLoadError`.
    """
    members = _archive_members(path)
    if path.suffix.lower() == ".pt2" or _is_program(members):
        return _read_program(path, trust)
    if members is None:
        _require_legacy(path)
        return _read_pickle(path, classes, trust)
    if any(name.endswith("/constants.pkl") for name in members):
        raise ModelLoadError(
            f"{path}: expected a pickled nn.Module or a state dict, found a TorchScript archive, which PyTorch cannot "
            "turn back into modules; save torch.jit.load(FILE).state_dict() and pass --factory with the Python class"
        )
    if not any(name.endswith("/data.pkl") for name in members):
        raise ModelLoadError(
            f"{path}: expected a file written by torch.save, found a zip archive without data.pkl "
            f"({listed(members) or 'empty'}); give the .pt file itself"
        )
    return _read_pickle(path, classes, trust)


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


def is_quantized_home(name: str) -> bool:
    """Whether a dotted name is that of torch's quantised layers; anyone else may call a module so."""
    first, *others = name.split(".")
    return first == "torch" and "quantized" in others


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
        with quiet(("torch.export", "torch._export", "torch.export.pt2_archive._package")):
            return torch.export.load(path), (TRUST_NOTE,)
    except Exception as error:  # a foreign file can make the reader fail in any way
        raise _unreadable(path, error) from error


def _read_pickle(path: Path, classes: Mapping[str, type], trust: bool) -> tuple[object, tuple[str, ...]]:
    try:
        return read_pickle(path, lambda name: _resolve(name, classes), (*classes.values(), *NUMPY.values())), ()
    except Exception as error:  # a foreign file can make the reader fail in any way
        if not trust:
            raise _refused(path, error, classes) from error
    return _read_trusted(path)


def _refused(path: Path, error: Exception, classes: Mapping[str, type]) -> ModelLoadError:
    if isinstance(error, ForbiddenNameError):
        others = [
            name[:_NAME_SHOWN] for name in names_asked(path) if not is_base(name) and _resolve(name, classes) is None
        ]
        return _refusal(path, others or [str(error).removeprefix("it asks for ")[:_NAME_SHOWN]])
    if isinstance(error, ForbiddenError):
        return ModelLoadError(
            f"{path}: expected a model as torch.save stores it, found a file that may run code: {error}; "
            "save a state dict and pass --factory, or pass --trust if you know where the file comes from"
        )
    return _unreadable(path, error)


def _require_legacy(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(LEGACY_MAGIC))
    if start != LEGACY_MAGIC:
        raise ModelLoadError(
            f"{path}: expected a file written by torch.save or safetensors, found one that begins with {start!r}; "
            "save the whole model with torch.save(model, FILE), or its state dict, and pass --factory FILE.py:NAME"
        )


def _read_trusted(path: Path) -> tuple[object, tuple[str, ...]]:
    try:
        with no_warnings():  # on pickle protocols and old storages: nothing the user could act upon
            return torch.load(path, map_location="cpu", pickle_module=pickle, weights_only=False), (TRUST_NOTE,)
    except Exception as error:  # trusted code can fail in any way
        raise _unreadable(path, error) from error


def _resolve(name: str, classes: Mapping[str, type]) -> Any | None:
    """What a file gets for a name it asks for; None if it must not have it."""
    if name in classes:
        return _as_filled(classes[name])
    if name in _PLAIN:
        return _PLAIN[name]
    if name in NUMPY:
        return NUMPY[name]
    if re.fullmatch(r"torch\.nn\.init\.[a-z]\w*", name):
        function = getattr(nn.init, name.rpartition(".")[2], None)
        return function if isinstance(function, FunctionType) and function.__module__ == "torch.nn.init" else None
    return _namespace(name) if name in _NAMESPACES else _as_filled(_network_class(name))


def _as_filled(found: type | None) -> type | InstancesOnly | None:
    """A class as a file gets it: itself, or only its instances."""
    if found is None or not issubclass(found, nn.Module):
        return found
    runs_text = any(base.__module__.startswith(_RUNS_TEXT) for base in found.__mro__)
    return InstancesOnly(found) if runs_text else found


def _network_class(name: str) -> type | None:
    """A class of a known network library, under its present or a former name."""
    home = name.rpartition(".")[0]
    if not _is_at_home(home) or _FOLLOWING & set(home.split(".")) or not re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII):
        return None
    found = _imported(name)
    usable = _may_be_built(found) and _is_at_home(found.__module__)
    return found if usable and not _FOLLOWING & set(found.__module__.split(".")) else None


def _namespace(name: str) -> type | None:
    found = _imported(name)
    return found if isinstance(found, type) and issubclass(found, SimpleNamespace) else None


def _imported(name: str) -> Any:
    home, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(home), attribute, None)
    except Exception:  # not installed, without such a module, or broken: in any case there is no such class
        return None


def _is_at_home(module: str) -> bool:
    return any(module == home or module.startswith(home + ".") for home in _CLASS_HOMES)


def runs_no_stored_code(candidate: object) -> TypeGuard[type]:
    """Whether this is a class whose instances do not execute source text or bytecode from the file."""
    return isinstance(candidate, type) and not issubclass(candidate, _NEVER)


def _may_be_built(candidate: object) -> bool:
    """Whether a file may make instances: layers without stored code, enumerations, and records."""
    if not runs_no_stored_code(candidate):
        return False
    is_record = dataclasses.is_dataclass(candidate) or (issubclass(candidate, tuple) and hasattr(candidate, "_fields"))
    return is_record or issubclass(candidate, nn.Module | Enum)


def _refusal(path: Path, refused: list[str]) -> ModelLoadError:
    if any(name == _QUANTIZED or is_quantized_home(name) for name in refused):
        return ModelLoadError(
            f"{path}: expected a floating-point model, found a quantized one (it asks for {listed(refused)}); "
            "optimise the float model, then quantize the result"
        )
    return ModelLoadError(
        f"{path}: expected a state dict or a model of torch, torchvision, timm or ultralytics layers, found a file that asks for "
        f"{listed(refused)}; pass --factory FILE.py:NAME naming the code that defines these classes, or save a state "
        "dict and pass --factory, or pass --trust, which loads it anyway by executing the file's code"
    )


def _unreadable(path: Path, error: Exception) -> ModelLoadError:
    if isinstance(error, ExcessiveError):
        return ModelLoadError(f"{path}: expected a model as torch.save writes it, found a file that is not: {error}")
    reason = first_line(error, 200)
    if isinstance(error, ImportError) or "Can't get attribute" in reason:
        return ModelLoadError(
            f"{path}: expected a model whose code is at hand, found that some of it is not ({reason}); pass --factory "
            "FILE.py:NAME naming that code, or put its folder into PYTHONPATH, or save a state dict and pass --factory"
        )
    return ModelLoadError(
        f"{path}: expected a complete model file, found one that is damaged, truncated or of an unknown layout "
        f"({summary(error)}); save it again with torch.save(model.state_dict(), FILE)"
    )


def listed(names: list[str]) -> str:
    """The first few names, and how many follow."""
    return some_of([printable(name) for name in names], _NAMES_SHOWN)
