"""What one run of a model multiplies and which memory it uses, seen at its operators, whatever calls these."""

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
from convrewrite.process import ordinary_mode
from convrewrite.state import address_of

GRADIENTS = torch.ops.aten.convolution_backward
"""An operator that a forward may call to compute a gradient; it does not count as a cost of convolutions."""


def _attended(query: Tensor, *_others: Any, **_named: Any) -> int:
    """Operations of torch's attention in one operator: four projections, and every position with every other one, twice."""
    lengths = [len(example) for example in query.unbind()]  # of nested tensors each has its own
    width: int = query.size(-1)
    return sum(2 * (4 * length * width * width + 2 * length * length * width) for length in lengths)


def _encoded(source: Tensor, *others: Any, **_named: Any) -> int:
    """Operations of torch's encoder layer in one operator: attention, and the two linear layers behind it at every position."""
    first, second = others[FEED_FORWARD]
    positions = sum(len(example) for example in source.unbind())
    return _attended(source) + 2 * positions * (first.numel() + second.numel())


FEED_FORWARD = slice(13, 16, 2)
"""Positions of the weights of an encoder layer's two linear layers among the arguments behind its input."""


def _recurred(sequence: Tensor, of_input: Tensor, of_state: Tensor, *_others: Any, **_named: Any) -> int:
    """Operations of one direction of one layer of an LSTM: two matrices at every step of every example."""
    return 2 * (sequence.numel() // sequence.size(-1)) * (of_input.numel() + of_state.numel())


def _with_vector(first: Tensor, _second: Tensor, **_named: Any) -> int:
    """Operations of a matrix, or a vector, with a vector."""
    return 2 * first.numel()


def _added_to(_sum: Tensor, first: Tensor, second: Tensor, **_named: Any) -> int:
    """Operations of a product of matrices, or of a matrix with a vector, that is added to something."""
    return 2 * first.numel() * (second.size(-1) if second.dim() > 1 else 1)


def _bilinear(first: Tensor, weight: Tensor, *_others: Any, **_named: Any) -> int:
    """Operations of a bilinear layer: its weight has an entry for each pair of features and each output."""
    return 2 * len(first) * weight.numel()


def _over_time(_input: Tensor, weight: Tensor, *_others: Any, out_val: Tensor, **_named: Any) -> int:
    """Operations of a convolution whose inputs are (time, batch, channels), and its weight (kernel, inputs, outputs)."""
    return 2 * out_val.numel() * (weight.numel() // weight.size(-1))


ATEN = torch.ops.aten

FORMULAS = {operator: formula for operator, formula in flop_registry.items() if operator is not GRADIENTS} | {
    ATEN.mv: _with_vector,
    ATEN.dot: _with_vector,
    ATEN.vdot: _with_vector,
    ATEN.addmv: _added_to,
    ATEN.addbmm: _added_to,
    ATEN._addmm_activation: _added_to,
    ATEN._trilinear: _bilinear,
    ATEN.conv_tbc: _over_time,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._native_multi_head_attention: _attended,
    ATEN._transformer_encoder_layer_fwd: _encoded,
    ATEN.mkldnn_rnn_layer: _recurred,
}
"""Operator -> operations it does. Torch's own counter lacks those that are named here; with the last four a processor runs
attention, encoder layers and LSTMs in eval mode."""


@dataclass(frozen=True, slots=True)
class Tally:
    """MACs of one example, of convolutions and matrix products of any origin; the addresses of all memory that was read; and what
    the model returned."""

    macs: int
    storages: frozenset[int]
    output: Any

    def read(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory was read."""
        return address_of(tensor) in self.storages


def tally(model: nn.Module, inputs: Inputs) -> Tally:
    """Run the model once and count; a model that draws numbers draws the same ones every time. Raises TraceError when it does not
    run on ``inputs``.

    The operators and their formulas are those of ``torch.utils.flop_counter``, and those that it lacks (:data:`FORMULAS`); two
    operations are one MAC.
    """
    with ordinary_mode(), Watch() as watch:
        output = run(model, inputs)
    return Tally(watch.operations // 2 // max(1, inputs[0].shape[0]), frozenset(watch.storages), output)


@contextmanager
def calls_counted(modules: Mapping[str, nn.Module]) -> Iterator[Counter[str]]:
    """How often each of these modules is called inside the block."""
    calls: Counter[str] = Counter()
    with hooked(
        module.register_forward_pre_hook(lambda _module, _args, name=name: calls.update((name,)))
        for name, module in modules.items()
    ):
        yield calls


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
        self.storages |= {address_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is None and torch.is_inference_mode_enabled():  # there operators arrive before they are decomposed
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.operations += formula(*args, **kwargs, out_val=result)
        return result
