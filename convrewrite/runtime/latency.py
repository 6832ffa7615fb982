"""Measured time: whole models against each other, and single options at a site's real input shape, in any target.

Fewer MACs is not faster, so time is measured, never modelled; all timings are interleaved
(:mod:`convrewrite.targets.interleaving`).

For a target that takes ONNX a single option is timed inside a *frame*, a small ONNX graph that puts onnxruntime's
blocked NCHWc layout in effect as the surrounding network would, and costs next to nothing itself::

    (N, 1, 1, 1) -> Conv 1x1 to C channels -> Resize to H x W -> OPTION -> Relu -> MaxPool 1x1 with stride H' x W'

The resize only writes the site's input, the pooling reads one pixel of its output; the empty frame is measured beside
the option and subtracted. With up to four channels the frame feeds the input plainly, as a network's stem gets it.
For a target that takes modules the option is called on its input as it is, and a call that does nothing is
subtracted.

How well such times add up, on a ResNet-18 at 224 x 224, one thread, AVX-512, onnxruntime 1.32: the sum of
:func:`time_graphs` over its convolutions against :func:`compare_onnx` on the whole networks, every 3x3 rewritten, in
milliseconds. At batch 1: 34.4 predicted, 34.4 measured for the original; 6.5 and 6.9 separable, 10.4 and 11.0 as the
sum of two branches, 12.9 and 13.7 asymmetric, 10.2 and 10.8 cp, 14.0 and 15.0 four groups, 15.3 and 16.4 with a
multiplier of two; pooling, additions and the classifier are not in the sums. The prediction of the time saved was right to 5 %,
in a run on a busier machine to 9 %.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Size
from convrewrite.errors import UsageError, VerificationError
from convrewrite.escaping import one_line
from convrewrite.modules import eval_mode
from convrewrite.runtime.option_graphs import OptionGraph, option_program
from convrewrite.runtime.timing_cache import TimingCache, runtime_of, timing_key
from convrewrite.targets import (
    Comparison,
    Compiled,
    OnnxRuntime,
    Program,
    Target,
    TorchEager,
    compare,
    framed_seconds,
    whole_seconds,
)

LOG = logging.getLogger(__name__)

ONNXRUNTIME, TORCH = OnnxRuntime(), TorchEager()

UNIT, UNIT_SIZE = ConvSpec(64, 64, (3, 3), padding=(1, 1)), (28, 28)
"""A convolution of usual size, and the size of its input: how long it takes is the measure of the machine's speed."""

UNIT_ROUNDS = 15
"""Rounds in which that is timed."""

SAMPLE = 0.001
"""Fewest seconds that a sample of an option takes. Samples of two milliseconds, and more rounds, do not compare better: times of
one graph differ by 2 to 4 % once it is made anew, as its memory lies elsewhere."""

PATIENCE = 4.0
"""Seconds of measuring after which a comparison within a run has enough rounds: where one takes half a second, it is steady."""


def compare_programs(
    a: Program, b: Program, inputs: tuple[Tensor, ...], target: Target, *,
    threads: int = 1, rounds: int = 25, min_seconds: float = 0.01, patience: float = math.inf,
) -> Comparison:  # fmt: skip
    """Time two models in a target on the same inputs, at the batch size these have; modules as in eval mode.

    ``min_seconds``: what a sample takes at least; ``patience``: seconds after which fewer rounds will do, see
    :func:`convrewrite.targets.interleaving.compare`. Raises VerificationError where the target cannot run one of them.
    """
    with eval_mode(a.module, b.module), target.at_work(threads):
        run_a, run_b = (compiled(program, inputs, target, threads) for program in (a, b))
        return compare(
            run_a,
            run_b,
            runtime=target.name,
            threads=threads,
            rounds=rounds,
            min_seconds=min_seconds,
            clock=target.clock(threads),
            patience=patience,
        )


def compare_onnx(
    path_a: Path, path_b: Path, inputs: tuple[Tensor, ...], *,
    threads: int = 1, rounds: int = 25, target: Target = ONNXRUNTIME, patience: float = math.inf,
) -> Comparison:  # fmt: skip
    """Time two ONNX files on the same inputs, at the batch size these have."""
    a, b = Program(onnx=path_a), Program(onnx=path_b)
    return compare_programs(a, b, inputs, target, threads=threads, rounds=rounds, patience=patience)


def compare_torch(
    model_a: nn.Module, model_b: nn.Module, inputs: tuple[Tensor, ...], *,
    threads: int = 1, rounds: int = 25, target: Target = TORCH, patience: float = math.inf,
) -> Comparison:  # fmt: skip
    """Time two modules, in eval and inference mode; thread count and training flags are restored."""
    a, b = Program(module=model_a), Program(module=model_b)
    return compare_programs(a, b, inputs, target, threads=threads, rounds=rounds, patience=patience)


def time_program(
    program: Program, inputs: tuple[Tensor, ...], target: Target = ONNXRUNTIME, *,
    threads: int = 1, rounds: int = 15, min_seconds: float = 0.01, unit: Callable[[], float] | None = None,
) -> float:  # fmt: skip
    """Seconds of one call of a model: the median over the rounds. ``unit``: gives the seconds of UNIT at the speed of the machine
    that the result is converted to."""
    with eval_mode(program.module), target.at_work(threads):
        run, clock = compiled(program, inputs, target, threads), target.clock(threads)
        beside = _unit_and_frame(target, threads) if unit is not None else ()
        found = whole_seconds(run, rounds=rounds, min_seconds=min_seconds, clock=clock, patience=PATIENCE, unit=beside)
    return found if unit is None else unit() * found


def compiled(program: Program, inputs: tuple[Tensor, ...], target: Target, threads: int) -> Compiled:
    """A program ready to run. Raises VerificationError, naming the operators that are missing, where the target cannot."""
    try:
        return target.compile(program, inputs, threads)
    except Exception as error:  # every runtime raises its own
        missing = ", ".join(target.lacks(program)) if program.onnx is not None else ""
        cause = f"it has no {missing}" if missing else one_line(error, 200)
        what = program.onnx if isinstance(program.onnx, Path) else "the model"
        raise VerificationError(
            f"--runtime {target.name}: cannot run {what} on {len(inputs)} inputs: {cause}; choose another runtime"
        ) from error


def time_graphs(
    graphs: Sequence[OptionGraph],
    input_size: Size,
    *,
    threads: int = 1,
    rounds: int = 9,
    target: Target = ONNXRUNTIME,
    in_units: bool = False,
) -> list[float]:
    """Seconds of each graph in a target, without its frame; infinite for one that the target cannot run.

    All are interleaved with ``graphs[0]``; a graph's time is that of ``graphs[0]`` times the median paired ratio, so
    that the times of one call compare to about 1 %. ``in_units``: as parts of what UNIT takes, so that several calls
    compare, too. All graphs must take the same number of channels. Raises VerificationError where ``graphs[0]`` cannot run.
    """
    channels = {branch[0].in_channels for graph in graphs for branch in graph}
    if len(channels) != 1:
        raise UsageError(f"time_graphs: expected graphs with one number of input channels, found {sorted(channels)}")
    clock, dims = target.clock(threads), graphs[0][0][0].dims

    def run_of(graph: OptionGraph) -> Compiled:
        program, shape = option_program(target, graph, input_size, channels=min(channels), dims=dims)
        return compiled(program, (torch.ones(shape, dtype=torch.float32),), target, threads)

    with target.at_work(threads):
        first = run_of(graphs[0])
        made: list[Callable[[], Compiled | None]] = [lambda: first]
        made += [partial(_run_or_none, partial(run_of, graph)) for graph in graphs[1:]]
        unit = _unit_and_frame(target, threads) if in_units else ()
        return framed_seconds(made, run_of(()), rounds=rounds, min_seconds=SAMPLE, clock=clock, unit=unit)


def time_unit(*, threads: int = 1, target: Target = ONNXRUNTIME) -> float:
    """Seconds that UNIT takes, now."""
    with target.at_work(threads):
        framed, frame = _unit_and_frame(target, threads)
        clock = target.clock(threads)
        return framed_seconds([lambda: framed], frame, rounds=UNIT_ROUNDS, min_seconds=SAMPLE, clock=clock)[0]


def _unit_and_frame(target: Target, threads: int) -> tuple[Compiled, Compiled]:
    def run_of(graph: OptionGraph) -> Compiled:
        program, shape = option_program(target, graph, UNIT_SIZE, channels=UNIT.in_channels, dims=UNIT.dims)
        return compiled(program, (torch.ones(shape, dtype=torch.float32),), target, threads)

    return run_of(((UNIT,),)), run_of(())


def _run_or_none(made: Callable[[], Compiled]) -> Compiled | None:
    try:
        return made()
    except VerificationError:
        return None


def time_options(
    original: ConvSpec,
    options: Sequence[OptionGraph],
    input_size: Size,
    *,
    threads: int = 1,
    rounds: int = 9,
    cache: TimingCache | None = None,
    target: Target = ONNXRUNTIME,
    unit: Callable[[], float],
) -> tuple[float, list[float]]:
    """Seconds of the original convolution, and of each option in its place, for one example of ``input_size``.

    The cache holds an option's ratio to the original, and the original's to UNIT, because ratios stay true when the machine's
    speed drifts. ``unit`` gives the seconds of UNIT that all ratios are multiplied by.
    """
    baseline: OptionGraph = ((original,),)
    runtime = runtime_of(target)

    def key_of(*graphs: OptionGraph) -> str:
        return timing_key(graphs, input_size, threads, runtime)

    keys, base_key = [key_of(baseline, option) for option in options], key_of(((UNIT,),), baseline)
    base = cache.get(base_key) if cache else None
    known = {key: ratio for key in keys if cache and (ratio := cache.get(key)) is not None}
    LOG.debug("%d options timed in earlier runs, %d to time", len(known), len(keys) - len(known))
    missing = {key: option for key, option in zip(keys, options, strict=True) if key not in known}
    if missing or base is None:
        graphs = [baseline, *missing.values()]
        times = time_graphs(graphs, input_size, threads=threads, rounds=rounds, target=target, in_units=base is None)
        fresh = {key: seconds / times[0] for key, seconds in zip(missing, times[1:], strict=True)}
        known |= fresh
        if base is None:
            base = times[0]
            fresh[base_key] = base
        if cache:
            cache.put({key: value for key, value in fresh.items() if math.isfinite(value)})
    seconds = base * unit()
    return seconds, [seconds * known[key] for key in keys]
