"""What a dynamic convolution is rewritten to: static stages that all its kernels share, and a last one that stays a mixture.

With ``W_k = P_k A``, ``sum_k a_k(x) W_k x = (sum_k a_k(x) P_k) A x``: the stages in A run once, whatever the number of
kernels, and only the small kernels of the last stage are mixed. The attention is the original's, and sees the original input.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import PADDING_MODES, ConvSpec
from convrewrite.layers.branches import SumOfBranches
from convrewrite.layers.dynamic import (
    DynamicConv2d,
    KernelAttention,
    as_batch,
    as_given,
    convolve_mixture,
    of_each_kernel,
    unstack,
)
from convrewrite.layers.geometry import reversed_margins
from convrewrite.state import parameters_of

# For torch.fx a wrapped function is one node only under the names of files that wrap it themselves.
torch.fx.wrap("as_batch")
torch.fx.wrap("as_given")
torch.fx.wrap("convolve_mixture")


class ConcatenatedBranches(nn.ModuleList):
    """``(N, C, H, W)`` -> what every branch makes of it, side by side within each of ``groups`` groups of channels."""

    def __init__(self, branches: Iterable[nn.Module], groups: int) -> None:
        super().__init__(branches)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """The channels of the first group of all branches, then those of the second, and so on."""
        return torch.cat([branch(x).unflatten(1, (self.groups, -1)) for branch in self], 2).flatten(1, 2)


def attention_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of the attention of a dynamic convolution, or of what replaces one; none for any other module."""
    return list(parameters_of(module.attention)) if isinstance(module, DynamicConv2d | DynamicChain) else []


class DynamicChain(nn.Module):
    """``(N, C, H, W)`` -> ``(N, O, H', W')``: static ``features``, then a convolution whose kernel is a mixture of K.

    ``weight`` is ``(K, O, R / groups, kh, kw)`` for R channels of features, ``bias`` ``(K, O)`` or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, attention: KernelAttention, features: nn.Module, spec: ConvSpec, weight: Tensor, bias: Tensor | None
    ) -> None:
        """``spec`` is the last stage, its kernels stacked."""
        super().__init__()
        self.attention = attention
        self.features = features
        self.spec = spec
        self.weight = nn.Parameter(weight)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    @classmethod
    def of(cls, dynamic: DynamicConv2d, chain: nn.Module) -> "DynamicChain":
        """From the static replacement of the stacked kernels: a chain of convolutions, or a sum of such chains.

        Raises TypeError for anything else.
        """
        chains = list(chain) if isinstance(chain, SumOfBranches) else [chain]
        stages = [list(one) for one in chains if isinstance(one, nn.Sequential)]
        lasts = [stage for *_, stage in stages if isinstance(stage, nn.Conv2d)]
        if len(lasts) != len(chains):
            raise TypeError(f"{cls.__name__}: expected chains of convolutions, found {type(chain).__name__}")
        groups, count = dynamic.groups, dynamic.kernels
        first = [nn.Sequential(*parts[:-1]) for parts in stages]
        # Each branch has its part of the channels of every group.
        weight = torch.cat([unstack(last.weight.detach(), count, groups) for last in lasts], dim=2)
        bias = next((last.bias.detach() for last in lasts if last.bias is not None), None)
        features = first[0] if len(first) == 1 else ConcatenatedBranches(first, groups)
        spec = ConvSpec.of(lasts[0])
        return cls(
            copy.deepcopy(dynamic.attention),
            features,
            spec,
            weight,
            None if bias is None else unstack(bias, count, groups),
        ).train(dynamic.training)

    def forward(self, x: Tensor) -> Tensor:
        """Every example with its own kernel in the last stage."""
        batch = as_batch(x)
        shares, features = self.attention(batch), self.features(batch)
        margins = reversed_margins(self.spec)
        if any(margins):
            features = F.pad(features, margins, mode=PADDING_MODES[self.spec.padding_mode])
        spec = self.spec
        mixed = convolve_mixture(features, shares, self.weight, self.bias, spec.stride, spec.dilation, spec.groups)
        return as_given(mixed, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's, through which a whole model is moved to another memory layout."""
        moved: Self = super()._apply(of_each_kernel(fn), recurse)  # type: ignore[no-untyped-call]
        return moved

    def extra_repr(self) -> str:
        """The geometry of the last stage and the number of its kernels."""
        return f"{self.spec.describe()}, kernels={len(self.weight)}, bias={self.bias is not None}"
