"""Harmless names for the modules of a graph: names are written into source code, and those of a graph may be any text."""

import keyword
import re
from collections.abc import Collection

import onnx
from torch import fx, nn

LONGEST = 80
"""Most characters of a name."""

TAKEN = frozenset({*dir(fx.GraphModule(nn.Module(), fx.Graph())), "self"})
"""Names of attributes that every graph module has, which a part of it would hide or could not take."""

WEIGHT_ENDS = (".weight", "/kernel", "/weight", ".w_0", "_weight", "/Conv2D/ReadVariableOp")
"""Ends of names of weights, behind the name of the layer."""


def identifier(text: str, otherwise: str, taken: Collection[str]) -> str:
    """``text`` in letters, digits and ``_``, unlike those ``taken`` and what every module has as an attribute."""
    plain = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")[:LONGEST] or otherwise
    if plain[0].isdigit() or keyword.iskeyword(plain) or plain in TAKEN:
        plain = f"n_{plain}"
    name, count = plain, 1
    while name in taken:
        count += 1
        name = f"{plain}_{count}"
    return name


def name_of_node(node: onnx.NodeProto, index: int, taken: Collection[str]) -> str:
    """The name of its weight without the ending, otherwise its own, otherwise its operator and position."""
    weight = node.input[1] if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 1 else ""
    stem = next((weight.removesuffix(end) for end in WEIGHT_ENDS if weight.endswith(end)), "")
    return identifier(stem or node.name, f"{node.op_type.lower()}_{index}", taken)
