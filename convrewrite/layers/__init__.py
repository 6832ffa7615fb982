"""Convolution modules: the ones that rewritten sites become."""

from convrewrite.layers.branches import SumOfBranches

__all__ = ["SumOfBranches"]
