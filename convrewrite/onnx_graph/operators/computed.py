"""What a node becomes: a module that holds the constants of the node and is called with its other inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.modules import Operator
from convrewrite.onnx_graph.file import NodeView

Made = nn.Module | Callable[..., Any]

Maker = Callable[[NodeView], Made | None]

Numbers = Tensor | Sequence[int] | int
"""Numbers that say how to compute: a shape, axes, a count. Plain ones where the node has them as constants."""


class Computed(Operator):
    """A function of a node's inputs, in their order; an optional one that is left out is None.

    Constants are buffers ``constant_<position>``, except at the positions in ``plain``, where they are numbers and tuples.
    When the node has several outputs, it gives a tuple of those that the function computes.
    """

    def __init__(
        self, function: Callable[..., Any], view: NodeView, keywords: Mapping[str, Any], plain: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.function = function
        self.keywords = dict(keywords)
        self.single = len(view.outputs) == 1
        self.dynamic = tuple(
            present and constant is None for present, constant in zip(view.present, view.constants, strict=True)
        )
        self.numbers = {i: _plain(view.constants[i]) for i in plain if i < len(view.constants)}
        for i, constant in enumerate(view.constants):
            if i not in self.numbers:
                self.register_buffer(f"constant_{i}", constant)

    def forward(self, *given: Any) -> Any:
        """What the function gives for the inputs that are not constants."""
        rest = iter(given)
        inputs = [next(rest) if dynamic else self._constant(i) for i, dynamic in enumerate(self.dynamic)]
        result = self.function(*inputs, **self.keywords)
        if isinstance(result, tuple):
            return result[0] if self.single else result
        return result if self.single else (result,)

    def _constant(self, position: int) -> Any:
        if position in self.numbers:
            return self.numbers[position]
        return getattr(self, f"constant_{position}")

    def extra_repr(self) -> str:
        """The function and its settings."""
        settings = [f"{name}={value}" for name, value in self.keywords.items()]
        return ", ".join([getattr(self.function, "__name__", repr(self.function)), *settings])


def _plain(constant: Tensor | None) -> Any:
    """A constant as a number, or a tuple of them."""
    if constant is None:
        return None
    return tuple(constant.tolist()) if constant.dim() else constant.item()


def made(
    function: Callable[..., Any], *, plain: Sequence[int] = (), gives: int = 1, **attributes: Any
) -> Callable[[NodeView], Computed | None]:
    """A maker of modules that call ``function`` with the inputs, and with the node's ``attributes``, given with their defaults.

    ``gives``: how many outputs the function computes; for a node of which further ones are used, the maker gives None.
    """
    return partial(_make, function, tuple(plain), gives, attributes)


def _make(
    function: Callable[..., Any], plain: Sequence[int], gives: int, defaults: Mapping[str, Any], view: NodeView
) -> Computed | None:
    if any(view.outputs[gives:]):
        return None
    keywords = {name: view.attributes.get(name, default) for name, default in defaults.items()}
    return Computed(function, view, keywords, plain)


def since(version: int, maker: Maker, before: Maker) -> Maker:
    """``maker`` from this version of the standard operators on, and ``before`` in older files."""
    return partial(_since, version, maker, before)


def _since(version: int, maker: Maker, before: Maker, view: NodeView) -> Made | None:
    return maker(view) if view.opset >= version else before(view)


def moved(version: int, maker: Maker, **positions: int) -> Maker:
    """A maker for nodes some attributes of which became inputs, at these positions, in this version."""
    return partial(_moved, version, maker, positions)


def _moved(version: int, maker: Maker, positions: Mapping[str, int], view: NodeView) -> Made | None:
    if view.opset < version:
        for name, position in positions.items():
            if view.attributes.get(name) is not None:
                view = with_input(view, position, torch.as_tensor(view.attributes[name]))
    return maker(view)


def with_input(view: NodeView, position: int, value: Tensor) -> NodeView:
    """The node as if it had this constant as an input."""
    missing = max(0, position + 1 - len(view.present))
    constants, present, ranks = [*view.constants], [*view.present], [*view.ranks]
    constants += [None] * missing
    present += [False] * missing
    ranks += [None] * missing
    constants[position], present[position], ranks[position] = value, True, value.dim()
    return replace(view, constants=tuple(constants), present=tuple(present), ranks=tuple(ranks))


def ints(numbers: Numbers) -> list[int]:
    """Numbers as a list, a single one too."""
    if isinstance(numbers, Tensor):
        numbers = numbers.reshape(-1).tolist()
    return [int(number) for number in numbers] if isinstance(numbers, Sequence) else [int(numbers)]


def number(value: Tensor | Sequence[float] | float) -> Any:
    """The one number in a value."""
    if isinstance(value, Tensor):
        return value.item()
    return value[0] if isinstance(value, Sequence) else value


def constant(view: NodeView, position: int) -> Tensor | None:
    """The constant at a position; None where there is none, or no such input."""
    return view.constants[position] if position < len(view.constants) else None


def dynamic(view: NodeView, position: int) -> bool:
    """Whether an input is there and not constant."""
    return position < len(view.present) and view.present[position] and view.constants[position] is None


def taken(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """The slices of ``x`` at these places along an axis; along the last one, gathering is faster in torch."""
    places = places.to(x.device)
    if axis % x.dim() == x.dim() - 1:
        return x.gather(axis, places.expand(*x.shape[:-1], len(places)))
    return x.index_select(axis, places)
