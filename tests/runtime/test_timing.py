"""The original that everything is timed against, with a timer handed in that lies."""

from pathlib import Path

import pytest
import torch
from clocks import FalseTimer
from torch import nn

from convrewrite.errors import ExportError, PlanError
from convrewrite.runtime.exporting import TorchExporter
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.timing import Baseline, Unmeasured

X = torch.randn(4, 1, 6, 6)


def baseline_of(path: Path, timer: FalseTimer, dynamic: bool = True) -> Baseline:
    return Baseline(Exported(path / "original.onnx", dynamic), (X,), path, timer, 1, TorchExporter())


def test_the_original_is_timed_on_one_example(tmp_path: Path) -> None:
    timer = FalseTimer(file_seconds=0.5)
    assert baseline_of(tmp_path, timer).seconds() == 0.5
    [(path, (x,))] = timer.timed
    assert path == tmp_path / "original.onnx"
    assert torch.equal(x, X[:1])


def test_one_of_a_fixed_batch_is_timed_on_all_and_told_for_one(tmp_path: Path) -> None:
    timer = FalseTimer(file_seconds=0.5)
    assert baseline_of(tmp_path, timer, dynamic=False).seconds() == 0.5 / 4
    [(_, (x,))] = timer.timed
    assert torch.equal(x, X)


def test_another_model_is_exported_beside_it_and_compared(tmp_path: Path) -> None:
    timer = FalseTimer(ratio=0.7)
    baseline = Baseline.of(nn.Conv2d(1, 2, 3).eval(), (X,), tmp_path, timer, 1, TorchExporter())
    assert baseline.ratio(nn.Conv2d(1, 2, 1).eval()) == 0.7
    [(a, b, (x,))] = timer.compared
    assert a == baseline.original.path != b
    assert {path.parent for path in (a, b, baseline.result)} == {tmp_path}
    assert a.is_file()
    assert b.is_file()
    assert not baseline.result.exists(), "that is for the result"
    assert len(x) == 1


def test_what_onnxruntime_cannot_run_is_refused_before_it_is_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="expected float32 weights, found weight in float64"):
        Baseline.of(nn.Conv2d(1, 2, 3).double(), (X.double(),), tmp_path, FalseTimer(), 1, TorchExporter())
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_measured_times_are_refused_with_what_to_do() -> None:
    for asked in (Unmeasured().seconds, lambda: Unmeasured().ratio(nn.Identity())):
        with pytest.raises(PlanError, match="needs measured times; leave out --no-onnx"):
            asked()
