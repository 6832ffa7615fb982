"""Convolution modules: the nine kinds under one signature, and what rewritten sites become.

Every layer takes ``(in_channels, out_channels, kernel_size=3, stride=1, padding="same", dilation=1, groups=1,
bias=True, padding_mode="zeros", device=None, dtype=None)`` and by keyword what its kind needs. ``from_conv`` makes it
from a trained convolution, ``cost((height, width))`` says what it costs. docs/layers.md has a table of them.
"""

from convrewrite.layers.asymmetric import AsymmetricConv2d
from convrewrite.layers.branches import SumOfBranches
from convrewrite.layers.dynamic import DynamicConv2d
from convrewrite.layers.dynamic import KernelAttention as KernelAttention
from convrewrite.layers.dynamic import stack as stack
from convrewrite.layers.dynamic_chain import DynamicChain as DynamicChain
from convrewrite.layers.dynamic_chain import attention_parameters as attention_parameters
from convrewrite.layers.grouped import GroupedConv2d
from convrewrite.layers.separable import SeparableConv2d
from convrewrite.layers.single import DepthwiseConv2d, DilatedConv2d, PointwiseConv2d, StandardConv2d
from convrewrite.layers.transposed import TransposedConv2d

__all__ = [
    "AsymmetricConv2d",
    "DepthwiseConv2d",
    "DilatedConv2d",
    "DynamicConv2d",
    "GroupedConv2d",
    "PointwiseConv2d",
    "SeparableConv2d",
    "StandardConv2d",
    "SumOfBranches",
    "TransposedConv2d",
]
