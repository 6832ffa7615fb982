"""A result says what it is worth: useless ones are no success, few positions are told, and all rests on the same inputs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clocks import FalseTimer
from commands import INPUT, call, images, small_network
from torch import Tensor, nn
from torch.nn import functional as F

import convrewrite
from convrewrite.calibration.batches import Calibration
from convrewrite.calibration.choose import evaluation_inputs
from convrewrite.errors import PlanError, UsageError
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.meanings.evaluation import Evaluation
from convrewrite.meanings.fidelity import Fidelity, RunningFidelity, effect_of
from convrewrite.meanings.kinds import Meaning, OutputKind, tell
from convrewrite.onnx_files.provenance import Provenance
from convrewrite.pipeline import gathering, refined
from convrewrite.planning.plan import Plan
from convrewrite.reporting.html import render_html
from convrewrite.reporting.markdown import render_markdown
from convrewrite.reporting.report import Report
from convrewrite.reporting.text import render_text
from convrewrite.reporting.verdict import few_positions, overfitted, useless
from convrewrite.rewriting import output_weighting
from convrewrite.rewriting.output_weighting import output_weights
from convrewrite.runtime import exporting, measurement
from convrewrite.runtime.comparison import measure_fidelity
from convrewrite.runtime.measurement import Measured, measure_everything
from convrewrite.runtime.onnx_export import Exported
from convrewrite.runtime.parity import Parity
from convrewrite.runtime.timing import Baseline
from convrewrite.settings import Constraints, Keep
from convrewrite.tuning import Refined, Refinement

RULE = "separable"
UNCALLED = "does not compute the same any more"


def sensitive_network() -> nn.Sequential:
    """A network whose outputs differ from input to input, as those of a trained one: what it loses shows."""
    model = small_network()
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        scores = model(images(200))
        last.weight.mul_(3 / scores.std(0)[:, None])
        last.bias.sub_(scores.mean(0)).mul_(3 / scores.std(0))
    return model


def lossy(**options: Any) -> convrewrite.Result:
    """Little is left, and little is measured."""
    options = {"calibration": images(80), "budget": {"macs": 0.28}, "measure": False, "fast": True} | options
    return convrewrite.optimize(sensitive_network(), images(1), [RULE], **options)


@pytest.fixture(scope="module")
def useless_result() -> convrewrite.Result:
    return lossy()


# --- results that are useless


def test_a_useless_result_is_no_success(useless_result: convrewrite.Result) -> None:
    report = useless_result.report
    assert report.useless
    assert useless_result.refused == report.warnings[0]
    assert UNCALLED in report.warnings[0]
    for advice in (
        "a run without --fast",
        "more calibration inputs than the 64",
        "--keep 0.98",
        "a larger budget than macs=0.28",
    ):
        assert advice in report.warnings[0]


def test_every_form_says_so_first(useless_result: convrewrite.Result) -> None:
    report = useless_result.report
    text, page, html = render_text(report), render_markdown(report), render_html(report)
    assert text.startswith("Warnings\n- the result does not compute the same any more")
    assert page.index("## Warnings") < page.index("## What was saved")
    assert html.index('class="warnings"') < html.index("<h2")
    for form in (text, page, html):
        assert f"{report.model} {UNCALLED}." in " ".join(form.split())
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_limit_is_the_callers_where_there_is_one() -> None:
    report = lossy(keep={"error": 0.9}).report
    assert (report.useless, report.refused) == (False, None)
    missed = lossy(keep={"error": 0.01}).report
    assert missed.refused is not None
    assert missed.refused.startswith("asked to keep")


def test_on_noise_it_is_a_warning_only() -> None:
    report = lossy(calibration="weights", budget={"macs": 0.28}).report
    assert report.useless
    assert report.refused is None
    assert "real inputs (--calib)" in report.warnings[0]
    assert "--keep" not in report.warnings[0], "there is nothing that it could be measured on"


def test_the_command_ends_with_one_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    torch.save(sensitive_network(), tmp_path / "net.pt")
    np.save(tmp_path / "images.npy", images(80).numpy())
    ran = call(
        "optimize", tmp_path / "net.pt", "-o", tmp_path / "out", "--rule", RULE, "--calib", tmp_path / "images.npy",
        "--budget", "macs=0.28", "--fast", "--no-onnx",
    )  # fmt: skip
    assert ran.code == 1
    assert UNCALLED in ran.message
    assert UNCALLED in ran.out.splitlines()[1]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["useless"] is True


def outcome_of(kind: OutputKind, original: Tensor, found: Tensor) -> Fidelity:
    comparison = RunningFidelity({"output": Meaning(kind, "")})
    comparison.add({"output": original}, {"output": found})
    return Fidelity(comparison.outputs(), len(original))


@pytest.mark.parametrize(
    ("kind", "factor", "lost"),
    [
        ("values", 1.19, False),
        ("values", 1.21, True),
        ("embedding", 1.21, True),
        ("values", math.nan, True),
        ("logits", 1.1, False),
    ],
)
def test_the_limits(kind: OutputKind, factor: float, lost: bool) -> None:
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    measured = Measured(outcome_of(kind, x, x * factor), "measured on a test")
    found = useless(Constraints({}), measured, Calibration((), (), "data", "a test"), fast=False)
    assert (found is not None) == lost
    kept = useless(Constraints({}, Keep("error", 0.5)), measured, Calibration((), (), "data", "a test"), fast=False)
    assert (kept is not None) == (kind == "values" and math.isnan(factor)), "what it is like was asked for"


@pytest.mark.parametrize("constraints", [Constraints({}), Constraints({}, Keep("error", 0.05))], ids=str)
def test_what_ignores_its_inputs_is_useless_whatever_was_to_be_kept(constraints: Constraints) -> None:
    kelvin = 300 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    data = Calibration((), (), "data", "a test")
    for found, lost in ((kelvin.mean().expand_as(kelvin), True), (kelvin + 0.5, False)):
        fidelity = outcome_of("values", kelvin, found)
        assert fidelity.worst_error < 0.01
        told = useless(constraints, Measured(fidelity, "measured"), data, fast=False)
        assert (told is not None) == lost
        assert told is None or ("unexplained variance 98.4 %" in told and "--keep" in told)


def test_top_classes_and_equal_entries_have_a_limit_too() -> None:
    x = torch.tensor([[1.0, 0.99, 0.0]] * 10)
    turned = x.clone()
    turned[:2, 1] = 1.01
    data = Calibration((), (), "data", "a test")
    for kind, a, b in (("logits", x, turned), ("discrete", x.argmax(1), turned.argmax(1))):
        found = useless(Constraints({}), Measured(outcome_of(kind, a, b), "measured"), data, fast=False)  # type: ignore[arg-type]
        assert found is not None
        assert "80.0 %" in found
    assert useless(Constraints({}), Measured(outcome_of("values", x, turned), "measured"), data, fast=False) is None


# --- few positions


def test_few_positions_per_unknown_are_told_by_site() -> None:
    report = lossy(calibration=images(10), budget=None).report
    rows = [row for row in report.sites if row.positions is not None]
    assert rows
    assert {row.unknowns for row in rows} == {16 * 9, 32 * 9}
    few = [row.name for row in rows if row.positions < 5 * row.unknowns]  # type: ignore[operator]
    assert few
    (warning,) = [text for text in report.warnings if "positions per unknown" in text]
    assert all(f"{name} (" in warning for name in few)
    assert warning in " ".join(render_text(report).replace("\n  ", " ").split("\n"))


def test_a_warning_names_a_few_sites_and_counts_the_rest() -> None:
    outcomes: list[Any] = [
        SimpleNamespace(site=SimpleNamespace(name=f"s{i}"), positions=10, unknowns=100) for i in range(8)
    ]
    (warning,) = few_positions(outcomes)
    assert "s4 (10 for 100) and 3 more sites" in warning
    assert few_positions([SimpleNamespace(site=None, positions=500, unknowns=100)]) == ()  # type: ignore[list-item]


# --- overfits


def test_an_overfit_is_told_by_site_with_both_errors() -> None:
    outcomes: list[Any] = [
        SimpleNamespace(site=SimpleNamespace(name="learned"), fit_error=0.10, error=0.30),
        SimpleNamespace(site=SimpleNamespace(name="held"), fit_error=0.10, error=0.11),
        SimpleNamespace(site=SimpleNamespace(name="harmless"), fit_error=0.0, error=0.005),
        SimpleNamespace(site=SimpleNamespace(name="kept"), fit_error=None, error=None),
    ]
    (warning,) = overfitted(outcomes)
    assert "learned (10.0 % against 30.0 %)" in warning
    assert not any(name in warning for name in ("held (", "harmless", "kept"))
    assert overfitted(outcomes[1:]) == ()


def test_few_inputs_end_in_a_warning_of_overfits_and_many_do_not() -> None:
    few, many = (lossy(calibration=images(count), budget=None).report.warnings for count in (3, 512))
    assert any("overfitted" in text for text in few)
    assert not any("overfitted" in text for text in many)


# --- the same inputs


def test_noise_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Evaluation] = []
    used: list[Any] = []
    monkeypatch.setattr(
        gathering, "evaluation_inputs", lambda *args: drawn.append(evaluation_inputs(*args)) or drawn[-1]
    )

    def fidelity(_a: object, _b: object, batches: Any, meanings: Any) -> Fidelity:
        used.append(batches)
        return measure_fidelity(_a, _b, batches, meanings)  # type: ignore[arg-type]

    monkeypatch.setattr(measurement, "measure_fidelity", fidelity)
    convrewrite.optimize(small_network(), images(1), [RULE], "weights", measure=False)
    assert len(drawn) == 1
    assert used == [drawn[0].batches]


def test_parity_runs_on_the_first_of_the_inputs_of_fidelity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked: list[Any] = []

    def parity(_model: nn.Module, _file: object, inputs: Any, *, meanings: Any, **_named: object) -> Parity:
        checked.append((inputs, meanings))
        return Parity((), 1)

    def exported(_model: nn.Module, _inputs: Any, path: Path, *, metadata: Any, **_asked: Any) -> Exported:
        path.write_text(json.dumps(metadata))
        return Exported(path, True)

    monkeypatch.setattr(measurement, "check_parity", parity)
    monkeypatch.setattr(exporting, "export", exported)
    monkeypatch.setattr(exporting, "OnnxModel", lambda _path: SimpleNamespace(batch=None))
    monkeypatch.setattr(measurement, "size_of", lambda _path: 1)
    model, path = small_network(), tmp_path / "a.onnx"
    path.touch()
    evaluation = evaluation_inputs((images(1),), Calibration((), (), "weights only", "none")).with_meanings(model, {})
    baseline = Baseline(Exported(path, True), (images(1),), tmp_path, FalseTimer(), 1, exporting.TorchExporter())
    measure_everything(model, model, (images(1),), evaluation, baseline, {"a": "b"}, lambda *_: None)
    ((inputs, meanings),) = checked
    assert torch.equal(inputs[0], evaluation.batches[0][0][:8])
    assert meanings == evaluation.meanings
    assert json.loads(baseline.result.read_text()) == {"a": "b"}


# --- each kind by its own measure


def perturbed(x: Tensor) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


def test_a_softmax_at_the_end_does_not_change_what_is_lost() -> None:
    a, b = sensitive_network(), lossy(keep={"error": 0.9}).model
    batches = [(images(40, seed=7),)]
    logits = measure_fidelity(a, b, batches).outputs[0]
    ends = nn.Sequential(a, nn.Softmax(1)), nn.Sequential(b, nn.Softmax(1))
    chances = measure_fidelity(*ends, batches).outputs[0]
    assert (logits.kind, chances.kind) == ("logits", "probabilities")
    assert logits.kl is not None
    assert logits.kl > 1e-3
    assert chances.kl == pytest.approx(logits.kl, rel=1e-4)
    assert chances.top1_agreement == logits.top1_agreement
    assert chances.effect == chances.kl


def test_independent_probabilities_by_the_divergence_of_each_entry() -> None:
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    p, q = x.sigmoid(), perturbed(x).sigmoid()
    (found,) = outcome_of("multilabel", p, q).outputs
    exact = torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q))
    assert found.kl == pytest.approx(float(exact.mean()), rel=1e-4)
    assert found.top1_agreement is None
    certain = outcome_of("multilabel", torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).outputs[0]
    assert certain.kl is not None
    assert math.isfinite(certain.kl)


def test_embeddings_by_their_angle_and_maps_by_their_positions() -> None:
    x = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    y = perturbed(x)
    (found,) = outcome_of("embedding", x, 2 * y).outputs
    assert found.cosine == pytest.approx(float(F.cosine_similarity(x, y, dim=1).mean()), rel=1e-5)
    assert found.effect == pytest.approx(2 * (1 - found.cosine))  # type: ignore[operator]
    (found,) = outcome_of("logits", x, y).outputs
    assert found.top1_agreement == pytest.approx(float((x.argmax(1) == y.argmax(1)).double().mean()))
    divergence = F.kl_div(y.log_softmax(1), x.log_softmax(1), reduction="none", log_target=True).sum(1).mean()
    assert found.kl == pytest.approx(float(divergence), rel=1e-4)
    last = Meaning("logits", "", axis=-1)
    turned = {"output": x.movedim(1, -1)}, {"output": y.movedim(1, -1)}
    assert effect_of([turned], {"output": last}) == pytest.approx(found.kl)


def test_effects_are_weighted_and_what_is_ignored_may_be_of_any_size() -> None:
    a = {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "z": torch.ones(5)}
    b = {"x": torch.ones(2, 3) * 1.1, "y": torch.ones(2, 3) * 1.2, "z": torch.ones(4)}
    meanings = {"x": Meaning("values", "", 3.0), "y": Meaning("values", ""), "z": Meaning("ignore", "")}
    assert effect_of([(a, b)], meanings) == pytest.approx((3 * 0.01 + 0.04) / 4, rel=1e-4)


# --- the weights of a site's outputs


@pytest.fixture
def _no_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_weighting, "SHARE", 1.0)


def weights_of(model: nn.Module, meaning: Meaning) -> dict[str, Tensor]:
    batches = [(images(24),)]
    sites = [site for site in find_sites(model, batches[0], trace(model)) if site.refusal is None]
    return output_weights(model, sites, batches, 0, meanings={"output": meaning})


@pytest.mark.usefixtures("_no_identity")
def test_probabilities_weigh_as_their_logits_do() -> None:
    plain = sensitive_network()
    ended = nn.Sequential(*plain, nn.Softmax(1))
    first, second = weights_of(plain, Meaning("logits", "")), weights_of(ended, Meaning("probabilities", ""))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


class Masked(nn.Module):
    """A map of scores, of which a strip is padding."""

    def __init__(self, strip: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mask = nn.Conv2d(3, 4, 3, padding=1), torch.zeros(16)
        self.mask[12:] = strip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.mask


def test_positions_that_are_masked_have_no_part_in_the_weights_of_others() -> None:
    masked, whole = (weights_of(Masked(strip), Meaning("logits", ""))["conv"] for strip in (-math.inf, 0.0))
    torch.testing.assert_close(masked, whole, rtol=0.2, atol=0.05)


class Length(nn.Module):
    """Two channels: the first only scales the direction that the second turns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        size, angle = self.conv(x).mean((2, 3)).unbind(1)
        return torch.stack([angle.cos(), angle.sin()], 1) * size.exp()[:, None]


@pytest.mark.usefixtures("_no_identity")
def test_the_length_of_an_embedding_is_not_felt() -> None:
    felt = weights_of(Length(), Meaning("embedding", ""))["conv"].diagonal()
    assert felt[0] < 1e-6 * felt[1]
    assert weights_of(Length(), Meaning("values", ""))["conv"].diagonal()[0] > 0.1


@pytest.mark.usefixtures("_no_identity")
def test_independent_probabilities_are_felt_where_they_are_open() -> None:
    class Two(Length):
        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x).mean((2, 3)) + torch.tensor([0.0, 12.0])).sigmoid()

    felt = weights_of(Two(), Meaning("multilabel", ""))["conv"].diagonal()
    assert felt[1] < 1e-2 * felt[0]


# --- the same meanings from the plan to the report


def test_a_plan_keeps_what_outputs_were_taken_for() -> None:
    model, inputs = sensitive_network(), {"calibration": images(40), "measure": False}
    made = convrewrite.plan(
        model, images(1), [RULE], budget={"macs": 0.5}, fast=True, outputs={"output": ("values", 2)}, **inputs
    )  # type: ignore[arg-type]
    assert (made.outputs["output"].kind, made.outputs["output"].weight) == ("values", 2.0)
    again = Plan.from_json(made.to_json(), "a test")
    applied = convrewrite.apply(model, images(1), again, **inputs)  # type: ignore[arg-type]
    (row,) = applied.report.outputs
    assert (row.taken_for, row.weight, row.reason) == ("values", 2.0, "as asked")
    assert applied.report.fidelity[0].top1_agreement is None
    assert applied.plan.outputs == made.outputs
    other = convrewrite.apply(model, images(1), again, outputs={"output": "logits"}, **inputs)  # type: ignore[arg-type]
    assert other.plan.outputs["output"].kind == "logits"
    assert other.report.fidelity[0].top1_agreement is not None
    assert "output: taken for logits: as asked" in render_text(other.report)


def test_what_was_said_wrongly_is_refused_before_the_work() -> None:
    with pytest.raises(UsageError, match="the model has no output of this name; it has output"):
        convrewrite.optimize(small_network(), images(1), [RULE], images(40), outputs={"x": "logits"})
    with pytest.raises(PlanError, match=r"an agreement needs class scores.*taken for values: as asked"):
        lossy(budget=None, keep=0.9, outputs={"output": "values"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("output", "NAME=KIND"),
        ("=logits", "NAME=KIND"),
        ("output=logits:x", "a number behind the colon"),
        ("output=nought", "found 'nought'"),
    ],
)
def test_options_of_the_command_line(tmp_path: Path, entry: str, message: str) -> None:
    torch.save(small_network(), tmp_path / "net.pt")
    ran = call("optimize", tmp_path / "net.pt", "-o", tmp_path / "out", *INPUT, "--output", entry)
    assert ran.code == 2
    assert message in ran.message


# --- what a rewritten file says of itself


def test_provenance_comes_back_from_metadata_and_survives_changes() -> None:
    made = Provenance("a:b", "c:d", "9.9", tell(small_network(), [(images(20),)]))
    found = Provenance.of(made.metadata())
    assert found is not None
    assert (found.original, found.result, found.tool_version) == ("a:b", "c:d", "9.9")
    assert found.outputs["output"].kind == "logits"
    assert Provenance.of({"something": "else"}) is None
    strange = Provenance.of(made.metadata() | {"convrewrite.version": "\x1b[31m"})
    assert strange is not None
    assert strange.tool_version == "of unknown version"
    for text in (
        "{",
        "[" * 100_000,
        "[]",
        '{"output": 3}',
        '{"output": ["none", 1]}',
        '{"output": ["logits", -1]}',
        '{"output": [[], 1]}',
    ):
        changed = Provenance.of(made.metadata() | {"convrewrite.outputs": text})
        assert changed is not None
        assert changed.outputs == {}


def test_one_input_is_named_in_the_singular() -> None:
    one = ((images(1),),)
    assert (
        evaluation_inputs((images(1),), Calibration(one, one, "data", "x")).basis
        == "measured on 1 held-out calibration input"
    )
    alone = evaluation_inputs((images(1),), Calibration(one, (), "data", "x"))
    assert alone.basis == "measured on the 1 input that the factors were fitted on"


@pytest.mark.parametrize("limit", [0.5, 0.001], ids=["held", "missed before"])
def test_a_refinement_after_which_the_fidelity_is_not_kept_is_undone(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(task: Refinement, _work: object) -> Refined:
        for numbers in refined._numbers(task).values():
            numbers.mul_(-1)
        return Refined(1.0, 0.5, steps=7)

    asked: dict[str, Any] = {"budget": {"macs": 0.7}, "keep": {"error": limit}, "resume": False}
    before = lossy(**asked).report
    monkeypatch.setattr(refined, "_refined", spoiled)
    after = lossy(**asked, refine=True).report
    held = limit == 0.5
    assert (after.fidelity == before.fidelity, after.refused is None) == (held, held)
    assert any(note.endswith("at most 0.5 did not hold any more: left as it was") for note in after.notes) == held
