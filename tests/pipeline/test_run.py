"""One run, from what is prepared to its result, with a timer handed in that lies."""

import copy
from dataclasses import replace

import pytest
import torch
from clocks import FalseTimer
from networks import Residual, natural, settled, state_bytes
from torch import nn

from convrewrite.errors import ExportError, PlanError, UsageError
from convrewrite.meanings.kinds import Meaning
from convrewrite.onnx_files import OnnxModel, Provenance
from convrewrite.pipeline import gathering
from convrewrite.pipeline.notes import NOT_MEASURED
from convrewrite.pipeline.prepare import prepare
from convrewrite.pipeline.run import Run
from convrewrite.planning import Fingerprint
from convrewrite.progress import Stopwatch, silent
from convrewrite.results.folder import Result
from convrewrite.rules.schema import Protect, Rule
from convrewrite.runtime.timing import Unmeasured
from convrewrite.settings import Constraints, Keep, Settings

X = torch.randn(2, 3, 8, 8)
RULE = Rule(name="r", structures=("channel",), ratio=0.6, protect=Protect(min_channels=0, min_mac_share=0))
INPUTS = natural(32, 3, 8, 8, torch.float32)
UNMEASURED = Settings(memory=1 << 30, fast=True, measure=False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return settled(Residual())


def begin(model: nn.Module, settings: Settings = UNMEASURED, calibration: object = INPUTS, **asked: object) -> Run:
    prepared = prepare(copy.deepcopy(model), (X.to(next(model.parameters()).dtype),), [RULE], original=model)
    constraints = Constraints(**{"budget": {}} | asked)  # type: ignore[arg-type]
    return Run.begin(prepared, calibration, constraints, settings, silent, Stopwatch())


def finished(model: nn.Module, settings: Settings = UNMEASURED, **options: object) -> Result:
    run = begin(model, settings, **options)  # type: ignore[arg-type]
    return run.finish(run.planner.choose(), "a network", ["as the caller says"])


@pytest.fixture(scope="module")
def measured() -> tuple[Result, FalseTimer]:
    timer = FalseTimer(ratio=0.6)
    return finished(network(), replace(UNMEASURED, measure=True, timer=timer, threads=2), budget={"macs": 0.7}), timer


def test_what_is_shared_is_made_before_anything_is_chosen() -> None:
    run = begin(network())
    assert (len(run.work.data.fit), run.baseline) == (1, None)
    assert isinstance(run.planner.baseline, Unmeasured)
    assert sum(len(batch[0]) for batch in (*run.work.data.fit, *run.work.data.held_out)) == len(INPUTS)
    assert run.work.evaluation.meanings["output"].kind == "logits"
    assert run.work.weights.keys() == {site.name for site in run.work.prepared.rewritable}
    assert {"calibrate", "output weights"} <= run.work.watch.seconds.keys()


def test_the_seed_says_which_inputs_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(*_given: object, seed: int, **_named: object) -> None:
        raise UsageError(f"seed {seed}")

    with monkeypatch.context() as patch:
        patch.setattr(gathering, "calibrate", split)
        with pytest.raises(UsageError, match=r"^seed 7$"):
            begin(network(), replace(UNMEASURED, seed=7))


def test_a_graph_is_tried_on_the_inputs_that_it_is_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """They, unlike an example, may lead into a loop that does not end."""

    def endless(_model: nn.Module, batches: object) -> None:
        assert batches
        raise UsageError("without an end")

    monkeypatch.setattr(gathering, "require_end", endless)
    with pytest.raises(UsageError, match="without an end"):
        begin(network())


def test_outputs_are_weighed_only_where_that_is_asked_and_there_are_inputs() -> None:
    assert begin(network(), replace(UNMEASURED, output_weighting=False)).work.weights == {}
    assert begin(network(), calibration="weights").work.weights == {}


def test_a_result_says_what_was_asked_and_what_became_of_it() -> None:
    model = network()
    before = state_bytes(model)
    result = finished(model)
    report = result.report
    assert report.model == "a network"
    assert {"as the caller says", NOT_MEASURED} <= set(report.notes)
    assert report.totals.macs.before > report.totals.macs.after
    assert report.totals.parameters.after == sum(parameter.numel() for parameter in result.model.parameters())
    assert (report.totals.onnx_latency_seconds, report.parity) == (None, ())
    assert [site.name for site in report.sites] == [site.name for site in result.plan.sites]
    assert state_bytes(model) == before
    assert isinstance(result.model, Residual)


def test_where_nothing_is_rewritten_a_note_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    notes = finished(model, calibration="weights").report.notes
    assert any(note.startswith("no site was rewritten") for note in notes)


def test_a_measured_result_is_exported_and_timed_against_the_original(measured: tuple[Result, FalseTimer]) -> None:
    result, timer = measured
    totals = result.report.totals
    assert totals.onnx_latency_seconds is not None
    assert totals.onnx_latency_seconds.ratio == 0.6
    assert totals.predicted_onnx_latency_seconds is not None
    assert all(row.passed for row in result.report.parity)
    assert NOT_MEASURED not in result.report.notes
    assert timer.asked, "options are lowered as they run fastest"
    assert (timer.threads, result.report.threads) == ({2}, 2)
    assert result._onnx is not None
    assert (
        OnnxModel(result._onnx).metadata
        == Provenance(
            str(result.plan.model), str(Fingerprint.of(result.model)), result.plan.tool_version, result.plan.meanings()
        ).metadata()
    )
    assert {path.name for path in timer.compared[0][:2]} == {"original.onnx", "model.onnx"}  # type: ignore[attr-defined]


def test_a_plan_is_followed_but_for_sites_that_cannot_be() -> None:
    run = begin(network())
    choice = run.planner.choose()
    plan = run.planner.plan(choice)
    result = run.finish(choice, "a network", (), plan)
    assert result.plan.model == plan.model
    assert [site.option for site in result.plan.sites] == [site.option for site in plan.sites]


def test_only_choosing_fits_nothing() -> None:
    run = begin(network(), budget={"macs": 0.7})
    plan = run.plan()
    assert plan.budget == {"macs": 0.7}
    assert any(site.option is not None for site in plan.sites)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (UsageError, "nowhere", {"outputs": {"nowhere": Meaning("values", "asked for")}}),
        (PlanError, "keep", {"keep": Keep("agreement", 0.9), "calibration": "weights"}),
    ],
    ids=["an output that is not there", "a fidelity without inputs"],
)
def test_what_cannot_be_done_is_refused_before_a_choice(
    error: type[Exception], message: str, options: dict[str, object]
) -> None:
    with pytest.raises(error, match=message):
        begin(network(), **options)  # type: ignore[arg-type]


def test_a_dtype_that_onnxruntime_has_not_is_refused_at_once() -> None:
    timer = FalseTimer()
    with pytest.raises(ExportError, match="expected float32 weights"):
        begin(network().double(), replace(UNMEASURED, measure=True, timer=timer))
    assert timer.compared == []
