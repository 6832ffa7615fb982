"""Each of the nine kinds goes in at the command line and comes out of onnxruntime."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from clocks import FalseTimer, in_place_of_this_machine
from commands import call
from model_files import forget_modules_below
from networks import relative
from torch import Tensor, nn

import convrewrite
from convrewrite.loading.user_code import import_object
from convrewrite.reporting.report import Report, SiteRow
from convrewrite.runtime.parity import tolerance_for

pytestmark = pytest.mark.slow

MODELS = """
import torch
from clocks import FalseTimer, in_place_of_this_machine
from torch import nn
from convrewrite.layers.dynamic import DynamicConv2d

W = 16

def net(*layers):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, W, 3, padding=1), nn.ReLU())
    return nn.Sequential(stem, nn.Sequential(*layers), nn.ReLU(), nn.Conv2d(W, 4, 1))

def standard():
    return net(nn.Conv2d(W, W, 3, padding=1))

def pointwise():
    return net(nn.Conv2d(W, W, 1))

def asymmetric():
    return net(nn.Conv2d(W, W, (1, 5), padding=(0, 2)))

def dilated():
    return net(nn.Conv2d(W, W, 3, padding=2, dilation=2, padding_mode="reflect"))

def depthwise():
    return net(nn.Conv2d(W, W, 3, padding=1, groups=W))

def grouped():
    return net(nn.Conv2d(W, W, 5, padding=2, groups=2))

def separable():
    return net(nn.Conv2d(W, W, 3, stride=2, padding=1, groups=W), nn.Conv2d(W, W, 1))

def transposed():
    return net(nn.ConvTranspose2d(W, W, 4, stride=2, padding=1))

def dynamic():
    return net(DynamicConv2d(W, W, 3, padding=1, kernels=2))
"""

RULE = """
schema = 1
[[rule]]
name       = "generous"
match      = { kind = ["standard", "pointwise", "asymmetric", "dilated", "grouped", "transposed", "dynamic"] }
structures = ["separable", "asymmetric", "grouped", "channel", "tucker", "cp"]
ratio      = 0.8
"""

SMALLER = ["standard", "pointwise", "asymmetric", "dilated", "grouped", "transposed", "dynamic"]
LEFT_ALONE = {"depthwise": "kind is depthwise, the rule takes", "separable": "kind is separable, the rule takes"}
LARGEST_ERROR = 0.12
"""Of the whole output, relative. The weights are random, the hardest to factorise; trained ones lose far less."""


@dataclass(frozen=True)
class Went:
    """What came out for one kind."""

    original: nn.Module
    rewritten: nn.Module
    session: Any
    report: Report

    @property
    def rows(self) -> list[SiteRow]:
        """Those between the stem and the head."""
        return list(self.report.sites[1:-1])


def images(count: int, seed: int) -> Tensor:
    """Smooth noise (N, 3, 12, 12)."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(noise, size=(12, 12), mode="bilinear", align_corners=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("nine")
    (folder / "nine_kinds_of_user.py").write_text(MODELS)
    (folder / "generous.toml").write_text(RULE)
    np.save(folder / "images.npy", images(80, seed=1).numpy())
    yield folder
    forget_modules_below(folder)


def went(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Went:
    """The kind's network from a state dict to a result folder, untimed."""
    in_place_of_this_machine(monkeypatch, FalseTimer())
    factory, out = f"{place}/nine_kinds_of_user.py:{kind}", place / f"{kind}-out"
    original = import_object(factory)().eval()
    torch.save(original.state_dict(), place / f"{kind}.pt")
    options = ("--rule", place / "generous.toml", "--calib", place / "images.npy")
    ran = call("optimize", place / f"{kind}.pt", "--factory", factory, *options, "-o", out)
    assert ran.code == 0, ran.err
    return Went(
        original,
        convrewrite.load(out, import_object(factory)()).eval(),
        onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"]),
        Report.model_validate_json((out / "report.json").read_text()),
    )


def outputs(found: Went, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the original, the rewritten model and its ONNX file."""
    with torch.no_grad():
        before, after = found.original(inputs), found.rewritten(inputs)
    (exported,) = found.session.run(["output"], {"input": inputs.numpy()})
    return before, after, torch.from_numpy(exported)


def require_parity(found: Went) -> None:
    for batch in (1, 5):
        _, after, exported = outputs(found, torch.randn(batch, 3, 12, 12))
        assert exported.shape == after.shape
        assert float((exported - after).abs().max() / after.abs().max()) <= tolerance_for(torch.float32)
    assert all(row.passed for row in found.report.parity)


@pytest.mark.parametrize("kind", SMALLER)
def test_what_becomes_smaller(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = went(place, kind, monkeypatch)
    (row,) = found.rows
    assert (row.kind, row.action) == (kind, "rewritten")
    assert row.macs_after <= 0.8 * row.macs_before
    assert row.parameters_after < row.parameters_before
    require_parity(found)
    for batch in (1, 5):
        before, after, exported = outputs(found, images(batch, seed=2))
        assert relative(after, before) < LARGEST_ERROR
        assert relative(exported, before) < LARGEST_ERROR


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_is_left_alone_is_the_same(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = went(place, kind, monkeypatch)
    assert {row.kind for row in found.rows} == {kind}
    assert len(found.rows) == (2 if kind == "separable" else 1)
    for row in found.rows:
        assert row.action == "kept"
        assert (row.reason or "").startswith(LEFT_ALONE[kind])
    require_parity(found)
    for batch in (1, 5):
        before, after, exported = outputs(found, images(batch, seed=2))
        assert torch.equal(after, before)
        assert relative(exported, before) <= tolerance_for(torch.float32)
