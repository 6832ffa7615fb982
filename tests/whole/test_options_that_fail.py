"""An option whose fit fails is left out with its reason, and the other options of its site are taken."""

import logging
from typing import Any

import pytest
import torch
from commands import images, small_network
from torch import Tensor

import convrewrite
from convrewrite.planning import sensitivities
from convrewrite.rewriting import site_fit
from convrewrite.structures.families.asymmetric import Asymmetric

RULES = ["asymmetric", "separable"]
WHY = "found numbers that it cannot be fitted to (it overflows)"
ASKED: dict[str, Any] = {"measure": False, "resume": False, "refine": False}


def _overflow(_self: Asymmetric, _kernel: Tensor, *_: object) -> tuple[Tensor, ...]:
    raise ArithmeticError("it overflows")


@pytest.fixture(params=["small", "large"])
def _asymmetric_fails(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No asymmetric option can be fitted."""
    monkeypatch.setattr(Asymmetric, "weights", _overflow)
    if request.param == "large":
        monkeypatch.setattr(site_fit, "LARGE", 1)
        monkeypatch.setattr(sensitivities, "LARGE", 1)


@pytest.mark.usefixtures("_asymmetric_fails")
def test_of_options_by_their_rules_ratios(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "convrewrite")
    report = convrewrite.optimize(small_network(), images(1), RULES, images(), **ASKED).report
    options = [site.option for site in report.sites if site.action == "rewritten"]
    assert len(options) == 2
    assert all(option is not None and option.startswith("separable") for option in options)
    assert any("left out asymmetric" in record.message and WHY in record.message for record in caplog.records)


def test_of_large_problems_the_next_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose rough fits, in float32, do not fail."""
    real = Asymmetric.weights

    def weights(self: Asymmetric, kernel: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return real(self, kernel, *rest) if kernel.dtype == torch.float32 else _overflow(self, kernel)

    monkeypatch.setattr(Asymmetric, "weights", weights)
    monkeypatch.setattr(site_fit, "LARGE", 1)
    report = convrewrite.optimize(small_network(), images(1), RULES, images(), **ASKED).report
    assert {(site.option or "").partition(",")[0] for site in report.sites if site.action == "rewritten"} == {
        "separable"
    }


@pytest.mark.usefixtures("_asymmetric_fails")
def test_of_options_within_a_budget() -> None:
    plan = convrewrite.plan(small_network(), images(1), RULES, images(), {"macs": 0.6}, fast=True, **ASKED)
    considered = [option for site in plan.sites for option in site.considered]
    failed = [c for c in considered if c.option.structure == "asymmetric"]
    chosen = {site.option.structure for site in plan.sites if site.option is not None}
    assert chosen == {"separable"}
    assert all(c.reason is not None and c.effect is None for c in failed)
    assert any(WHY in str(c.reason) for c in failed)


@pytest.mark.usefixtures("_asymmetric_fails")
def test_a_site_without_another_is_kept_with_the_reason() -> None:
    plan = convrewrite.optimize(small_network(), images(1), RULES[:1], images(), **ASKED).plan
    assert {site.option for site in plan.sites} == {None}
    assert any(WHY in str(site.reason) for site in plan.sites)
