"""Latencies in a report are those of one example, however many a file takes at a time."""

from typing import Any

from clocks import FalseTimer
from commands import images, small_network

from convrewrite import optimize


def test_latencies_of_a_file_that_takes_several_examples_are_those_of_one() -> None:
    asked: dict[str, Any] = {"timer": FalseTimer(seconds=lambda *_: 0.01), "fast": True, "refine": False}
    one, four = (
        optimize(small_network(), images(4), ["separable"], "weights", free_axes=axes, **asked).report.totals
        for axes in (("batch",), ())
    )
    assert one.onnx_latency_seconds is not None and four.onnx_latency_seconds is not None
    assert four.torch_latency_seconds is not None
    assert (one.onnx_latency_seconds.before, four.onnx_latency_seconds.before) == (1.0, 0.25)
    assert (four.onnx_latency_seconds.after, four.torch_latency_seconds.before) == (0.225, 0.25)
    assert four.predicted_onnx_latency_seconds == 0.25
