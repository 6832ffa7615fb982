"""The Python API inside a compression pipeline: rewrite, pass a gate, save, load again, and go on to quantisation.

``python examples/pipeline_api.py [FOLDER]`` writes the result to FOLDER, or to a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from fashion.model import FashionResNet, fashion_resnet
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from torch import Tensor, nn

import convrewrite
from convrewrite.rules import Match, Rule

FASHION = Path(__file__).parent / "fashion"
LEAST_AGREEMENT = 0.95


def trained_model() -> FashionResNet:
    model = fashion_resnet()
    model.load_state_dict(torch.load(FASHION / "fashion.pt", weights_only=True))
    return model.eval()


def images(file: str, count: int) -> Tensor:
    with np.load(FASHION / file) as arrays:
        return torch.from_numpy(arrays["images"][:count]).float() / 255


def agreement(a: nn.Module, b: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((a(inputs).argmax(1) == b(inputs).argmax(1)).float().mean())


def main(folder: Path) -> dict[str, float]:
    """Run the pipeline; returns what its last stages measured."""
    model, calibration = trained_model(), images("calibration.npz", 128)

    # 1. Rewrite the second stage so that at most 80 % of all MACs are left, fitted on unlabelled images.
    rule = Rule(name="second-stage", match=Match(name=r"stage2\..*"), structures=("channel",))
    result = convrewrite.optimize(
        model, calibration[:1], rules=[rule], calibration=calibration, budget={"macs": 0.8}, fast=True, measure=False
    )

    # 2. The gate: stop the pipeline when the rewritten model disagrees too often.
    unseen = images("test.npz", 400)
    agreed = agreement(model, result.model, unseen)
    if agreed < LEAST_AGREEMENT:
        raise SystemExit(f"top-1 agreement {agreed:.1%}, at least {LEAST_AGREEMENT:.0%} is wanted")

    # 3. Save, and load again from the plan and the weights: no code from a file is executed.
    result.save(folder / "rewritten")
    loaded = convrewrite.load(folder / "rewritten", fashion_resnet()).eval()

    # 4. Quantisation comes last. What was rewritten is an ordinary model, for any tool.
    exported = convrewrite.export(loaded, (calibration[:1],), folder / "rewritten.onnx")
    quant_pre_process(exported.path, folder / "prepared.onnx", skip_symbolic_shape=True)
    quantize_dynamic(folder / "prepared.onnx", folder / "int8.onnx", weight_type=QuantType.QUInt8)

    return {
        "macs": result.report.totals.macs.ratio,
        "agreement": agreed,
        "agreement_after_loading": agreement(result.model, loaded, unseen),
        "int8_size": (folder / "int8.onnx").stat().st_size / exported.path.stat().st_size,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        target.mkdir(parents=True, exist_ok=True)
        for name, value in main(target).items():
            print(f"{name:24} {value:.3f}")
