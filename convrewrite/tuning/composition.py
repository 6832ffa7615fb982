"""Rewritten sites computed in training through the one kernel that their stages amount to.

The stages of a chain are linear with nothing between, so one convolution with the composed kernel gives the same up to rounding,
and gradients go through the composition to the stages. In torch the time of an operator depends on its inputs and outputs as well
as on its multiplications: where stages are many and save little, one convolution takes less time than they do.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import gcd, prod

import torch
from torch import Tensor, nn
from torch.func import functional_call

from convrewrite.conv import CONV_TYPES, TRANSPOSED_TYPES, ConvSpec, Size, canonical_kernel, module_weight
from convrewrite.layers import SumOfBranches
from convrewrite.structures import Stage, composed_kernel

ELEMENT = 30.0
"""Cost of one number that a convolution reads or writes, forwards and backwards, in multiplications. In steps of whole networks,
whose activations fit into no cache, 30 and 40 were the fastest of 0, 18, 30, 40, 50, 80 and "compose all", on one thread and two:
separable sites of 16 to 80 channels took 0.9 times as long as with 0, those of a CP plan at a quarter of the MACs 0.85 times as
long as with all composed. A single site whose activations stay in a cache would be judged best with 18."""

SPARING_IN_BFLOAT16 = 0.2
"""In bfloat16 the composed kernel pays if the stages have more than this part of its weights: multiplications cost a sixth there,
and narrow groups work in float32. A step of refinement took 0.105 s instead of 0.142 with separable sites of half the weights,
0.107 instead of 0.125 at a quarter of a ResNet's MACs, and as long at 0.15."""


@contextmanager
def composed(model: nn.Module, sites: Sequence[str], bfloat16: bool = False) -> Iterator[None]:
    """Within the block ``sites`` compute through their composed kernels, where this is possible and pays; ``bfloat16``: whether
    they compute in bfloat16.

    Modules, their names and their parameters stay what they are: only a call of the site gets to the same numbers in another way.
    Dynamic, transposed and other sites that are not plain chains stay as they are.
    """
    with ExitStack() as stack:
        for site in {id(module): module for module in map(model.get_submodule, sites)}.values():
            way = composition_of(site)
            if way is not None and way.pays(bfloat16):
                stack.enter_context(_computed_by(site, way))
        yield


@contextmanager
def _computed_by(site: nn.Module, way: "Composition") -> Iterator[None]:
    """Calls of ``site`` are computed by ``way``: an attribute of the instance takes precedence over the method of its class."""
    site.forward = way
    try:
        yield
    finally:
        del site.forward


@dataclass(frozen=True, slots=True)
class Composition:
    """One convolution for a chain, or for a sum of chains, whose parameters it reads at every call.

    ``shell`` is a module with the geometry and no numbers; ``groups`` are those of the one convolution.
    """

    chains: tuple[tuple[nn.Module, ...], ...]
    stages: tuple[tuple[Stage, ...], ...]
    groups: int
    shell: nn.Module
    spec: ConvSpec

    def __call__(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, O, H', W')``, the same as the chains up to rounding."""
        with _exactly(input.device.type):  # a product of kernels is rounded only once, where it is used
            numbers = {"weight": module_weight(self.kernel(), self.spec)}
        bias = self.bias()
        if bias is not None:
            numbers["bias"] = bias
        result: Tensor = functional_call(self.shell, numbers, (input,))
        return result

    def pays(self, bfloat16: bool = False) -> bool:
        """Whether torch takes less time for it than for the chains, in bfloat16 or not."""
        chains = [[ConvSpec.of(conv) for conv in chain] for chain in self.chains]  # type: ignore[arg-type]
        if not bfloat16:
            return sum(map(_cost, chains)) > _cost([self.spec])
        weights = sum(prod(spec.kernel_shape) for chain in chains for spec in chain)
        return weights / prod(self.spec.kernel_shape) > SPARING_IN_BFLOAT16

    def kernel(self) -> Tensor:
        """The composed kernel, canonical ``(O, C / groups, kh, kw)``, with the graph of its gradients."""
        total: Tensor | None = None
        for chain, stages in zip(self.chains, self.stages, strict=True):
            kernels = [canonical_kernel(_weight(conv), ConvSpec.of(conv)) for conv in chain]  # type: ignore[arg-type]
            kernel = composed_kernel(kernels, stages, self.groups)
            total = kernel if total is None else total + kernel
        assert total is not None, "a site has at least one chain"
        return total

    def bias(self) -> Tensor | None:
        """The bias, which belongs to the last stage of one of the chains."""
        found = [chain[-1].bias for chain in self.chains if isinstance(chain[-1].bias, Tensor)]
        return found[0] if found else None


def _exactly(place: str) -> AbstractContextManager[object]:
    """Within the block nothing is cast for speed; on devices that never cast, this does nothing."""
    return torch.autocast(place, enabled=False) if torch.amp.is_autocast_available(place) else nullcontext()


def _cost(chain: Sequence[ConvSpec]) -> float:
    """The cost of one position of a chain's input, in multiplications."""
    positions, cost = 1.0, 0.0
    for spec in chain:
        cost += ELEMENT * spec.in_channels * positions
        positions /= prod(spec.stride)
        cost += (prod(spec.kernel_shape) + ELEMENT * spec.out_channels) * positions
    return cost


def composition_of(site: nn.Module) -> Composition | None:
    """The way through one composed kernel; None where there is none."""
    chains = _chains(site)
    if not chains or max(map(len, chains)) < 2:
        return None
    specs = [[ConvSpec.of(conv) for conv in chain] for chain in chains]  # type: ignore[arg-type]
    whole = [_whole(chain) for chain in specs]
    first = whole[0]
    if first is None or any(spec is None or replace(spec, bias=first.bias) != first for spec in whole):
        return None
    first = replace(first, bias=any(chain[-1].bias for chain in specs))
    stages = tuple(
        tuple(Stage(s.in_channels // first.groups, s.out_channels // first.groups, "", s.groups // first.groups) for s in chain)
        for chain in specs
    )  # fmt: skip
    return Composition(chains, stages, first.groups, first.build(torch.float32, "meta").eval(), first)


def _chains(site: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """The convolutions of a site, branch by branch; empty if anything else is among them."""
    branches = list(site) if isinstance(site, SumOfBranches) else [site]
    chains = tuple(tuple(branch) for branch in branches if type(branch) is nn.Sequential)
    plain = all(
        type(conv) in CONV_TYPES and not isinstance(conv, TRANSPOSED_TYPES) for chain in chains for conv in chain
    )
    return chains if plain and len(chains) == len(branches) and all(chains) else ()


def _whole(chain: Sequence[ConvSpec]) -> ConvSpec | None:
    """The geometry of the one convolution that a chain amounts to; None where there is none.

    On each axis at most one stage may have an extent, a stride or padding: then the order of the stages does not matter. A bias
    between the stages would not be part of the padding behind it, so only the last stage may have one.
    """
    if any(spec.bias for spec in chain[:-1]):
        return None
    owners = [[spec for spec in chain if _owns(spec, axis)] for axis in (0, 1)]
    if any(len(found) > 1 for found in owners):
        return None
    rows, columns = (found[0] if found else chain[0] for found in owners)
    modes = {spec.padding_mode for found in owners for spec in found} or {"zeros"}
    padding = _padding(rows, columns, bool(owners[0]), bool(owners[1]))
    if len(modes) > 1 or padding is None:
        return None
    return ConvSpec(
        chain[0].in_channels,
        chain[-1].out_channels,
        (rows.kernel_size[0], columns.kernel_size[1]),
        (rows.stride[0], columns.stride[1]),
        padding,
        (rows.dilation[0], columns.dilation[1]),
        gcd(*(spec.groups for spec in chain)),
        chain[-1].bias,
        modes.pop(),
        dims=chain[0].dims,
    )


def _owns(spec: ConvSpec, axis: int) -> bool:
    """Whether a stage does more along an axis than treating every position by itself."""
    padded = isinstance(spec.padding, tuple) and spec.padding[axis] > 0
    return spec.kernel_size[axis] > 1 or spec.stride[axis] > 1 or padded


def _padding(rows: ConvSpec, columns: ConvSpec, tall: bool, wide: bool) -> Size | str | None:
    """The padding of both axes; None where one is a word and the other a number, or both are different words."""
    words = {spec.padding for spec, owned in ((rows, tall), (columns, wide)) if owned and isinstance(spec.padding, str)}
    if not words:
        pads = [spec.padding[axis] if owned and isinstance(spec.padding, tuple) else 0
                for axis, (spec, owned) in enumerate(((rows, tall), (columns, wide)))]  # fmt: skip
        return pads[0], pads[1]
    numbers = any(owned and isinstance(spec.padding, tuple) for spec, owned in ((rows, tall), (columns, wide)))
    return None if numbers or len(words) > 1 else words.pop()


def _weight(conv: nn.Module) -> Tensor:
    weight = conv.weight
    assert isinstance(weight, Tensor)
    return weight
