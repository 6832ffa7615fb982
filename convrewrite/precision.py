"""Where forward passes are in bfloat16: on a processor with matrix units for it, in training and for effects that are large.

Nothing that is reported, and nothing that is fitted in closed form, is computed so. Steps of a training may be, since what comes
of them is judged in float32, and effects that are far above what rounding alone does to the outputs. Sources: Micikevicius et
al. 2018, "Mixed precision training"; Kalamkar et al. 2019, "A study of bfloat16 for deep learning training": it has the range of
float32, so that losses need no scale.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from convrewrite.machine import multiplies_halves
from convrewrite.places import PROCESSOR


def halves_pay(model: nn.Module) -> bool:
    """Whether a model runs faster in bfloat16: one in float32, on a processor with units for it."""
    numbers = [p for p in model.parameters() if p.is_floating_point()]
    ours = all(p.dtype == torch.float32 and p.device.type == PROCESSOR for p in numbers)
    return bool(numbers) and ours and multiplies_halves()


def in_halves(wanted: bool = True) -> AbstractContextManager[Any]:
    """Within the block convolutions and products of matrices are in bfloat16, on the processor; not where that is not wanted."""
    return torch.autocast(PROCESSOR, torch.bfloat16, enabled=wanted)
