"""Twelve networks of pytorchcv, where it is installed, chosen for what their forwards do and built as small as they allow."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import settled
from torch import Tensor, nn
from works import work_of
from zoo import choose_channels, exact_shortlist

from convrewrite import optimize
from convrewrite.calibration.batches import Calibration
from convrewrite.graph.sites import Site
from convrewrite.pipeline.prepare import prepare
from convrewrite.rewriting.front_to_back import rewrite
from convrewrite.rewriting.surgery import settle
from convrewrite.rules.files import resolve
from convrewrite.runtime.comparison import measure_fidelity
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity

pytest.importorskip("pytorchcv.models")

pytestmark = pytest.mark.slow

Build = Callable[[], nn.Module]


def zoo(name: str, *arguments: object) -> Build:
    """Of "module.Class"; imported when it is built."""
    module, _, kind = name.partition(".")
    return lambda: getattr(importlib.import_module(f"pytorchcv.models.{module}"), kind)(*arguments)


def simple_pose() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
    return zoo("simplepose_coco.SimplePose", backbone, 16, [32, 32], True)()


NETWORKS = {
    "tresnet: functional convolutions on kernels made at every call": (
        zoo("tresnet.TResNet", [[16], [32], [64]], 16, [False, False, True]), (3, 32, 32), 14,
    ),
    "octresnet: a subclass of Conv2d with two inputs and outputs": (
        zoo("octresnet.OctResNet", [[16], [32], [32]], 16, False, False), (3, 112, 112), 1,
    ),
    "sharesnet: one convolution called by several blocks": (
        zoo("sharesnet.ShaResNet", [[16, 16], [32, 32, 32]], 16, False, False), (3, 56, 56), 8,
    ),
    "isqrtcovresnet: functions with a backward of their own, which no graph can follow": (
        zoo("isqrtcovresnet.iSQRTCOVResNet", [[16], [32]], 16, 16, False, False), (3, 32, 32), 6,
    ),
    "fractalnet: a random choice of columns": (
        zoo("fractalnet_cifar.CIFARFractalNet", [16, 32, 32, 32, 16], 2, [0.0] * 5, 0.15, 0.5), (3, 32, 32), 12,
    ),
    "segnet: unpooling where the pooling took its values from": (
        zoo("segnet.SegNet", [[16, 16, 32, 32, 32], [32, 32, 16, 16, 16]], [[2] * 5, [2] * 5]), (3, 32, 32), 10,
    ),
    "shufflenetv2: channels shuffled and split": (
        zoo("shufflenetv2.ShuffleNetV2", [[24, 24], [48, 48]], 16, 64), (3, 112, 112), 5,
    ),
    "condensenet: channels picked by an index": (
        zoo("condensenet.CondenseNet", [[32, 48], [64, 96]], 16, 4), (3, 28, 28), 8,
    ),
    "lffd: several outputs": (zoo("lffd.LFFD", [16, 16], 32, 16, [2, 1], [0, 0], False), (3, 64, 64), 14),
    "diaresnet: attention by an LSTM that all blocks share": (
        zoo("diaresnet_cifar.CIFARDIAResNet", [[16, 16], [32, 32]], 16, False), (3, 16, 16), 9,
    ),
    "irevnet: pairs of tensors through all blocks": (
        zoo("irevnet.IRevNet", [[24, 24], [96, 96]], 12, 192), (3, 56, 56), 6,
    ),
    "simplepose: transposed convolutions": (simple_pose, (3, 32, 32), 3),
}  # fmt: skip
"""By what is special about it: how it is built, its input, and how many sites are rewritten at half their MACs."""

LONG = ("irevnet", "fractalnet", "diaresnet", "octresnet")
"""Those whose export takes longest."""

every_network = pytest.mark.parametrize(("build", "shape", "count"), NETWORKS.values(), ids=NETWORKS)


def network(build: Build) -> nn.Module:
    torch.manual_seed(0)
    model = settled(build())
    choose_channels(model)
    return model


@every_network
def test_full_rank_gives_the_originals_outputs(build: Build, shape: tuple[int, ...], count: int) -> None:
    model = network(build).double()
    x = torch.randn(2, *shape, dtype=torch.float64)
    prepared = prepare(model, (x,), resolve(["balanced"]))
    shortlists = [exact_shortlist(space, index) for index, space in enumerate(prepared.search_spaces)]
    work = work_of(prepared.model, Calibration((), (), "weights only", "none"))
    found = rewrite(replace(work, prepared=prepared), shortlists)
    changed = [outcome.site for outcome in found.outcomes if outcome.candidate is not None]
    rewritten = settle(model, prepared.lifted, found.model, changed).model
    assert len(changed) >= count
    assert heard(model, x)
    assert not [site.name for site in changed if not matters(prepared.model, site, x)]
    assert all(row.relative_error < 1e-10 for row in measure_fidelity(model, rewritten, [(x,)]).outputs)


def heard(model: nn.Module, x: Tensor) -> bool:
    """Whether the outputs depend on the input at all."""
    return any(row.relative_error > 0 for row in measure_fidelity(model, lambda y: model(-y), [(x,)]).outputs)


@torch.no_grad()
def matters(model: nn.Module, site: Site, x: Tensor) -> bool:
    """Whether the outputs would show another kernel at a site."""
    other = copy.deepcopy(model)
    other.get_submodule(site.name).weight.mul_(1.5)  # type: ignore[operator]
    return any(row.relative_error > 1e-8 for row in measure_fidelity(model, other, [(x,)]).outputs)


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [
        pytest.param(*entry, id=name, marks=[pytest.mark.soak] if name.startswith(LONG) else [])
        for name, entry in NETWORKS.items()
    ],
)
def test_half_of_every_site_is_computed_by_onnxruntime(
    build: Build, shape: tuple[int, ...], count: int, tmp_path: Path
) -> None:
    model = network(build)
    x = torch.randn(1, *shape)
    result = optimize(model, x, ["balanced"], "weights", measure=False)
    assert sum(row.action == "rewritten" for row in result.report.sites) == count
    assert result.report.totals.macs.ratio < 1
    exported = export(result.model, x, tmp_path / "model.onnx")
    assert check_parity(result.model, exported.path, (x,)).passed
