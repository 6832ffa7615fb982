"""What torch's two exporters make of networks of pytorchcv.

Weights are random and BatchNormalizations do something; inputs are small, so that the table is done in time.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from onnx_corpus import Entry
from onnx_inputs import garments, one
from torch import nn
from zoo import settled

SIZE = 64
"""Height and width of the exported networks' images: the least that all six take."""

NETWORKS = {
    "resnet18": "resnet",
    "mobilenetv2_w1": "mobilenetv2",
    "densenet121": "densenet",
    "efficientnet_b0": "efficientnet",
    "shufflenetv2_wd2": "shufflenetv2",
    "squeezenet_v1_1": "squeezenet",
}
"""Networks, and their modules in pytorchcv: with residuals, depthwise layers, concatenations, excitations, shuffles, and one
without BatchNormalization."""

LAST_POOLS = (7, 13)
"""Kernels, in pixels, of those average poolings that take the mean of all that is left of an image of 224 pixels."""

EXPORTERS = (("dynamo", None), ("torchscript", 11), ("torchscript", 13))
"""Exporters and their opsets, None where the exporter chooses."""


def network(name: str) -> nn.Module:
    """A network of pytorchcv that looks trained."""
    build = getattr(importlib.import_module(f"pytorchcv.models.{NETWORKS[name]}"), name)
    torch.manual_seed(0)
    model = settled(build(pretrained=False).eval())
    for parent in list(model.modules()):
        for child, part in list(parent.named_children()):
            if isinstance(part, nn.AvgPool2d) and part.kernel_size in LAST_POOLS:
                setattr(parent, child, nn.AdaptiveAvgPool2d(1))
    return model


def exported(name: str, exporter: str, opset: int | None, folder: Path) -> Path:
    """The network's file, exported unless it is there."""
    path = folder / "exported" / f"{name}_{exporter}_{opset or 'own'}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    image = torch.randn(2, 3, SIZE, SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            program = torch.onnx.export(
                network(name),
                (image,),
                input_names=["image"],
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None
            program.save(str(unfinished), external_data=False)
        else:
            torch.onnx.export(
                network(name),
                (image,),
                str(unfinished),
                input_names=["image"],
                dynamo=False,
                opset_version=opset,
                dynamic_axes={"image": {0: "batch"}},
            )
    return unfinished.replace(path)


def entries() -> tuple[Entry, ...]:
    small = one("image", partial(garments, height=SIZE, width=SIZE))
    makers: list[tuple[str, str, Callable[[Path], Path]]] = [
        (
            f"{name}_{exporter}{opset or ''}",
            f"torch {torch.__version__}, {exporter}",
            partial(exported, name, exporter, opset),
        )
        for name in NETWORKS
        for exporter, opset in EXPORTERS
    ]
    return tuple(Entry(name, source, "exported", make, small, 2) for name, source, make in makers)


EXPORTED = entries()
"""Every network by every exporter."""
