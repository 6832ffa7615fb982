"""Modules that are one node of every graph, whatever their forward does."""

from torch import nn


class Operator(nn.Module):
    """A single operation without convolutions: followed graphs call it and do not look into it."""
