"""Modules put on other devices, with everything that can be got at from them."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from convrewrite.modules.holders import reachable

Module = TypeVar("Module", bound=nn.Module)


def put_on(device: torch.device, model: Module) -> Module:
    """The model itself, every tensor of which then lies on ``device``, also those that stand in no table of a module. Who holds a
    tensor, and which modules share one, stays."""
    for value in reachable(model):
        if isinstance(value, Tensor) and not value.is_meta and value.device != device:
            with torch.inference_mode(value.is_inference()), torch.no_grad():
                value.data = value.data.to(device)
                value.grad = None
    return model
