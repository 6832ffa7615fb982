"""A file or a program -> an ``nn.Module`` in eval mode; :mod:`convrewrite.loading.checkpoints` says what a file may contain."""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from convrewrite.absent import require_content
from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.escaping import summary
from convrewrite.loading.checkpoints import (
    fault_of,
    is_lazy,
    is_quantized_home,
    listed,
    read_checkpoint,
    read_safetensors,
    runs_no_stored_code,
)
from convrewrite.loading.contents import require_suffix
from convrewrite.loading.programs import rebuild
from convrewrite.loading.state_dicts import find_weights, load_weights, widened
from convrewrite.loading.user_code import (
    ZOOS,
    import_object,
    is_target,
    named_module,
    require_name,
    split_target,
    user_code,
)
from convrewrite.modules import copy_model
from convrewrite.names import require_names
from convrewrite.state import named_parameters_of, unmade_part

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
    forms and gives the network for a file of weights. With ``trust`` a file that is otherwise refused is loaded by executing
    its code. Raises :class:`ModelLoadError`, and :class:`UsageError` for arguments that make no sense.
    """
    path = Path(source)
    if os.path.exists(path):  # Path.exists raises for a name that is too long for a file
        model, notes, told = _load_file(path, factory, trust)
    elif is_target(str(source)):
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


_PART = re.compile(r"(\.index\.json|-\d{5}-of-(?P<count>\d{5})\.\w+)\Z")
"""How the files are called over which a large model's weights are spread, and their index."""


def _load_file(path: Path, factory: str | None, trust: bool) -> tuple[nn.Module, tuple[str, ...], bool]:
    """The network, notes, and whether it was in the file: a factory's network is new, and its mode says nothing."""
    _reject_by_name(path)
    require_suffix(path)
    if path.suffix.lower() == ".safetensors":
        content: object = read_safetensors(path)
        how: tuple[str, ...] = ()
    else:
        classes = {} if factory is None else _factory_classes(factory)
        content, how = read_checkpoint(path, classes=classes, trust=trust)
    if isinstance(content, ExportedProgram):
        rebuilt = rebuild(content, str(path))
        return rebuilt.model, (*how, *rebuilt.notes, *_unused(factory)), True
    found, where = find_weights(content)
    notes = (*how, *where)
    if isinstance(found, nn.Module):
        model, how = (found, ()) if isinstance(content, nn.Module) else widened(found)
        return model, (*notes, *how, *_unused(factory)), True
    if found is None:
        raise ModelLoadError(
            f"{path}: expected an nn.Module or a state dict, found {_content_of(content)}; "
            "save the whole model with torch.save(model, FILE), or its state dict, and pass --factory FILE.py:NAME"
        )
    if factory is None:
        raise ModelLoadError(f"{path}: expected a whole model, {_NEED_FACTORY}")
    model = _build(factory)
    _require_made(model, factory)
    return model, (*notes, *load_weights(model, found, str(path), factory)), False


def _unused(factory: str | None) -> tuple[str, ...]:
    return () if factory is None else ("the file holds the network itself, so the factory was not called",)


def _reject_by_name(path: Path) -> None:
    if path.is_dir() and (path / ".metadata").is_file():
        raise ModelLoadError(
            f"{path}: expected a model file, found a folder of torch.distributed.checkpoint; make it one file with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(FOLDER, FILE)"
        )
    if path.is_dir():
        raise ModelLoadError(f"{path}: expected a model file, found a directory; name the file inside it")
    if not path.is_file() or not os.access(path, os.R_OK):
        raise ModelLoadError(f"{path}: expected a readable, regular file; copy the model into one")
    if path.suffix == ".py":
        raise ModelLoadError(f"{path}: expected FILE.py:NAME, found no NAME; name the callable that returns the model")
    if path.suffix.lower() == ".onnx":
        raise ModelLoadError(
            f"{path}: expected a PyTorch model, found an ONNX file, whose graph is rewritten as it is; "
            "give its path to convrewrite.optimize(path), or to `convrewrite optimize`"
        )
    require_content(path)
    part = _PART.search(path.name)
    if part is not None and part["count"] != "00001":
        found = "an index" if part["count"] is None else "a part"
        read, write = ("torch.load", "torch.save")
        if ".safetensors" in path.name:
            read, write = ("safetensors.torch.load_file", "save_file")
        raise ModelLoadError(
            f"{path}: expected all weights in one file, found {found} of several; put them into one, with {read} of each part "
            f"and {write} of all together"
        )


def _require_made(model: nn.Module, source: str) -> None:
    unmade = unmade_part(model)
    if unmade:
        raise ModelLoadError(
            f"{source}: expected a model whose layers have their sizes, found {unmade}, a lazy module that gets them in its "
            "first run; run the model once before it is saved or returned, or take out a part that never runs"
        )


def _check(model: nn.Module, source: str) -> None:
    _require_made(model, source)
    tensors = [*named_parameters_of(model), *model.named_buffers()]
    packed = any(is_quantized_home(type(module).__module__) for module in model.modules())
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
    where, name = split_target(target)
    if where == "timm":
        timm = named_module("timm")
        with user_code(where, target):
            made = timm.create_model(name, pretrained=False)
    else:
        found = import_object(f"torchvision.models:{name}" if where == "torchvision" else target)
        with user_code(where, target):
            made = (
                copy_model(found, as_it_is=True)
                if isinstance(found, nn.Module)
                else found()
                if callable(found)
                else found
            )
    if isinstance(made, ExportedProgram):
        return rebuild(made, target).model
    if not isinstance(made, nn.Module):
        if inspect.iscoroutine(made):
            made.close()  # otherwise Python warns that nobody waited for it
        raise ModelLoadError(
            f"{target}: expected an nn.Module or a callable without arguments that returns one, found {_kind_of(made)}"
        )
    return made


def _factory_classes(factory: str) -> dict[str, type]:
    """The classes a file may name because the user named the code: those of its module, and networks it imports.

    A class of the module itself is also known as one of ``__main__``, where a training script defined it.
    """
    where, _ = split_target(factory)
    if where in ZOOS:
        return {}  # their classes are allowed anyway
    module = named_module(where)
    require_name(module, factory)
    classes: dict[str, type] = {}
    for value in filter(runs_no_stored_code, vars(module).values()):
        if value.__module__ == module.__name__:
            names = {module.__name__, Path(where).stem, "__main__"}
            classes |= {f"{home}.{value.__qualname__}": value for home in names}
        elif issubclass(value, nn.Module) and value.__module__.partition(".")[0] != "torch":
            classes[f"{value.__module__}.{value.__qualname__}"] = value
    return classes


def _content_of(value: object) -> str:
    if not isinstance(value, Mapping) or not value:
        return _kind_of(value)
    keys = listed([str(key) for key in value])
    return f"{_kind_of(value)} with the keys {keys}, under which there is none or several to choose from"


def _kind_of(value: object) -> str:
    return f"an object of type {type(value).__name__}"
