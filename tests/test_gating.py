"""The latency gate, with a timer that is made to lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convrewrite
from convrewrite import gating
from convrewrite.rules import Protect, Require, Rule


def rule(gain: float | None) -> Rule:
    require = Require(min_latency_gain=gain)
    return Rule(name="r", structures=("channel", "asymmetric"), protect=Protect(stem=False), require=require)


def decisions(gain: float | None) -> list[tuple[str | None, str | None]]:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval()
    result = convrewrite.optimize(model, torch.randn(1, 16, 8, 8), [rule(gain)], "weights", measure=False)
    return [(site.option, site.reason) for site in result.report.sites]


def lie(monkeypatch: pytest.MonkeyPatch, seconds: Sequence[float]) -> list[int]:
    """Every option takes the given times, in the order channel, vertical-first, horizontal-first; the original one."""
    asked: list[int] = []

    def time_options(_original: Any, options: Sequence[Any], *_args: Any, **_named: Any) -> tuple[float, list[float]]:
        asked.append(len(options))
        return 1.0, list(seconds[: len(options)])

    monkeypatch.setattr(gating, "time_options", time_options)
    return asked


def test_slow_options_are_refused_with_the_measured_change(monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, [1.2, 1.1, 1.3])
    [(option, reason)] = decisions(0.05)
    assert option is None
    assert reason == "no option is fast enough: the best changes the measured time by +10%"


def test_the_fast_option_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, [0.5, 1.1, 1.3])
    [(option, _)] = decisions(0.05)
    assert option is not None
    assert option.startswith("channel")


def test_nothing_is_timed_without_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = lie(monkeypatch, [])
    assert decisions(None)[0][0] is not None
    assert asked == []


def test_a_real_timer_is_asked_and_its_answers_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONVREWRITE_CACHE", str(tmp_path))
    decisions(0.001)
    assert len(list(tmp_path.rglob("*.json"))) == 4  # the original and three options
