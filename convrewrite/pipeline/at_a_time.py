"""How many examples a model takes at a time, where it does not take any number."""

import torch
from torch import nn

from convrewrite.errors import TraceError
from convrewrite.inputs import Inputs
from convrewrite.modules import kept_outputs
from convrewrite.onnx_graph import batch_of, is_graph


def examples_at_a_time(model: nn.Module, inputs: Inputs) -> int | None:
    """None for any number. An ONNX graph says how many. Any other model that fails on twice its example, or then returns outputs
    of other names (such as a list entry for each example), takes as many as its example holds. Raises TraceError where it does
    not run on its example."""
    if is_graph(model):
        return batch_of(model)
    twice = tuple(torch.cat([tensor, tensor]) if tensor.ndim else tensor for tensor in inputs)
    named = kept_outputs(model, inputs, silent=True).keys()
    try:
        same = kept_outputs(model, twice, silent=True).keys() == named
    except TraceError:
        same = False
    return None if same else len(inputs[0])
