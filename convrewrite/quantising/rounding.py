"""A stand-in for a site that computes as static int8 does, which a plan for int8 measures."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from convrewrite.machine import adds_bytes
from convrewrite.quantising.even import POWERS, even_scales

STEPS = 255
"""Steps between the least and the largest value of an int8 tensor."""

PLAIN = (nn.Conv2d, nn.Conv1d)
"""Types of convolutions that are rounded; transposed ones stay as they are."""


def rounded(module: nn.Module) -> nn.Module:
    """A copy of a convolution, or of chains of them, that rounds as :func:`quantise_file` will have it rounded.

    Weights have a step for every output channel. Values between two stages, and those that branches add up, have one step for all
    channels; between stages even scales are applied first where these lose less. Ranges are those of the first batch. What enters
    and leaves the site is not rounded: original and rewritten model have these tensors in common.
    """
    changed = copy.deepcopy(module)
    chains = [part for part in changed.modules() if isinstance(part, nn.Sequential)] or [nn.Sequential(changed)]
    for chain in chains:
        before: nn.Module | None = None
        for stage in chain:
            if isinstance(stage, PLAIN) and isinstance(before, PLAIN):
                stage.register_forward_pre_hook(_Between(stage.weight.detach().clone()))
            elif isinstance(stage, PLAIN):
                stage.weight.data = _rounded_weight(stage.weight.detach())
            before = stage
        if len(chains) > 1:
            chain.register_forward_hook(_Added())
    return changed


@dataclass(frozen=True, slots=True)
class _Grid:
    """Evenly spaced values from ``low`` to ``high``, zero among them."""

    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> "_Grid":
        return cls(min(0.0, float(values.min())), max(0.0, float(values.max())))

    def rounded(self, values: Tensor) -> Tensor:
        step = (self.high - self.low) / STEPS
        if step == 0:
            return values
        return torch.fake_quantize_per_tensor_affine(values, step, round(-self.low / step), 0, STEPS)


@dataclass
class _Added:
    """Rounds what a branch hands over, as a hook of its chain."""

    grid: _Grid | None = None

    def __call__(self, _chain: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        self.grid = self.grid or _Grid.of(output)
        return self.grid.rounded(output)


@dataclass
class _Between:
    """Rounds what lies before the second of two convolutions in a row, as a hook of that one; ``weight`` is its original
    weight."""

    weight: Tensor
    found: tuple[Tensor, _Grid] | None = None
    """The scale of every channel, and the grid of what is scaled."""

    @torch.no_grad()
    def __call__(self, conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        assert isinstance(conv, PLAIN)
        if self.found is None:
            conv.weight.data, best_scale, best_grid = self._best(conv, inputs[0])
            self.found = best_scale, best_grid
        scale, grid = self.found
        return (grid.rounded(inputs[0] * scale),)

    def _best(self, conv: nn.Conv2d | nn.Conv1d, x: Tensor) -> tuple[Tensor, Tensor, _Grid]:
        """Weights, scales and grid of the power that leaves the least error after the convolution."""
        exact = _convolved(conv, x, self.weight)
        tried = [self._by(conv, x, power) for power in POWERS]
        errors = [
            float((_convolved(conv, grid.rounded(x * scale), weight) - exact).square().mean())
            for weight, scale, grid in tried
        ]
        return tried[errors.index(min(errors))]

    def _by(self, conv: nn.Conv2d | nn.Conv1d, x: Tensor, power: float | None) -> tuple[Tensor, Tensor, _Grid]:
        readers = self.weight.unflatten(0, (conv.groups, -1))  # (groups, filters, channels of the group, *kernel)
        largest, reading = x.abs().transpose(0, 1).flatten(1).amax(1), readers.abs().flatten(3).amax((1, 3)).reshape(-1)
        plane, scale = [1] * (x.dim() - 2), torch.ones_like(largest)
        if power is not None:
            even = even_scales(largest.double().cpu().numpy(), reading.double().cpu().numpy(), power)
            scale = torch.as_tensor(even, dtype=x.dtype, device=x.device)
        weight = _rounded_weight((readers / scale.view(conv.groups, 1, -1, *plane)).flatten(0, 1))
        scale = scale.view(1, -1, *plane)
        return weight, scale, _Grid.of(x * scale)


def _convolved(conv: nn.Conv2d | nn.Conv1d, x: Tensor, weight: Tensor) -> Tensor:
    """As the convolution does it, without its bias, and without its padding unless that is zeros."""
    way = functional.conv2d if isinstance(conv, nn.Conv2d) else functional.conv1d
    padding = conv.padding if conv.padding_mode == "zeros" else 0
    return way(x, weight, None, conv.stride, padding, conv.dilation, conv.groups)


def _rounded_weight(weight: Tensor) -> Tensor:
    """(C_out, ...), each filter on its own symmetric grid."""
    levels = 127 if adds_bytes() else 63
    steps = (weight.abs().amax(tuple(range(1, weight.ndim))) / levels).clamp_min(torch.finfo(torch.float32).tiny)
    zeros = torch.zeros_like(steps, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, steps.float(), zeros, 0, -levels, levels)
