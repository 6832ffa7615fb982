"""Where models run in bfloat16: on a processor with matrix units for it, in steps of a training.

The result of a training is judged in float32; nothing that is reported, measured or fitted in closed form is in bfloat16.
Sources: Micikevicius et al. 2018, "Mixed precision training"; Kalamkar et al. 2019, "A study of bfloat16 for deep learning
training": it has the range of float32, so that losses need no scale.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convrewrite.machine import multiplies_bfloat16
from convrewrite.places import PROCESSOR
from convrewrite.state import parameters_of

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
GROUPS = 6
"""Position of the number of groups among the arguments of any of torch's convolutions."""

NARROW = 8
"""With fewer channels in a group, matrix units have little to do. Forwards and backwards of 32 x 64 x 28 x 28 on one thread, in
float32 and bfloat16: four channels with a stride of two 4.5 and 6.1 ms, one channel 2.2 and 23 ms, one with a 5 x 5 kernel 15
and 61 ms; 16 channels 9.6 and 4.4 ms."""


def bfloat16_pays(model: nn.Module) -> bool:
    """Whether a model trains faster in bfloat16: one in float32, on a processor with units for it."""
    numbers = [p for p in parameters_of(model) if p.is_floating_point()]
    ours = all(p.dtype == torch.float32 and p.device.type == PROCESSOR for p in numbers)
    return bool(numbers) and ours and multiplies_bfloat16()


@contextmanager
def in_bfloat16(wanted: bool = True) -> Iterator[None]:
    """Inside the block convolutions and products of matrices on the processor are in bfloat16, except those that are faster in
    float32. Nothing changes unless that is ``wanted``."""
    if not wanted:
        yield
        return
    with torch.autocast(PROCESSOR, torch.bfloat16), _NarrowInFloat32():
        yield


class _NarrowInFloat32(TorchFunctionMode):
    """Convolutions of narrow groups take and give bfloat16, and work in float32."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs the function."""
        given = dict(kwargs or {})
        if not _is_narrow(getattr(func, "__name__", ""), args, given):
            return func(*args, **given)
        with torch.autocast(PROCESSOR, enabled=False):
            whole = {name: _in_float32(value) for name, value in given.items()}
            return func(*map(_in_float32, args), **whole).to(torch.bfloat16)


def _is_narrow(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name not in CONVOLUTIONS:
        return False
    groups = args[GROUPS] if len(args) > GROUPS else kwargs.get("groups", 1)
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    return groups > 1 and isinstance(weight, Tensor) and min(weight.shape[1], len(weight) // groups) < NARROW


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
