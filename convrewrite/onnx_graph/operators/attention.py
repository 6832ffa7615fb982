"""Attention as one operator, as newer exporters write it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators.computed import Computed, Made, Maker

PLAIN = {"softcap": 0.0, "left_window_size": -1, "right_window_size": -1}
"""Attributes that torch's function lacks -> the values with which they change nothing."""

INPUTS = 4
"""Number of inputs that are used: queries, keys, values and a mask. Further ones belong to a run that continues an earlier
one."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, q_heads: int, kv_heads: int, causal: bool, scale: float | None
) -> Tensor:  # fmt: skip
    """Inputs are (batch, head, place, feature), or have the heads within the features when their numbers are given.

    Where the queries have more heads than the keys, each head of the keys serves several heads of the queries.
    """
    if q.dim() == 3:
        heads = (_with_heads(q, q_heads), _with_heads(k, kv_heads), _with_heads(v, kv_heads))
        return attention(*heads, mask, q_heads=0, kv_heads=0, causal=causal, scale=scale).transpose(1, 2).flatten(2)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if causal and mask is not None:
        before = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = mask & before if mask.dtype == torch.bool else mask.masked_fill(~before, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def make_attention(view: NodeView) -> Made | None:
    """None for a run that continues an earlier one, and for what is not the product of softmax and values."""
    given = view.attributes
    plain = all(given.get(name, value) == value for name, value in PLAIN.items())
    if any(view.present[INPUTS:]) or any(view.outputs[1:]) or not plain:
        return None
    keywords = {"q_heads": given.get("q_num_heads", 0), "kv_heads": given.get("kv_num_heads", 0)}
    return Computed(
        attention, view, {**keywords, "causal": bool(given.get("is_causal", 0)), "scale": given.get("scale")}
    )


ATTENTION: dict[str, Maker] = {"Attention": make_attention}
"""The operator -> its maker."""
