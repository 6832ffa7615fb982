"""Stage kernels of a whole site as one kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from convrewrite.structures import Stage, compose


def composed_kernel(kernels: Sequence[Tensor], stages: Sequence[Stage], groups: int) -> Tensor:
    """The canonical kernel that the stages of a site amount to, all groups of the original joined."""
    per_group = zip(*(stage.chunk(groups) for stage in kernels), strict=True)
    return torch.cat([compose(parts, stages) for parts in per_group])
