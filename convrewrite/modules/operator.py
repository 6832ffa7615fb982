"""What modules that are made here consist of: single operations, and objects that all copies of a module share."""

from typing import Any

from torch import nn


class Operator(nn.Module):
    """A single operation without convolutions: followed graphs call it and do not look into it."""


class Shared:
    """Something without state, and without parts of a model, that a module and all its copies hold."""

    __slots__ = ()

    def __deepcopy__(self, _memo: Any) -> "Shared":
        """Itself."""
        return self
