"""docs/layers.md: its examples run, and its table's formulas give the costs that the layers count."""

import re
from pathlib import Path
from typing import Any

import pytest

from convrewrite import layers

PAGE = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")

C, O, K, H, W, S, G, R, M, HIDDEN, KERNELS = 16, 24, 3, 12, 10, 2, 4, 5, 3, 4, 6  # noqa: E741
SIZES = {
    "C": C, "O": O, "k": K, "H": H, "W": W, "H'": H // S, "W'": W // S, "g": G, "r": R, "R": R, "m": M, "h": HIDDEN,
    "K": KERNELS,
}  # fmt: skip
PLAIN: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "`StandardConv2d`": (layers.StandardConv2d, {}),
    "`PointwiseConv2d`": (layers.PointwiseConv2d, {"groups": G}),
    "`AsymmetricConv2d`": (layers.AsymmetricConv2d, {"rank": R}),
    "`DilatedConv2d`": (layers.DilatedConv2d, {"groups": G}),
    "`DepthwiseConv2d`": (layers.DepthwiseConv2d, {}),
    "`GroupedConv2d`": (layers.GroupedConv2d, {"groups": G}),
    "the same with `mix=True`": (layers.GroupedConv2d, {"groups": G, "mix": True, "rank": R}),
    "`SeparableConv2d`": (layers.SeparableConv2d, {"multiplier": M}),
    'the same, `order="pointwise-first"`': (layers.SeparableConv2d, {"multiplier": M, "order": "pointwise-first"}),
    "`TransposedConv2d`": (layers.TransposedConv2d, {"groups": G}),
    "`DynamicConv2d`": (layers.DynamicConv2d, {"groups": G, "kernels": KERNELS, "reduction": C // HIDDEN}),
}


def value(formula: str, sizes: dict[str, int]) -> int:
    """``R k (C + O)`` with numbers in the place of names."""
    factors = re.findall(r"[A-Za-z]'?|²|[+/()]|\d+", formula)
    code = ""
    for factor in factors:
        if factor == "²":
            code += "**2"
            continue
        starts = factor not in "+/)"
        code += ("*" if starts and code and code[-1] not in "+/(" else "") + str(sizes.get(factor, factor))
    result = eval(code)  # a formula of this repository's own page
    assert result == int(result)
    return int(result)


def rows() -> dict[str, list[str]]:
    table = PAGE.split("## The kinds")[1].split("## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: [cell.strip("`") for cell in row] for row in cells[2:]}


def test_every_layer_has_a_row() -> None:
    assert rows().keys() == PLAIN.keys()


@pytest.mark.parametrize("name", PLAIN)
def test_the_formulas_are_the_costs(name: str) -> None:
    kind, arguments = PLAIN[name]
    outputs = 2 * C if kind is layers.DepthwiseConv2d else O
    cost = kind(C, outputs, stride=S, bias=False, **arguments).cost((H, W))
    with_bias = kind(C, outputs, stride=S, **arguments).cost((H, W))
    _, _, parameters, macs, _ = rows()[name]
    sizes = {**SIZES, "O": outputs}
    assert cost.parameters == value(parameters, sizes)
    dynamic = kind is layers.DynamicConv2d
    assert with_bias.parameters - cost.parameters == outputs * (KERNELS if dynamic else 1)
    assert (with_bias if dynamic else cost).macs == value(macs, sizes)


@pytest.mark.filterwarnings("error")
def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
