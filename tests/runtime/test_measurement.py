"""What is measured on a finished model, with a timer handed in that lies."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, compared
from torch import nn

from convrewrite.meanings.evaluation import Evaluation
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.reporting.verdict import unshown
from convrewrite.runtime.exporting import TorchExporter
from convrewrite.runtime.measurement import (
    PARITY_EXAMPLES,
    Measured,
    _few,
    _latency,
    measure_everything,
    measure_outputs,
)
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.timing import Baseline
from convrewrite.targets import TorchEager

X = torch.randn(12, 1, 6, 6)
BASIS = "12 random inputs"


def networks() -> tuple[nn.Module, nn.Module]:
    """An original, and one that is a little off."""
    original = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    other = copy.deepcopy(original)
    with torch.no_grad():
        other[2].weight.mul_(1.01)
    return original, other


def evaluation_of(model: nn.Module) -> Evaluation:
    return Evaluation(((X,),), BASIS).with_meanings(model, {})


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Baseline, FalseTimer, list[str]]:
    original, other = networks()
    timer, stages = FalseTimer(ratio=0.6), list[str]()
    baseline = Baseline.of(original, (X[:2],), tmp_path_factory.mktemp("measured"), timer, 1, TorchExporter())
    found = measure_everything(
        original,
        other,
        (X[:2],),
        evaluation_of(original),
        baseline,
        {"said": "so"},
        lambda *said: stages.append(said[3]),
    )
    return found, baseline, timer, stages


def test_outputs_alone_are_fidelity_and_nothing_else() -> None:
    original, other = networks()
    found = measure_outputs(original, other, replace(evaluation_of(original), noise=True))
    [row] = found.fidelity.outputs
    assert 0 < row.relative_error < 0.02
    assert (found.fidelity_basis, found.noise) == (BASIS, True)
    assert (found.parity, found.file_bytes, found.onnx_latency, found.torch_latency) == (None, None, None, None)
    assert not found.slower


def test_everything_is_the_same_fidelity_and_what_the_files_give(
    everything: tuple[Measured, Baseline, FalseTimer, list[str]],
) -> None:
    found, baseline, _, stages = everything
    assert found.fidelity.examples == len(X)
    assert found.parity is not None
    assert all(output.passed for output in found.parity.outputs)
    assert found.file_bytes == (baseline.original.path.stat().st_size, baseline.result.stat().st_size)
    assert OnnxModel(baseline.result).metadata["said"] == "so"
    assert stages[-1] == "done"
    assert len(X) > PARITY_EXAMPLES


def test_both_are_timed_on_one_example_the_original_first(
    everything: tuple[Measured, Baseline, FalseTimer, list[str]],
) -> None:
    found, baseline, timer, _ = everything
    assert found.onnx_latency == compared(0.6)()
    assert found.torch_latency == compared(0.6, "torch")()
    (first, second, inputs), (before, after, _) = timer.compared
    assert (first, second) == (baseline.original.path, baseline.result)
    assert isinstance(before, nn.Module)
    assert before is not after
    assert len(inputs[0]) == 1


@pytest.mark.parametrize(("ratio", "slower"), [(0.9, False), (1.005, False), (1.2, True)])
def test_slower_is_what_three_quarters_of_the_rounds_found_slower(ratio: float, slower: bool) -> None:
    """Their quartiles lie a hundredth around the ratio."""
    original, other = networks()
    found = replace(measure_outputs(original, other, evaluation_of(original)), onnx_latency=compared(ratio)())
    assert found.slower == slower


@pytest.mark.parametrize(
    ("before", "after", "examples"), [(True, True, 1), (True, False, 3), (False, True, 3), (False, False, 3)]
)
def test_files_are_timed_on_what_both_take_and_told_for_one(
    before: bool, after: bool, examples: int, tmp_path: Path
) -> None:
    timer, (original, other) = FalseTimer(ratio=0.6), networks()
    exported = Exported(tmp_path / "original.onnx", before), Exported(tmp_path / "model.onnx", after)
    baseline = Baseline(exported[0], (X[:3],), tmp_path, timer, 1, TorchExporter())
    found = _latency(original, other, baseline, exported[1])
    assert (found.seconds_a, found.seconds_b, found.ratio) == (1 / examples, 0.6 / examples, 0.6)
    [(_, _, (x,))] = timer.compared
    assert len(x) == examples


@pytest.mark.parametrize(("dynamic", "examples"), [(True, 1), (False, 3)])
def test_modules_are_timed_on_what_the_original_takes(dynamic: bool, examples: int, tmp_path: Path) -> None:
    timer, (original, other) = FalseTimer(ratio=0.6), networks()
    exported = Exported(tmp_path / "original.onnx", dynamic)
    baseline = Baseline(exported, (X[:3],), tmp_path, timer, 1, TorchExporter(), TorchEager(), original)
    found = _latency(original, other, baseline, exported)
    assert (found.seconds_a, found.runtime) == (1 / examples, "torch")
    [(a, b, (x,))] = timer.compared
    assert (a, b, len(x)) == (original, other, examples)


@pytest.mark.parametrize(
    ("given", "batch", "examples"), [(12, None, 8), (5, None, 5), (12, 10, 10), (3, 10, 10), (12, 2, 8)]
)
def test_parity_is_decided_on_few_examples_and_on_a_whole_batch(given: int, batch: int | None, examples: int) -> None:
    (few,) = _few((X[:given],), batch)
    assert len(few) == examples
    assert torch.equal(few[: min(given, examples)], X[: min(given, examples)])


def test_fidelity_on_outputs_that_never_change_is_told_to_show_nothing() -> None:
    """A dead ReLU, or inputs prepared otherwise than in training: every error is 0, whatever is lost."""
    alive, _ = networks()
    dead = nn.Sequential(copy.deepcopy(alive), nn.Hardtanh(1e9, 2e9))
    assert not measure_outputs(alive, alive, evaluation_of(alive)).fidelity.constant
    found = measure_outputs(dead, dead, evaluation_of(dead))
    (told,) = unshown(found)
    assert "the same outputs for all of the 12 inputs" in told
    assert "prepared as in training" in told
    assert "give real inputs (--calib)" in unshown(replace(found, noise=True))[0]
    one = replace(found, fidelity=replace(found.fidelity, examples=1))
    assert unshown(one) == (), "of one input, given several times to a file that takes whole batches, nothing is known"
