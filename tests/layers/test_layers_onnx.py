from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import LAYERS, build

from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity, require_parity

CASES = [(name, {}) for name in LAYERS if not name.endswith("first") and name != "grouped"]
CASES += [
    ("separable", {"kernel_size": 4, "stride": 2, "padding_mode": "reflect"}),
    ("transposed", {"kernel_size": 4, "stride": 1}),
    ("dynamic", {"kernel_size": (2, 3), "stride": (2, 1), "groups": 4, "padding_mode": "circular", "dilation": 2}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_layer_exports_with_a_dynamic_batch_and_onnxruntime_agrees(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    layer = build(name, **changes)
    exported = export(layer, (torch.randn(1, 8, 11, 14),), tmp_path / "layer.onnx")
    assert exported.dynamic_batch
    assert exported.note is None
    parity = check_parity(layer, exported.path, (torch.randn(5, 8, 11, 14),))
    require_parity(parity)
    assert parity.inputs_checked == 2  # a batch of five and one of one
