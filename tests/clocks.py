"""A clock that lies: options take the seconds that a test gives them, and nothing is run."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from convrewrite.conv import ConvSpec, Size
from convrewrite.runtime.latency import Comparison
from convrewrite.runtime.option_graphs import OptionGraph
from convrewrite.runtime.timing import RuntimeTimer

Seconds = Callable[[OptionGraph, Size], float]


def macs_of(graph: OptionGraph, size: Size) -> int:
    """MACs of an option, which is one way of lying about its time."""
    total = 0
    for chain in graph:
        at = size
        for spec in chain:
            total += spec.cost([at]).macs
            at = spec.output_size(at)
    return total


def by_macs(graph: OptionGraph, size: Size) -> float:
    """A nanosecond for each MAC."""
    return 1e-9 * macs_of(graph, size)


def lie(monkeypatch: pytest.MonkeyPatch, seconds: Seconds = by_macs) -> list[OptionGraph]:
    """Every convolution and every option takes what ``seconds`` says; the options that were asked for are noted."""
    asked: list[OptionGraph] = []

    def time_options(
        _self: RuntimeTimer, original: ConvSpec, options: Sequence[OptionGraph], size: Size, *_rest: Any
    ) -> tuple[float, list[float]]:
        asked.extend(options)
        return seconds(((original,),), size), [seconds(option, size) for option in options]

    monkeypatch.setattr(RuntimeTimer, "time_options", time_options)
    return asked


def compared(ratio: float, runtime: str = "onnxruntime") -> Callable[..., Comparison]:
    """In place of ``compare_onnx`` or ``compare_torch``: the second one takes ``ratio`` of the first one's second."""
    return lambda *_args, **_named: Comparison(runtime, 1, 25, 1.0, ratio, ratio, 0.99 * ratio, 1.01 * ratio)
