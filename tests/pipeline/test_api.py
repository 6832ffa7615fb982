import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import images, small_network
from torch import Tensor, fx, nn

from convrewrite import RewriteConvolutions, analyze, optimize
from convrewrite.calibration import choose
from convrewrite.calibration.batches import Calibration, split_inputs
from convrewrite.calibration.synthetic import synthesise
from convrewrite.errors import ConvRewriteError, ExportError, ModelLoadError, PlanError, RuleFileError, TraceError
from convrewrite.loading import Loaded
from convrewrite.pipeline import networks
from convrewrite.results.folder import Result
from convrewrite.rules.schema import Rule

EXAMPLE = images(1)


class Shared(nn.Module):
    """One convolution, called at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.stem(x))))
        return self.shared(nn.functional.avg_pool2d(x, 2)).mean((2, 3))


class ControlFlow(nn.Module):
    """The forward looks at its data, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if x.abs().sum() > 0:
            x = self.conv(x)
        return x.mean((2, 3))


class TwoInputs(nn.Module):
    """Two images in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.right = nn.Conv2d(3, 16, 3, padding=1)
        self.both = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = self.both(torch.relu(self.left(a)) + torch.relu(self.right(b)))
        return {"map": y, "scores": y.mean((2, 3))}


def seeded(module: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return module().eval()


def rewrite(model: nn.Module, **options: object) -> Result:
    settings = {"calibration": images(), "measure": False} | options
    example = settings.pop("example", EXAMPLE)
    return optimize(model, example, **settings)  # type: ignore[arg-type]


def counted_macs(model: nn.Module, *inputs: Tensor) -> int:
    """MACs of one example, counted at every call of a convolution or a linear layer."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()

    handles = [module.register_forward_hook(count) for module in model.modules()]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("rules", [["separable"], ["asymmetric"], ["grouped"], ["balanced"]])
def test_totals_of_the_report_are_those_of_the_models(rules: list[str]) -> None:
    model = small_network()
    result = rewrite(model, rules=rules)
    totals = result.report.totals
    assert totals.parameters.before == sum(p.numel() for p in model.parameters())
    assert totals.parameters.after == sum(p.numel() for p in result.model.parameters())
    assert totals.macs.before == counted_macs(model, EXAMPLE)
    assert totals.macs.after == counted_macs(result.model, EXAMPLE)
    assert totals.macs.after < totals.macs.before
    assert [row.name for row in result.report.sites] == ["0", "3", "6", "8"]


class FixedKernels(nn.Module):
    """Two kernels that are buffers, one of them large enough for a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.register_buffer("wide", torch.randn(16, 16, 3, 3) / 12)
        self.register_buffer("blur", torch.rand(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.conv2d(torch.relu(self.stem(x)), self.wide, padding=1))
        return nn.functional.conv2d(x, self.blur, groups=16).mean((2, 3))


def test_a_fixed_kernel_counts_as_parameters_only_where_it_becomes_some() -> None:
    model = seeded(FixedKernels)
    result = rewrite(model, rules=["separable"])
    assert {row.name: row.action for row in result.report.sites} == {
        "stem": "kept", "wide": "rewritten", "blur": "kept",
    }  # fmt: skip
    totals = result.report.totals.parameters
    assert totals.before == 16 * 3 * 9 + 16 + 16 * 16 * 9
    assert totals.after == sum(p.numel() for p in result.model.parameters())


def test_a_fixed_kernel_that_stays_one_is_no_part_of_a_budget() -> None:
    result = rewrite(seeded(FixedKernels), rules=["separable"], budget={"params": 0.6}, calibration="weights")
    assert result.plan.predicted is not None
    assert result.plan.predicted.params == pytest.approx(result.report.totals.parameters.ratio)


@pytest.mark.parametrize(("name", "part"), [("macs", 0.6), ("macs", 0.35), ("params", 0.6), ("params", 0.4)])
def test_a_budget_is_met_and_reported(name: str, part: float) -> None:
    model = small_network()
    result = rewrite(model, budget={name: part}, rules=["separable", "asymmetric"], calibration="weights")
    report = result.report
    assert report.asked.budget == {name: part}
    reached = report.reached.budget[name]
    assert reached is not None
    after, before = (
        (counted_macs(result.model, EXAMPLE), counted_macs(model, EXAMPLE)) if name == "macs"
        else (sum(p.numel() for p in result.model.parameters()), sum(p.numel() for p in model.parameters()))
    )  # fmt: skip
    assert reached == pytest.approx(after / before)
    assert reached <= part
    assert reached > part - 0.15


def test_two_budgets_hold_together() -> None:
    result = rewrite(small_network(), budget={"macs": 0.6, "params": 0.5}, calibration="weights")
    reached = result.report.reached.budget
    assert reached["macs"] <= 0.6
    assert reached["params"] <= 0.5


def test_budgets_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"macs=0\.01 cannot be met .* at the least"):
        rewrite(small_network(), budget={"macs": 0.01})
    with pytest.raises(PlanError, match="expected one of macs, params, latency"):
        rewrite(small_network(), budget={"flops": 0.5})
    with pytest.raises(PlanError, match="budget latency: needs measured times; leave out --no-onnx"):
        rewrite(small_network(), budget={"latency": 0.5})


def test_the_original_is_untouched_and_its_modes_come_back() -> None:
    model = small_network()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(42)
    expected = torch.rand(3)
    torch.manual_seed(42)
    result = rewrite(model, calibration=images())
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers were disturbed"
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert type(result.model) is type(model)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.model.parameters()}
    assert shared == set()


def test_the_original_keeps_its_modes_when_a_run_fails() -> None:
    model = small_network().train()
    with pytest.raises(TraceError, match="does not run on input 1x4x16x16"):
        optimize(model, torch.zeros(1, 4, 16, 16))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("source", "kind", "basis"),
    [
        (images(), "data", "held-out inputs"),
        ("weights", "weights only", "weights"),
        (Calibration(((images()[:64],),), (), "data", "mine"), "data", "fitted inputs"),
    ],
    ids=["data", "weights", "nothing held out"],
)
def test_the_report_states_the_kind_of_calibration(source: object, kind: str, basis: str) -> None:
    report = rewrite(small_network(), calibration=source).report
    assert report.calibration.kind == kind
    assert {row.error_basis for row in report.sites if row.action == "rewritten"} == {basis}
    assert report.calibration.fitted_on == (64 if kind == "data" else 0)


def test_inputs_are_synthesised_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "synthesise", partial(synthesise, count=32, steps=40))
    model = small_network()
    model.train()
    for _ in range(20):
        model(images(32))
    model.eval()
    report = rewrite(model, calibration=None).report
    assert report.calibration.kind == "synthetic"
    assert {row.error_basis for row in report.sites if row.action == "rewritten"} == {"synthetic inputs"}
    assert "synthetic" in (report.fidelity_basis or "")


def test_without_inputs_and_batch_norm_the_report_warns() -> None:
    report = rewrite(seeded(Shared), calibration=None).report
    assert report.calibration.kind == "weights only"
    assert any("give real inputs (--calib)" in note for note in report.notes)


def test_a_calibration_can_be_handed_over_ready() -> None:
    fit, held_out = split_inputs((images(20),), batch=8, seed=0)
    report = rewrite(small_network(), calibration=Calibration(fit, held_out, "data", "my images")).report
    assert report.calibration.source == "my images"
    assert (report.calibration.fitted_on, report.calibration.held_out) == (16, 4)


def test_fitting_to_inputs_keeps_more_than_the_weights_alone() -> None:
    fitted = rewrite(small_network()).report.fidelity[0].relative_error
    alone = rewrite(small_network(), calibration="weights")
    model, sample = small_network(), images(40, seed=9)
    with torch.no_grad():
        fair = float((alone.model(sample) - model(sample)).norm() / model(sample).norm())
    assert fitted < 0.8 * fair


def test_the_same_seed_gives_the_same_bits_and_the_same_plan() -> None:
    first, second = (rewrite(small_network(), calibration=images(), seed=7) for _ in range(2))
    assert first.plan.to_json() == second.plan.to_json()
    states = first.model.state_dict(), second.model.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_float64_is_refused_for_onnx_and_rewritten_without() -> None:
    with pytest.raises(ExportError, match=r"float64.*model\.float\(\)"):
        optimize(small_network().double(), EXAMPLE.double(), calibration="weights")
    result = rewrite(small_network().double(), example=EXAMPLE.double(), calibration=images().double())
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float64}
    assert result.model(EXAMPLE.double()).dtype == torch.float64


def test_two_inputs_and_a_dictionary_of_outputs() -> None:
    example = (images(1, seed=2), images(1, seed=3))
    calibration = (images(80, seed=4), images(80, seed=5))
    result = optimize(seeded(TwoInputs), example, calibration=calibration)
    report = result.report
    assert report.input_shapes == ((1, 3, 16, 16), (1, 3, 16, 16))
    assert [row.name for row in report.fidelity] == ["output.map", "output.scores"]
    assert [(row.name, row.passed) for row in report.parity] == [("output.map", True), ("output.scores", True)]
    assert [row.name for row in report.sites if row.action == "rewritten"] == ["both"]
    assert set(result.model(*example)) == {"map", "scores"}


def test_a_shared_convolution_is_one_site_with_two_calls() -> None:
    model = seeded(Shared)
    result = rewrite(model)
    (row,) = [row for row in result.report.sites if row.name == "shared"]
    assert row.calls == 2
    assert row.action == "rewritten"
    assert result.report.totals.macs.before == counted_macs(model, EXAMPLE)
    assert result.report.totals.macs.after == counted_macs(result.model, EXAMPLE)
    sample = images(16, seed=9)
    assert (result.model(sample) - model(sample)).norm() < 0.5 * model(sample).norm()


def test_a_model_that_cannot_be_followed_is_rewritten_with_a_note() -> None:
    result = rewrite(seeded(ControlFlow))
    assert [row.name for row in result.report.sites if row.action == "rewritten"] == ["conv"]
    assert any("the model itself could not be followed as a graph" in note for note in result.report.notes)
    assert torch.isfinite(result.model(EXAMPLE)).all()


def test_a_model_with_nothing_to_take_is_returned_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    result = rewrite(model)
    assert any("no site was rewritten" in note for note in result.report.notes)
    assert all(row.reason for row in result.report.sites)
    assert torch.equal(result.model(EXAMPLE), model(EXAMPLE))


def test_a_model_without_convolutions_is_an_error() -> None:
    with pytest.raises(TraceError, match="the model has no convolution"):
        optimize(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), EXAMPLE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "expected a trained model, found 0.weight, which is made when"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(affine=False)),
            r"expected a trained model, found 1 \(LazyBatchNorm2d\), which is made when",
        ),
        (
            lambda: small_network().to("meta"),
            "expected weights, found .* on the meta device, which holds no numbers; load",
        ),
    ],
)
def test_a_model_without_weights_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        optimize(make().eval(), images(1), calibration="weights", measure=False)


def test_what_was_assumed_of_a_file_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "load_model", lambda path: Loaded(small_network(), str(path), ("it was assumed",)))
    result = optimize("net.pt", images(1), calibration="weights", measure=False)
    assert result.report.model == "net.pt" and "it was assumed" in result.report.notes


def test_a_name_alone_is_a_list_of_it() -> None:
    rows = analyze(small_network(), images(1), "separable")
    taken = next(row.name for row in rows if row.applies == {"separable": "yes"})
    said = {"exclude": taken, "notes": "a note", "measure": False}
    report = optimize(small_network(), images(1), "separable", "weights", **said).report
    assert {site.name: site.reason for site in report.sites}[taken] == f"left out by exclude={taken}"
    assert "a note" in report.notes
    assert analyze(small_network(), images(1), [])[0].applies == {}


def test_rules_come_as_names_paths_and_objects(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('schema = 1\n[[rule]]\nname = "mine"\nstructures = ["channel"]\n')
    own = Rule(name="own", structures=("asymmetric",), ratio=0.3)
    report = rewrite(small_network(), rules=[file, own, "separable"], calibration="weights").report
    assert report.rules == ("mine", "own", "separable")
    with pytest.raises(RuleFileError, match="'butterfly' is not known"):
        rewrite(small_network(), rules=[Rule(name="own", structures=("butterfly",))])


def test_an_error_limit_keeps_the_site_with_the_reason() -> None:
    rule = Rule.model_validate(
        {"name": "strict", "structures": ["separable"], "ratio": 0.3, "require": {"max_output_error": 1e-6}}
    )
    result = rewrite(small_network(), rules=[rule])
    reasons = {row.name: row.reason for row in result.report.sites}
    assert "exceeds the rule's limit; the least is" in (reasons["3"] or "")
    assert all(row.action == "kept" for row in result.report.sites)


def test_analyze_lists_all_sites_and_every_builtin_rule() -> None:
    rows = analyze(small_network(), EXAMPLE)
    assert [row.name for row in rows] == ["0", "3", "6", "8"]
    assert sum(row.mac_share for row in rows) == pytest.approx(1)
    assert set(rows[0].applies) == {"asymmetric", "balanced", "grouped", "separable"}
    assert rows[1].applies["separable"] == "yes"
    said = "it is the stem, the first convolution the network runs; it takes part within any budget"
    assert rows[0].applies["separable"] == said


def test_progress_is_told_and_the_plan_is_json() -> None:
    told: list[tuple[str, int, int]] = []
    result = rewrite(small_network(), progress=lambda stage, done, total, _text: told.append((stage, done, total)))
    assert [entry for entry in told if entry[0] == "fit"] == [("fit", n, 2) for n in (0, 1, 1, 2)]
    plan = json.loads(result.plan.to_json())
    assert [site["name"] for site in plan["sites"] if site["option"]] == ["3", "6"]


def test_the_pass_returns_a_graph_module_and_leaves_its_input_untouched() -> None:
    original = fx.symbolic_trace(small_network())
    before, code = copy.deepcopy(original.state_dict()), original.code
    rewritten = RewriteConvolutions(EXAMPLE, calibration=images())(original)
    assert isinstance(rewritten, fx.GraphModule)
    assert rewritten is not original
    assert original.code == code
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert counted_macs(rewritten, EXAMPLE) < counted_macs(original, EXAMPLE)
    rewritten.graph.lint()
    again = fx.symbolic_trace(rewritten)
    assert torch.allclose(again(EXAMPLE), rewritten(EXAMPLE))


def test_nothing_is_left_behind_and_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = rewrite(small_network(), calibration="weights")
        folder = result._folder.path
        assert folder.is_dir()
        del result
        assert not folder.exists()


def test_one_except_catches_every_error() -> None:
    with pytest.raises(ConvRewriteError):
        rewrite(small_network(), calibration=torch.zeros(4, 3, 9, 9))
