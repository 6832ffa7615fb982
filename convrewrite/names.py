"""What a module, a parameter or a buffer may be called.

torch.fx and torch.export write these names into Python source, which they compile. nn.Module itself forbids dots only, and a file
can set names without asking it: a quote in a name ends the string that the name is written in, and what follows it runs as code.
So a name consists of letters, digits, ``_`` and ``-``, and of nothing that Python would read as something else.
"""

import unicodedata
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError

FINDERS = ("named_modules", "modules", "get_submodule")
"""Methods by which parts of a model are found, here and in torch's own tracers and exporters."""

_TABLES = {"_modules": "submodule", "_parameters": "parameter", "_buffers": "buffer"}


def is_name(text: object) -> bool:
    """Whether a text is harmless in source: letters, digits, ``_`` and ``-``, the same after NFKC, and no ``__dunder__``."""
    return (
        isinstance(text, str)
        and text != ""
        and all(c in "_-" or c.isalnum() for c in text)
        and unicodedata.normalize("NFKC", text) == text
        and not (text.startswith("__") and text.endswith("__"))
    )


def require_names(model: nn.Module, source: str) -> None:
    """Raise ModelLoadError, which names ``source``, unless every submodule, parameter, buffer and tensor attribute has a
    harmless name, and is found by torch's own methods.

    Called wherever a model comes in, before any part of it is traced or exported. TorchScript is refused too, and so is
    DistributedDataParallel, of which no copy runs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelLoadError(
            f"{source}: expected a Python nn.Module, found a TorchScript module, which cannot be rewritten; give the module that "
            "it was made from, or an ONNX file"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):  # it runs only in the processes that it was made in
        raise ModelLoadError(
            f"{source}: expected the network itself, found it in DistributedDataParallel; give its .module"
        )
    for path, module in _parts(model):
        found = [(what, name) for table, what in _TABLES.items() for name in vars(module).get(table, {})]
        # torch.fx looks constants up among these.
        found += [("tensor", name) for name, value in vars(module).items() if isinstance(value, Tensor)]
        for what, name in found:
            if not is_name(name):
                raise ModelLoadError(_refusal(source, path, what, name))
        for finder in FINDERS:
            own = getattr(type(module), finder) is not getattr(nn.Module, finder)
            missed = _missed(module, finder) if own else None
            if missed is not None:
                raise ModelLoadError(
                    f"{source}: expected {finder}() to give every part under its own name, as tools of torch find parts by it, "
                    f"found one that {type(module).__name__} defines itself, which does not give "
                    f"{missed or 'the module itself'}; give that method another name"
                )


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module in a model with its name, each once, whatever its class says; TorchScript, whose tables are no dictionaries
    and which is one node of a graph, is left out."""
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            continue
        seen.add(id(module))
        yield path, module
        children = [(name, child) for name, child in vars(module).get("_modules", {}).items() if child is not None]
        waiting += [(f"{path}.{name}" if path else str(name), child) for name, child in reversed(children)]


def _missed(module: nn.Module, finder: str) -> str | None:
    """The first part of a module that a method which its class defines itself does not give; None where it gives all."""
    expected = list(_parts(module))
    try:
        if finder == "get_submodule":
            found = {name: module.get_submodule(name) for name, _ in expected}
        elif finder == "modules":
            given = {id(part) for part in module.modules()}
            found = {name: part for name, part in expected if id(part) in given}
        else:
            found = dict(module.named_modules(memo=None, prefix="", remove_duplicate=False))
    except Exception:  # a method of any class may fail in any way
        found = {}
    return next((name for name, part in expected if found.get(name) is not part), None)


def _refusal(source: str, path: str, what: str, name: object) -> str:
    where = f"in {path}" if path else "in the model itself"
    return (
        f"{source}: expected names of letters, digits, _ and - (they are written into source code), found the {what} "
        f"{_short(repr(name))} {where}; rename it where the model is built"
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."
