"""Measured time: whole models against each other, and single options at a site's real input shape, in onnxruntime.

Fewer MACs is not faster, so time is measured, never modelled. All timings are interleaved: each round runs every
candidate once, the order turning round by round, and what is reported is the median over the rounds of the *paired*
ratios. A machine that is busy for a while then slows both sides of a ratio alike.

A single option is timed inside a *frame*, a small ONNX graph that puts onnxruntime's blocked NCHWc layout in effect as
the surrounding network would, and costs next to nothing itself::

    (N, 1, 1, 1) -> Conv 1x1 to C channels -> Resize to H x W -> OPTION -> Relu -> MaxPool 1x1 with stride H' x W'

The resize only writes the site's input, the pooling reads one pixel of its output; the empty frame is measured beside
the option and subtracted. With up to four channels the frame feeds the input plainly, as a network's stem gets it.

How well such times add up, on a ResNet-18 at 224 x 224, one thread, AVX-512, onnxruntime 1.32: the sum of
:func:`time_graphs` over its convolutions against :func:`compare_onnx` on the whole networks, every 3x3 rewritten, in
milliseconds. At batch 1: 34.4 predicted, 34.4 measured for the original; 6.5 and 6.9 separable, 10.4 and 11.0 as the
sum of two branches, 12.9 and 13.7 asymmetric, 10.2 and 10.8 cp, 14.0 and 15.0 four groups, 15.3 and 16.4 with a
multiplier of two; pooling, additions and the classifier are not in the sums. The time saved was met to 5 %, in a run
on a busier machine to 9 %. At batch 4: 137 and 136 for the original, the others within 7 %, the multiplier of two
within 11 %.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.errors import UsageError, VerificationError
from convrewrite.modules import eval_mode
from convrewrite.onnx_files import open_session
from convrewrite.process import torch_threads
from convrewrite.runtime.option_graphs import OptionGraph, conv_graph
from convrewrite.runtime.timing_cache import TimingCache, timing_key

Clock = Callable[[], float]
TimedCall = Callable[[], object]
MAX_REPEATS = 1 << 17
MIN_SHARE = 0.02
GRAPHS_PER_ROUND = 8


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two callables timed against each other; seconds are medians, ``ratio`` is the median over rounds of b / a."""

    runtime: str
    threads: int
    rounds: int
    seconds_a: float
    seconds_b: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def speedup(self) -> float:
        """How many times faster b is than a."""
        return 1.0 / self.ratio


def compare(
    run_a: TimedCall,
    run_b: TimedCall,
    *,
    runtime: str,
    threads: int,
    rounds: int = 25,
    min_seconds: float = 0.01,
    clock: Clock | None = None,
    on_round: Callable[[int], None] | None = None,
) -> Comparison:
    """Time two callables interleaved, in the order A B, then B A, and so on.

    Each callable is repeated within a round until one sample takes at least ``min_seconds``. The clock is the time of
    the calling thread at one thread, since onnxruntime and torch then work on it and other processes do not count;
    otherwise wall time. ``on_round`` is called with the number of rounds done. Raises VerificationError if the clock
    stands still.
    """
    samples = _interleaved([run_a, run_b], rounds, min_seconds, clock or clock_for(threads), on_round)
    ratios = _ratios(samples[1], samples[0])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    seconds_a, seconds_b, ratio = (statistics.median(values) for values in (*samples, ratios))
    return Comparison(runtime, threads, rounds, seconds_a, seconds_b, ratio, low, high)


def compare_onnx(
    path_a: Path, path_b: Path, inputs: tuple[Tensor, ...], *,
    threads: int = 1, rounds: int = 25, on_round: Callable[[int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Time two ONNX files in onnxruntime on the same inputs, at the batch size these have."""
    run_a, run_b = (_session_run(open_session(path, threads), inputs) for path in (path_a, path_b))
    return compare(run_a, run_b, runtime="onnxruntime", threads=threads, rounds=rounds, on_round=on_round)


def time_onnx(
    path: Path, inputs: tuple[Tensor, ...], *, threads: int = 1, rounds: int = 15, min_seconds: float = 0.01
) -> float:
    """Seconds of one call of an ONNX file in onnxruntime: the median over the rounds."""
    run = _session_run(open_session(path, threads), inputs)
    (samples,) = _interleaved([run], rounds, min_seconds, clock_for(threads))
    return statistics.median(samples)


def compare_torch(
    model_a: nn.Module, model_b: nn.Module, inputs: tuple[Tensor, ...], *,
    threads: int = 1, rounds: int = 25, on_round: Callable[[int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Time two models in eager torch, in eval and inference mode; thread count and training flags are restored."""
    with eval_mode(model_a, model_b), torch_threads(threads), torch.inference_mode():
        runs = [lambda: model_a(*inputs), lambda: model_b(*inputs)]
        return compare(*runs, runtime="torch", threads=threads, rounds=rounds, on_round=on_round)


def clock_for(threads: int) -> Clock:
    """The processor time of the calling thread at one thread, else wall time; both in seconds."""
    return time.thread_time if threads == 1 else time.perf_counter


def time_graphs(
    graphs: Sequence[OptionGraph],
    input_size: Size,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 15,
    min_seconds: float = 0.004,
    clock: Clock | None = None,
) -> list[float]:
    """Seconds of each graph in onnxruntime, without its frame.

    All are interleaved with ``graphs[0]``; a graph's time is that of ``graphs[0]`` times the median paired ratio, so
    that the times of one call compare to about 1 %. All graphs must take the same number of channels.
    """
    channels = {branch[0].in_channels for graph in graphs for branch in graph}
    if len(channels) != 1:
        raise UsageError(f"time_graphs: expected graphs with one number of input channels, found {sorted(channels)}")
    clock = clock or clock_for(threads)

    def run_of(graph: OptionGraph) -> TimedCall:
        model = conv_graph(graph, input_size, channels=min(channels), dims=graphs[0][0][0].dims, batch=batch)
        session = open_session(model, threads)
        return _session_run(session, (torch.ones(session.get_inputs()[0].shape),))

    reference = run_of(graphs[0])
    samples = _interleaved([reference, run_of(())], rounds, min_seconds, clock)
    frame = statistics.median(_ratios(samples[1], samples[0]))
    ratios = [1.0]
    for start in range(1, len(graphs), GRAPHS_PER_ROUND):
        chunk = [run_of(graph) for graph in graphs[start : start + GRAPHS_PER_ROUND]]
        base, *others = _interleaved([reference, *chunk], rounds, min_seconds, clock)
        ratios += [statistics.median(_ratios(other, base)) for other in others]
    # A graph that costs less than the noise of its frame must not come out as free, or as negative.
    return [statistics.median(samples[0]) * max(ratio - frame, MIN_SHARE * ratio) for ratio in ratios]


def time_options(
    original: ConvSpec,
    options: Sequence[OptionGraph],
    input_size: Size,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 15,
    cache: TimingCache | None = None,
    clock: Clock | None = None,
) -> tuple[float, list[float]]:
    """Seconds of the original convolution, and of each option in its place, for ``batch`` examples of ``input_size``.

    What is cached of an option is its ratio to the original, because ratios stay true when the machine's speed drifts.
    """
    baseline: OptionGraph = ((original,),)

    def key_of(option: OptionGraph) -> str:
        return timing_key((baseline, option), input_size, batch, threads, f"onnxruntime {ort.__version__}")

    keys = [key_of(option) for option in options]
    base_key = key_of(baseline)
    base = cache.get(base_key) if cache else None
    known = {key: ratio for key in keys if cache and (ratio := cache.get(key)) is not None}
    missing = {key: option for key, option in zip(keys, options, strict=True) if key not in known}
    if missing or base is None:
        graphs = [baseline, *missing.values()]
        times = time_graphs(graphs, input_size, batch=batch, threads=threads, rounds=rounds, clock=clock)
        fresh = {key: seconds / times[0] for key, seconds in zip(missing, times[1:], strict=True)}
        known |= fresh
        if base is None:
            base = times[0]
            fresh[base_key] = base
        for key, value in fresh.items():
            if cache:
                cache.put(key, value)
    return base, [base * known[key] for key in keys]


def _interleaved(
    runs: Sequence[TimedCall],
    rounds: int,
    min_seconds: float,
    clock: Clock,
    on_round: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Seconds per call, for each run and round; odd rounds go through the runs backwards.

    With more than two runs every second round also starts further on: what runs last in one round and first in the
    next finds its weights still in the processor's cache (measured: 1 % faster), and that must not always be the same.
    """
    if rounds < 1:
        raise UsageError(f"timing: expected at least 1 round, found {rounds}")
    repeats = [_repeats(run, min_seconds, clock) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    for index in range(rounds):
        start = index // 2 if len(runs) > 2 else 0
        order = [(start + i) % len(runs) for i in range(len(runs))]
        for i in order if index % 2 == 0 else reversed(order):
            samples[i].append(_sample(runs[i], repeats[i], clock) / repeats[i])
        if on_round is not None:
            on_round(index + 1)
    return samples


def _repeats(run: TimedCall, min_seconds: float, clock: Clock) -> int:
    """How often to call so that a sample takes min_seconds; finding it out also warms up."""
    run()
    repeats = 1
    while repeats < MAX_REPEATS and (spent := _sample(run, repeats, clock)) < min_seconds:
        needed = 1.2 * min_seconds / spent if spent > 0 else 2.0
        repeats = min(MAX_REPEATS, max(repeats + 1, int(repeats * min(needed, 16.0))))
    return repeats


def _sample(run: TimedCall, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    if min(*numerators, *denominators) <= 0:
        raise VerificationError(
            f"timing: expected every sample to take time, found one of {min(*numerators, *denominators):g} s; "
            "the clock stands still or is too coarse, raise min_seconds"
        )
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def _session_run(session: ort.InferenceSession, inputs: tuple[Tensor, ...]) -> TimedCall:
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(inputs):
        raise VerificationError(f"timing: the ONNX model expects {len(names)} inputs ({names}), found {len(inputs)}")
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
    return lambda: session.run(None, feed)
