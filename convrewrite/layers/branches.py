"""A sum of parallel chains: how a multiplier above one runs fast.

``groups=C, out=r*C`` and r separate depthwise convolutions compute the same numbers, but runtimes have fast kernels for the
latter only.
"""

from collections.abc import Iterable

from torch import Tensor, nn


class SumOfBranches(nn.ModuleList):
    """``(N, C, H, W)`` -> the sum of what every branch makes of it. One branch carries the bias of all."""

    def __init__(self, branches: Iterable[nn.Module]) -> None:
        super().__init__(branches)

    def forward(self, input: Tensor) -> Tensor:
        """The sum, in the order of the branches. The argument has the name that the replaced convolution gives it."""
        total = input  # TorchScript cannot unpack a list of modules like a tuple
        for index, branch in enumerate(self):
            total = branch(input) if index == 0 else total + branch(input)
        return total
