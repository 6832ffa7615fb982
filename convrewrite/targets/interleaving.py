"""All timings are interleaved: each round runs every candidate once, the order being reversed round by round, and what is
reported is the median over the rounds of the *paired* ratios. A machine that is busy for a while then slows both sides of a ratio
alike.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from convrewrite.errors import UsageError, VerificationError
from convrewrite.targets.target import Clock

TimedCall = Callable[[], object]

MAX_REPEATS = 1 << 17
"""Most calls in a sample, however short they are."""

MIN_SHARE = 0.02
"""Least part of a time that is left once that of the frame is taken off: what costs less than the noise of its frame must not
come out as free, or as negative."""

GRAPHS_PER_ROUND = 16
"""Programs that are interleaved with the first one at a time: each is in memory meanwhile."""

MOST_STILL = 2.0
"""Seconds that calls may take while the clock of their runtime stands still: a hundred times the step of the coarsest clock."""

LEAST_ROUNDS = 9
"""Fewest rounds of a comparison, however long they take: as many as give quartiles that mean something."""


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
    clock: Clock,
    patience: float = math.inf,
) -> Comparison:
    """Time two callables interleaved, in the order A B, then B A, and so on.

    Each callable is repeated within a round until one sample takes at least ``min_seconds``. Once ``patience`` seconds
    were measured, and ``LEAST_ROUNDS`` rounds, there are no more. Raises VerificationError if the clock stands still.
    """
    samples = interleaved([run_a, run_b], rounds, min_seconds, clock, patience)
    rounds = len(samples[0])
    ratios = ratios_of(samples[1], samples[0])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    seconds_a, seconds_b, ratio = (statistics.median(values) for values in (*samples, ratios))
    return Comparison(runtime, threads, rounds, seconds_a, seconds_b, ratio, low, high)


def interleaved(
    runs: Sequence[TimedCall],
    rounds: int,
    min_seconds: float,
    clock: Clock,
    patience: float = math.inf,
    warm: bool = False,
) -> list[list[float]]:
    """Seconds per call, for each run and round; odd rounds go through the runs backwards. See :func:`compare` for ``patience``.
    ``warm``: what ran before has pushed a run out of the processor's cache, so one call goes before each sample. Without it a
    sample of one call, as of a whole convolution, seems slower than one of many short calls, as of what is to replace it.

    With more than two runs every second round also starts further on: what runs last in one round and first in the
    next finds its weights still in the processor's cache (measured: 1 % faster), and that must not always be the same.
    """
    if rounds < 1:
        raise UsageError(f"timing: expected at least 1 round, found {rounds}")
    repeats = [_repeats(run, min_seconds, clock) for run in runs]
    samples: list[list[float]] = [[] for _ in runs]
    spent = 0.0
    for index in range(rounds):
        if index >= LEAST_ROUNDS and spent >= patience:
            break
        start = index // 2 if len(runs) > 2 else 0
        order = [(start + i) % len(runs) for i in range(len(runs))]
        for i in order if index % 2 == 0 else reversed(order):
            if warm:
                runs[i]()
            seconds = _sample(runs[i], repeats[i], clock)
            samples[i].append(seconds / repeats[i])
            spent += seconds
    return samples


def framed_seconds(
    made: Sequence[Callable[[], TimedCall | None]],
    frame: TimedCall,
    *,
    rounds: int,
    min_seconds: float,
    clock: Clock,
    unit: Sequence[TimedCall] = (),
) -> list[float]:
    """Seconds of programs without those of their ``frame``; each is made when it is its turn, and infinite where it is None.

    All are interleaved with the first; a program's time is that of the first times the median paired ratio, so that the times of
    one call compare to about 1 %. ``unit``: a program and its frame; the times are then parts of its time, so that those of
    several calls compare too, though the machine's speed changes in between.
    """
    reference = made[0]()
    assert reference is not None, "the first program says what the others are compared with"
    samples = interleaved([reference, frame, *unit], rounds, min_seconds, clock, warm=True)
    share = statistics.median(ratios_of(samples[1], samples[0]))
    first = statistics.median(ratios_of(samples[0], _without_frame(*samples[2:])) if unit else samples[0])
    ratios = {0: 1.0}
    for start in range(1, len(made), GRAPHS_PER_ROUND):
        chunk = {index: make() for index, make in enumerate(made[start : start + GRAPHS_PER_ROUND], start)}
        runs = {index: run for index, run in chunk.items() if run is not None}
        base, *others = interleaved([reference, *runs.values()], rounds, min_seconds, clock, warm=True)
        ratios |= {index: statistics.median(ratios_of(other, base)) for index, other in zip(runs, others, strict=True)}
    seconds = {i: first * max(ratio - share, MIN_SHARE * ratio) for i, ratio in ratios.items()}
    return [seconds.get(index, math.inf) for index in range(len(made))]


def whole_seconds(
    run: TimedCall,
    *,
    rounds: int,
    min_seconds: float,
    clock: Clock,
    patience: float = math.inf,
    unit: Sequence[TimedCall] = (),
) -> float:
    """Seconds of one call, the median over the rounds; with a ``unit`` as a part of its time, see :func:`framed_seconds`."""
    samples, *of_unit = interleaved([run, *unit], rounds, min_seconds, clock, patience, warm=bool(unit))
    return statistics.median(ratios_of(samples, _without_frame(*of_unit)) if of_unit else samples)


def _without_frame(framed: Sequence[float], frame: Sequence[float]) -> list[float]:
    """Samples of a program, each less the median part that its frame has in them."""
    share = statistics.median(ratios_of(frame, framed))
    return [seconds * max(1 - share, MIN_SHARE) for seconds in framed]


def _repeats(run: TimedCall, min_seconds: float, clock: Clock) -> int:
    """How often to call so that a sample takes min_seconds; finding it out also warms up. Raises VerificationError for a clock
    that stands still meanwhile, as that of a runtime of another package may: it would be waited for in vain."""
    run()
    repeats, begun = 1, time.perf_counter()
    while repeats < MAX_REPEATS and (spent := _sample(run, repeats, clock)) < min_seconds:
        if spent <= 0 and time.perf_counter() - begun > MOST_STILL:
            raise VerificationError(
                f"timing: expected a clock that moves, found one that stands still while {repeats} calls ran; mend the runtime's "
                "clock, or name another runtime (--runtime)"
            )
        needed = 1.2 * min_seconds / spent if spent > 0 else 2.0
        repeats = min(MAX_REPEATS, max(repeats + 1, int(repeats * min(needed, 16.0))))
    return repeats


def _sample(run: TimedCall, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        run()
    return clock() - start


def ratios_of(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Paired ratios, round by round. Raises VerificationError for a sample that took no time, or that is no number."""
    impossible = [seconds for seconds in (*numerators, *denominators) if not 0 < seconds < math.inf]
    if impossible:
        raise VerificationError(
            f"timing: expected every sample to take time, found one of {impossible[0]:g} s; "
            "the clock stands still or is too coarse, raise min_seconds"
        )
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
