"""What the wanted output is: with and without a bias, and behind a ReLU."""

import pytest
import torch
from torch import Tensor, nn

import convrewrite
from convrewrite.conv import ConvSpec
from convrewrite.fitting import stages as module
from convrewrite.rewriting import behind_relu, site_fit
from convrewrite.rules.schema import Protect, Rule
from convrewrite.structures.structure import Setting, Structure


def rule(structure: str, ratio: float = 0.4) -> Rule:
    return Rule(name=structure, structures=(structure,), ratio=ratio, protect=Protect(stem=False, min_channels=1))


def ordered(order: str) -> Rule:
    return rule("separable").model_copy(update={"name": order, "parameters": {"separable": {"order": (order,)}}})


def images(count: int = 96, channels: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return nn.functional.avg_pool2d(torch.randn(count, channels, 14, 14, generator=generator), 3, 1) * 3


def rewritten_output(model: nn.Module, inputs: Tensor, structure: str) -> tuple[Tensor, Tensor]:
    result = convrewrite.optimize(model, inputs[:1], [rule(structure)], inputs, measure=False, refine=False)
    assert result.report.sites[0].action == "rewritten"
    with torch.no_grad():
        return model(inputs), result.model(inputs)


def test_without_a_bias_the_kernel_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)).eval()
    wanted, found = rewritten_output(model, images() + 2, "channel")
    assert float((found - wanted).mean().abs()) < 0.05 * float((found - wanted).std())


def test_the_bias_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval()
    wanted, found = rewritten_output(model, images() + 2, "separable")
    assert float((found - wanted).mean().abs()) < 0.05 * float((found - wanted).std())


class Rectified(nn.Module):
    """One convolution behind a ReLU, or the sum with a skip before it."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x) if self.skip else torch.relu(self.conv(x))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("structure", ["separable", "asymmetric", "cp", "channel"])
def test_the_refit_lowers_the_error_behind_the_relu(
    structure: str, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = Rectified(skip).eval()
    wanted, found = rewritten_output(model, images(), structure)
    monkeypatch.setattr(behind_relu, "ROUNDS", 0)
    _, plain = rewritten_output(model, images(), structure)
    assert float((found - wanted).square().sum()) < float((plain - wanted).square().sum())


def test_of_several_options_the_one_with_the_least_error_behind_the_relu_is_taken() -> None:
    inputs, told_apart = images(), 0
    depthwise_first, pointwise_first = (ordered(f"{first}-first") for first in ("depthwise", "pointwise"))
    ways = ((depthwise_first,), (pointwise_first,), (depthwise_first, pointwise_first))
    for seed in (2, 8, 9):  # before the ReLU the other one looks better at the last two
        torch.manual_seed(seed)
        model = Rectified(skip=False).eval()
        with torch.no_grad():
            assert model.conv.bias is not None
            model.conv.bias -= 1  # most of the output is stopped
        reports = [
            convrewrite.optimize(model, inputs[:1], rules, inputs, measure=False, refine=False).report for rules in ways
        ]
        *alone, both = (report.fidelity[0].relative_error for report in reports)
        assert both == pytest.approx(min(alone), rel=1e-5)
        linear = [report.sites[0].output_error for report in reports[:2]]
        told_apart += (linear[0] < linear[1]) != (alone[0] < alone[1])
    assert told_apart, "before the ReLU the other one looks better at none of the sites: nothing was shown"


def test_no_refit_where_something_else_sees_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) + 0.1 * y

    torch.manual_seed(1)
    model = Seen().eval()
    _, found = rewritten_output(model, images(), "channel")
    monkeypatch.setattr(behind_relu, "ROUNDS", 0)
    _, plain = rewritten_output(model, images(), "channel")
    assert torch.equal(found, plain)


def test_large_problems_refine_only_the_best_start_and_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    refine = module._refine

    def counted(start: object, stages: object, target: object, root: object, iterations: int) -> object:
        calls.append(iterations)
        return refine(start, stages, target, root, iterations)  # type: ignore[arg-type]

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)).eval()
    wanted, thorough = rewritten_output(model, images(), "separable")
    monkeypatch.setattr(module, "_refine", counted)
    compared: list[str] = []
    rough = site_fit.rough_fit

    def noted(structure: Structure, spec: ConvSpec, setting: Setting, *others: object) -> object:
        compared.append(str(setting["order"]))
        return rough(structure, spec, setting, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(site_fit, "rough_fit", noted)
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(site_fit, "LARGE", 1)
    _, quick = rewritten_output(model, images(), "separable")
    assert sum(iterations > 0 for iterations in calls) == 1
    assert compared == ["depthwise-first", "pointwise-first"], "either order in a rough fit"
    errors = [float((found - wanted).square().sum()) for found in (thorough, quick)]
    assert errors[1] < 1.2 * errors[0]


def test_the_effort_falls_with_the_size_of_a_patch() -> None:
    efforts = [module.effort_for(d, module.ITERATIONS) for d in (9, 600, 1200, 4608)]
    assert efforts[0] == efforts[1] == module.ITERATIONS
    assert efforts[1] > efforts[2] > efforts[3] == module.MIN_ITERATIONS


def test_few_outputs_leave_large_patches_more_effort() -> None:
    within = module.effort_within
    assert within(600, 16, 10**6, 15) == within(600, 512, 10, 15) == module.effort_for(600, 15) == 15
    assert within(8192, 16, 40_000) == 2 * module.ITERATIONS, "cheap beside the covariance"
    assert within(8192, 16, 20_000, 15) == 15
    assert within(1024, 32, 10) == 2 * module.ITERATIONS, "cheap in itself"
    assert within(4608, 512, 500) == module.effort_for(4608, module.ITERATIONS) == module.MIN_ITERATIONS
    assert within(4608, 512, 500, 2) <= module.MIN_ITERATIONS
