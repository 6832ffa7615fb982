"""Files, factories and programs -> an ``nn.Module`` in eval mode, without running code the user did not name.

What a file may contain is decided in :mod:`convrewrite.checkpoints`; here user code is imported, weights are loaded,
and the model is checked. The shape of an example input is guessed here too.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from convrewrite.arguments import shown as shown_value
from convrewrite.checkpoints import (
    fault_of,
    is_lazy,
    read_checkpoint,
    read_safetensors,
    runs_no_stored_code,
    shown,
    summary,
)
from convrewrite.copying import copy_as_it_is
from convrewrite.errors import ModelLoadError, TraceError, UsageError
from convrewrite.names import require_names
from convrewrite.outputs import eval_mode
from convrewrite.programs import rebuild
from convrewrite.state import preserved
from convrewrite.state_dicts import find_weights, load_weights

_ZOOS = ("torchvision", "timm")
_INPUT_SIZES = (224, 32, 28, 64, 128, 256, 299, 512)
_INPUT_LENGTHS = (1024, 128, 256, 512, 4096, 16000)
MOST_NUMBERS = 1 << 26
"""In an input whose shape is given: a volume of 4 x 256 x 256 x 256. What layers make of it takes many times its memory."""
_MOST_AXES = 8
_NEED_FACTORY = (
    "found weights without their network; pass --factory FILE.py:NAME (or pkg.mod:NAME, torchvision:NAME, "
    "timm:NAME), a callable without arguments that returns the network"
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in eval mode, the source the user named, and what was assumed or chosen on the way, a sentence each."""

    model: nn.Module
    source: str
    notes: tuple[str, ...]


def load_model(source: str | Path, *, factory: str | None = None, trust: bool = False) -> Loaded:
    """Load a model from a file (.pt, .pth, .bin, .ckpt, .safetensors, .pt2) or a program.

    A program is ``FILE.py:NAME``, ``pkg.mod:NAME``, ``torchvision:NAME`` or ``timm:NAME``; ``factory`` takes the same
    forms and gives the network for a file of weights. ``trust`` executes the code a file holds where it is refused
    otherwise. Raises :class:`ModelLoadError`, and :class:`UsageError` for arguments that cannot be meant.
    """
    path = Path(source)
    if path.exists():
        model, notes = _load_file(path, factory, trust)
        told = factory is None  # a factory's model is new: its mode says nothing
    elif _is_target(str(source)):
        if factory is not None:
            raise UsageError(f"--factory {factory}: expected with a file of weights, but {source} is a program already")
        model, told = _build(str(source)), False
        notes = (f"{source} was called without arguments: random weights unless the callable loads its own",)
    else:
        raise ModelLoadError(f"{source}: no such file; expected a model file, FILE.py:NAME or pkg.mod:NAME")
    try:
        require_names(model, str(source))
        _check(model, str(source))
        switched = _put_in_eval_mode(model, str(source))
        notes = (*notes, *switched) if told else notes
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a file can leave out a module's state
        raise ModelLoadError(
            f"{source}: expected a complete module, found one without a usable state ({summary(error)}); save it again"
        ) from error
    return Loaded(model, str(source), notes)


def import_object(target: str) -> Any:
    """What ``FILE.py:NAME`` or ``pkg.mod:NAME`` names; raises ModelLoadError, listing the names that do exist."""
    where, name = _split_target(target)
    module = _import_module(where)
    require_name(module, target)
    return getattr(module, name)


def require_name(module: ModuleType, target: str) -> None:
    where, name = _split_target(target)
    if not hasattr(module, name):
        existing = sorted(n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, ModuleType))
        found = shown(existing) if existing else "nothing"
        raise ModelLoadError(f"{target}: expected {name} in {where}, found only {found}; name one that is there")


def parse_shape(text: str) -> tuple[int, ...]:
    """``1x3x224x224`` -> ``(1, 3, 224, 224)``; raises UsageError otherwise."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text, re.ASCII):
        raise UsageError(
            f"input shape {shown_value(text)}: expected positive integers joined by x, such as 1x3x224x224"
        )
    parts = text.split("x")
    too_long = len(parts) > _MOST_AXES or any(len(part) > len(str(MOST_NUMBERS)) for part in parts)
    if too_long or math.prod(map(int, parts)) > MOST_NUMBERS:
        found = shown_value(text) if too_long else f"{text}, which is {math.prod(map(int, parts))}"
        raise UsageError(f"input shape: expected at most {MOST_NUMBERS} numbers in {_MOST_AXES} axes, found {found}")
    return tuple(map(int, parts))


def initial_input_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Likely input shapes after the first Conv2d or Conv1d, ``(1, channels, size, size)`` or ``(1, channels, length)``;
    empty if the model has none."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv1d)), None)
    if isinstance(first, nn.Conv1d):
        return [(1, first.in_channels, length) for length in _INPUT_LENGTHS]
    return [] if first is None else [(1, first.in_channels, size, size) for size in _INPUT_SIZES]


def find_input_shape(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """The first likely input shape the model accepts, and a sentence that states the assumption; raises TraceError."""
    candidates = initial_input_shapes(model)
    if not candidates:
        raise TraceError(
            "input shape: expected a Conv2d or Conv1d to take it from, found none in the model; pass --input SHAPE"
        )
    first_error: Exception | None = None
    with preserved(model), eval_mode(model), torch.no_grad():
        for shape in candidates:
            try:
                model(_example(model, shape))
            except Exception as error:  # any model may fail on a wrong shape in any way
                first_error = first_error or error
            else:
                return shape, f"input size assumed {_times(shape)}; pass --input to change it"
    tried = ", ".join(_times(shape) for shape in candidates)
    raise TraceError(
        f"input shape: none of {tried} runs through the model; pass --input SHAPE. The first failed with "
        f"{summary(first_error)}"
    ) from first_error


def _load_file(path: Path, factory: str | None, trust: bool) -> tuple[nn.Module, tuple[str, ...]]:
    _reject_by_name(path)
    if path.suffix.lower() == ".safetensors":
        content: object = read_safetensors(path)
        how: tuple[str, ...] = ()
    else:
        classes = {} if factory is None else _factory_classes(factory)
        content, how = read_checkpoint(path, classes=classes, trust=trust)
    if isinstance(content, ExportedProgram):
        rebuilt = rebuild(content, str(path))
        return rebuilt.model, (*how, *rebuilt.notes, *_unused(factory))
    found, where = find_weights(content)
    notes = (*how, *where)
    if isinstance(found, nn.Module):
        return found, (*notes, *_unused(factory))
    if found is None:
        raise ModelLoadError(
            f"{path}: expected an nn.Module or a state dict, found {_content_of(content)}; "
            "save the model with torch.save(model.state_dict(), FILE)"
        )
    if factory is None:
        raise ModelLoadError(f"{path}: expected a whole model, {_NEED_FACTORY}")
    model = _build(factory)
    return model, (*notes, *load_weights(model, found, str(path), factory))


def _unused(factory: str | None) -> tuple[str, ...]:
    return () if factory is None else ("the file holds the network itself, so the factory was not called",)


def _reject_by_name(path: Path) -> None:
    if path.is_dir():
        raise ModelLoadError(f"{path}: expected a model file, found a directory; name the file inside it")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ModelLoadError(f"{path}: expected a readable, regular file; copy the model into one")
    if path.suffix == ".py":
        raise ModelLoadError(f"{path}: expected FILE.py:NAME, found no NAME; name the callable that returns the model")
    if path.suffix.lower() == ".onnx":
        raise ModelLoadError(
            f"{path}: expected a PyTorch model, found an ONNX file, which has no modules to rewrite; "
            "give the PyTorch model it was exported from"
        )
    if path.stat().st_size == 0:
        raise ModelLoadError(f"{path}: expected a model file, found an empty file; save or download it again")


def _check(model: nn.Module, source: str) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelLoadError(
            f"{source}: expected a Python nn.Module, found a TorchScript module, which cannot be rewritten; "
            "load its state dict into the Python class"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    packed = any("quantized" in type(module).__module__.split(".") for module in model.modules())
    if packed or any(tensor.is_quantized for _, tensor in tensors if not is_lazy(tensor)):
        raise ModelLoadError(
            f"{source}: expected a floating-point model, found a quantized one; "
            "optimise the float model, then quantize the result"
        )
    for name, tensor in tensors:
        fault = fault_of(tensor)
        if fault:
            raise ModelLoadError(f"{source}: expected finite, stored weights, found {name} {fault}")


def _put_in_eval_mode(model: nn.Module, source: str) -> tuple[str, ...]:
    if not any(module.training for module in model.modules()):
        return ()
    try:
        model.eval()
    except NotImplementedError as error:  # torch's own refusal: the module of an exported program has no other mode
        raise ModelLoadError(
            f"{source}: expected a module that can change its mode, found what ExportedProgram.module() gives; "
            "give the program itself, or its .pt2 file"
        ) from error
    return ("the model was in train mode and was put in eval mode",)


def _build(target: str) -> nn.Module:
    """The network a program gives: a module, which is copied, or what a callable returns without arguments."""
    where, name = _split_target(target)
    if where == "timm":
        timm = _import_module("timm")
        with _user_code(where, target):
            made = timm.create_model(name, pretrained=False)
    else:
        found = import_object(f"torchvision.models:{name}" if where == "torchvision" else target)
        with _user_code(where, target):
            made = copy_as_it_is(found) if isinstance(found, nn.Module) else found() if callable(found) else found
    if isinstance(made, ExportedProgram):
        return rebuild(made, target).model
    if not isinstance(made, nn.Module):
        if inspect.iscoroutine(made):
            made.close()  # else Python warns that nobody waited for it
        raise ModelLoadError(
            f"{target}: expected an nn.Module or a callable without arguments that returns one, found {_kind_of(made)}"
        )
    return made


def _factory_classes(factory: str) -> dict[str, type]:
    """The classes a file may name because the user named the code: those of its module, and networks it imports.

    A class of the module itself is also known as one of ``__main__``, where a training script defined it.
    """
    where, _ = _split_target(factory)
    if where in _ZOOS:
        return {}  # their classes are allowed as it is
    module = _import_module(where)
    require_name(module, factory)
    classes: dict[str, type] = {}
    for value in filter(runs_no_stored_code, vars(module).values()):
        if value.__module__ == module.__name__:
            names = {module.__name__, Path(where).stem, "__main__"}
            classes |= {f"{home}.{value.__qualname__}": value for home in names}
        elif issubclass(value, nn.Module) and value.__module__.partition(".")[0] != "torch":
            classes[f"{value.__module__}.{value.__qualname__}"] = value
    return classes


def _is_target(text: str) -> bool:
    where, _, name = text.rpartition(":")
    return bool(where) and name.isidentifier()


def _split_target(target: str) -> tuple[str, str]:
    where, _, name = target.rpartition(":")
    if not _is_target(target):
        raise UsageError(f"{target}: expected FILE.py:NAME or pkg.mod:NAME")
    return where, name


def _import_module(where: str) -> ModuleType:
    with _user_code(where, where):
        if where.endswith(".py"):
            return _import_file(Path(where).resolve())
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not (where + ".").startswith(error.name + "."):
                raise
            package = where.partition(".")[0]
            advice = f"pip install {package}" if package in _ZOOS else "check the name"
            raise ModelLoadError(f"{where}: cannot be imported, {error.name} is not installed; {advice}") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file once, under its stem if that is free, so that what pickles name by it can be found."""
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file; expected FILE.py:NAME")
    name = path.stem
    if name in sys.stdlib_module_names or not _is_free(name, path):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_free(name: str, path: Path) -> bool:
    """Whether no other file is imported under this name."""
    if name not in sys.modules:
        return True
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and Path(file).resolve() == path


@contextmanager
def _user_code(where: str, what: str) -> Iterator[None]:
    """Run code the user named, its neighbours importable, and tell its failures as ours."""
    is_file = where.endswith(".py")
    entry = str(Path(where).resolve().parent if is_file else Path.cwd())
    # A file's own folder comes first, as for a script; the working folder comes last, lest it hide what is installed.
    added = is_file or (entry not in sys.path and where.partition(".")[0] not in _ZOOS)
    if added:
        importlib.invalidate_caches()
        sys.path.insert(0 if is_file else len(sys.path), entry)
    try:
        yield
    except ModelLoadError:
        raise
    except (Exception, SystemExit) as error:  # user code can fail in any way, and scripts without a guard exit
        raise ModelLoadError(
            f"{what}: expected code that imports and runs without arguments, found {summary(error)}; "
            "correct it, or name a callable that takes no arguments"
        ) from error
    finally:
        if added:
            with suppress(ValueError):
                sys.path.remove(entry)


def _example(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def _content_of(value: object) -> str:
    if not isinstance(value, Mapping) or not value:
        return _kind_of(value)
    keys = shown([str(key) for key in value])
    return f"{_kind_of(value)} with the keys {keys}, under which there is none or several to choose from"


def _kind_of(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
