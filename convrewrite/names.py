"""What a module, a parameter or a buffer may be called.

torch.fx and torch.export write these names into Python source, which they compile. nn.Module itself forbids dots only, and a file
can set names without asking it: a quote in a name ends the string that the name is written in, and what follows it runs as code.
So a name consists of letters, digits, ``_`` and ``-``, and of nothing that Python would read as something else.
"""

import unicodedata

import torch
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError

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
    harmless name.

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
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):  # its tables are no dictionaries, and it is one node of a graph
            continue
        found = [(what, name) for table, what in _TABLES.items() for name in vars(module).get(table, {})]
        # torch.fx looks constants up among these.
        found += [("tensor", name) for name, value in vars(module).items() if isinstance(value, Tensor)]
        for what, name in found:
            if not is_name(name):
                raise ModelLoadError(_refusal(source, path, what, name))
        children = vars(module).get("_modules", {}).items()
        waiting += [(f"{path}.{name}" if path else name, child) for name, child in children if child is not None]


def _refusal(source: str, path: str, what: str, name: object) -> str:
    where = f"in {path}" if path else "in the model itself"
    return (
        f"{source}: expected names of letters, digits, _ and - (they are written into source code), found the {what} "
        f"{_short(repr(name))} {where}; rename it and save the model again"
    )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."
