"""What one run of a model multiplies and which memory it uses, seen from below: whatever calls the operators."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from convrewrite.inputs import Inputs
from convrewrite.modules.hooks import hooked
from convrewrite.modules.running import run
from convrewrite.process import ordinary_mode, same_random_numbers

GRADIENTS = torch.ops.aten.convolution_backward
"""An operator that a forward may call, as for a gradient of its own, and that is no cost of its convolutions."""

FORMULAS = {operator: formula for operator, formula in flop_registry.items() if operator is not GRADIENTS}


@dataclass(frozen=True, slots=True)
class Tally:
    """MACs of one example, of convolutions and matrix products of any origin; and the addresses of all memory that was read."""

    macs: int
    storages: frozenset[int]

    def read(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory is among that."""
        return address(tensor) in self.storages


def tally(model: nn.Module, inputs: Inputs) -> Tally:
    """Run the model once and count; one that draws numbers draws the same ones every time. Raises TraceError when it does not run
    on ``inputs``.

    The operators and their formulas are those of ``torch.utils.flop_counter``, two operations of which are one MAC.
    """
    with ordinary_mode(), same_random_numbers(0), Watch() as watch:
        run(model, inputs)
    return Tally(watch.operations // 2 // max(1, inputs[0].shape[0]), frozenset(watch.storages))


@contextmanager
def calls_counted(modules: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """How often each of these modules is called meanwhile."""
    calls: Counter[str] = Counter()
    with hooked(
        module.register_forward_pre_hook(lambda _module, _args, name=name: calls.update((name,)))
        for name, module in modules.items()
    ):
        yield calls


def address(tensor: Tensor) -> int:
    """That of a tensor's memory; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor
        return 0


class Watch(TorchDispatchMode):
    """Adds up the operations of every operator and notes the memory of every tensor it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.storages: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and keeping the compiler out would import it, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.storages |= {address(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None and torch.is_inference_mode_enabled():  # there operators arrive before they are taken apart
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        return result
