"""Modules put on other devices, with everything that can be reached from them."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from convrewrite.modules.holders import reachable

Module = TypeVar("Module", bound=nn.Module)


def put_on(device: torch.device, model: Module) -> Module:
    """The model itself, with every tensor moved to ``device``, also those that are in no table of a module. What holds a tensor,
    and which modules share one, stays the same; the gradients of moved tensors are dropped."""
    for value in reachable(model):
        if isinstance(value, Tensor) and not value.is_meta and value.device != device:
            with torch.inference_mode(value.is_inference()), torch.no_grad():
                value.data = value.data.to(device)
                value.grad = None
    return model
