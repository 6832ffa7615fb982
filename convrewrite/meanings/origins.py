"""What gave each output of a model: the last function that computed it, and the module in which it ran.

Whatever only moves numbers (views, slices, copies, interpolation) is looked through. Nothing else of the run is kept.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from convrewrite.meanings.moves import MOVES, axis_given, axis_moved
from convrewrite.modules import hooked


@dataclass(frozen=True, slots=True)
class Origin:
    """A function by ATen's name without underscores around it, as ``addmm`` or ``softmax``, and the path of the module. ``axis``:
    where the channels lie in the output, None where that could not be followed."""

    function: str
    module: str
    axis: int | None = field(default=None, compare=False)


@contextmanager
def origins_noted(model: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor]], dict[str, Origin]]]:
    """Follow what runs in this block; the function that is given returns the origins of its outputs afterwards."""
    path = [""]
    follower = _Follower(path)
    with hooked(_path_hooks(model, path)), follower:
        yield follower.of


def _path_hooks(model: nn.Module, path: list[str]) -> Iterator[RemovableHandle]:
    """Registers what keeps the path of the module that runs; a scripted one takes no hooks."""
    for name, module in model.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            yield module.register_forward_pre_hook(_entering(path, name))
            yield module.register_forward_hook(_leaving(path))


def _entering(path: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    ours = threading.get_ident()  # another thread may run the same model meanwhile

    def enter(_module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == ours:
            path.append(name)

    return enter


def _leaving(path: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    ours = threading.get_ident()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if threading.get_ident() == ours:
            path.pop()

    return leave


@dataclass(slots=True)
class _Known:
    """Origins by tensor, without keeping any tensor alive: an id counts only while it belongs to the same tensor."""

    entries: dict[int, tuple["weakref.ref[Tensor]", Origin]] = field(default_factory=dict)

    def put(self, tensor: Tensor, origin: Origin) -> None:
        self.entries[id(tensor)] = (weakref.ref(tensor), origin)

    def get(self, tensor: Tensor) -> Origin | None:
        found = self.entries.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None


class _Follower(TorchDispatchMode):
    def __init__(self, path: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path = path
        self._known = _Known()

    def of(self, outputs: Mapping[str, Tensor]) -> dict[str, Origin]:
        found = {name: self._known.get(tensor) for name, tensor in outputs.items()}
        return {name: origin for name, origin in found.items() if origin is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        function = str(func._schema.name).partition("::")[2].strip("_")
        copied = function == "copy"  # into what stands first
        known = self._of_known(args[1:] if copied else args)
        filled = [args[0]._base] if copied and args[0]._base is not None else []  # of which that is a part
        for tensor in (*tree_leaves(result), *filled):
            if isinstance(tensor, Tensor):
                self._known.put(tensor, self._origin(function, args, known, tensor))
        return result

    def _of_known(self, args: Any) -> list[tuple[Tensor, Origin]]:
        """The arguments whose origins are known."""
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        found = [(tensor, self._known.get(tensor)) for tensor in tensors]
        return [(tensor, origin) for tensor, origin in found if origin is not None]

    def _origin(self, function: str, args: Any, known: Sequence[tuple[Tensor, Origin]], result: Tensor) -> Origin:
        """The origin of a result: of what a function only moves that of its first argument whose origin is known. The axis of the
        channels is that of a convolution or linear layer, and stays where a function works number by number."""
        if function in MOVES and known:
            source, origin = known[0]
            if origin.axis is None or source.ndim == 0:
                return origin
            return replace(origin, axis=axis_moved(function, args, origin.axis, source.shape, result.shape))
        axis = axis_given(function, result.ndim)
        if axis is None:
            axis = next((origin.axis for one, origin in known if one.shape == result.shape), None)
        return Origin(function, self._path[-1], axis)
