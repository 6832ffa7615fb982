"""How far the stages of a run are, and about how long the rest will take: judged by the pace of stages under way, and for those
that have not begun by how long they usually take relative to the others.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SHARES = {
    "prepare": 5.0, "survey": 200.0, "fit": 30.0, "refine": 50.0, "verify": 5.0,
    "points": 280.0, "recover": 600.0, "latency": 2.0, "synthesise inputs": 10.0, "int8": 10.0, "export": 5.0,
}  # fmt: skip
"""How long stages take relative to each other. The first line has the seconds that they took on the trained example, `separable`
at its ratio and `balanced` at half of the MACs, on one thread with nothing in the caches; ``points`` counts eight fits that are
verified, ``recover`` its ten minutes, and the rest is guessed."""

OUTER = ("points",)
"""Stages that contain others: they go on while those come and go."""


@dataclass(slots=True)
class RunStage:
    """One stage: how many of its steps are done, what is being done; ``began``, ``stepped`` and ``ended`` are seconds of the
    clock, ``skipped`` the steps that were done when it began, ``before`` seconds of earlier rounds of it."""

    name: str
    began: float
    stepped: float
    skipped: int
    done: int
    total: int
    text: str
    ended: float | None = None
    before: float = 0.0

    def seconds(self, now: float) -> float:
        """How long it took, or takes until now."""
        return self.before + (now if self.ended is None else self.ended) - self.began

    def left(self, now: float) -> float | None:
        """About how long it will still take; None as long as no step is done to judge by."""
        steps = self.done - self.skipped
        if self.ended is not None or self.done >= self.total:
            return 0.0
        if steps <= 0:
            return None
        return max(0.0, (self.stepped - self.began) / steps * (self.total - self.done) - (now - self.stepped))


@dataclass(slots=True)
class RunStages:
    """The stages of a run. ``expected``: the stages that will come, as far as that is known; others may come too.

    :meth:`tell` is a :data:`convrewrite.progress.Progress`. A stage ends when it is done, or when another one begins.
    """

    expected: Sequence[str] = ()
    clock: Callable[[], float] = time.monotonic
    begun: dict[str, RunStage] = field(default_factory=dict)
    started: float = -1.0

    def tell(self, name: str, done: int, total: int, text: str) -> None:
        """Take a stage's report on its progress."""
        now = self.clock()
        self.started = now if self.started < 0 else self.started
        stage = self.begun.get(name)
        if stage is None or stage.ended is not None or done < stage.done:
            before = 0.0 if stage is None else stage.seconds(now)
            stage = self.begun[name] = RunStage(name, now, now, done, done, total, text, before=before)
        if done > stage.done:
            stage.stepped = now
        stage.done, stage.total, stage.text = done, total, text
        for other in self.begun.values():
            over = other.done >= other.total if other is stage else other.name not in OUTER
            if over and other.ended is None:
                other.ended = now

    @property
    def current(self) -> RunStage | None:
        """The inner stage under way; otherwise the outer one; otherwise the stage that ended last."""
        going = [stage for stage in self.begun.values() if stage.ended is None]
        inner = [stage for stage in going if stage.name not in OUTER]
        latest = max(self.begun.values(), key=lambda stage: stage.ended or 0.0, default=None)
        return next(iter([*inner, *going]), latest)

    @property
    def to_come(self) -> list[str]:
        """The expected stages that have not begun; those expected before one that has begun are not expected any more."""
        begun = [index for index, name in enumerate(self.expected) if name in self.begun]
        return [name for name in self.expected[max(begun, default=-1) + 1 :] if name not in self.begun]

    def seconds(self) -> float:
        """Since the first stage began."""
        return self.clock() - self.started if self.begun else 0.0

    def left(self) -> float | None:
        """About how long all of it will still take; None where nothing is known yet.

        Stages to come are taken to last as long, relative to those that have begun, as on the example; the parts of an outer
        stage count only as part of it.
        """
        now, outer = self.clock(), self._outer
        own = outer or self.current
        left = None if own is None else own.left(now)
        if own is None or left is None:
            return None
        known = [stage for stage in self.begun.values() if outer is None or stage.began <= outer.began]
        spent = sum(stage.seconds(now) for stage in known)
        return left + sum(map(_share, self.to_come)) * (spent + left) / sum(_share(stage.name) for stage in known)

    def line(self) -> str:
        """All of it in one line: how long so far, the stage with its pace, and what comes."""
        stage = self.current
        if stage is None:
            return ""
        own, whole = (about(seconds or None) for seconds in (stage.left(self.clock()), self.left()))
        words = f"[{clock_text(self.seconds())}] {stage.name} {stage.done} of {stage.total}"
        words += f", {own}" if own else ""
        words += f"; then {', '.join(self.to_come)}" if self.to_come else ""
        words += f"; {whole} in all" if whole and whole != own else ""
        return f"{words}. {stage.text}"

    @property
    def _outer(self) -> RunStage | None:
        return next((stage for stage in self.begun.values() if stage.ended is None and stage.name in OUTER), None)

    def summary(self) -> str:
        """How long each took, in one line."""
        now = self.clock()
        parts = ", ".join(f"{stage.name} {clock_text(stage.seconds(now))}" for stage in self.begun.values())
        return f"[{clock_text(self.seconds())}] {parts}"


def clock_text(seconds: float) -> str:
    """``75.2`` as ``1:15``, and hours before it where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def about(seconds: float | None) -> str:
    """Seconds that are left, as far as they can be known."""
    if seconds is None:
        return ""
    step = 1 if seconds < 20 else 5 if seconds < 120 else 30
    return f"about {clock_text(step * max(1, round(seconds / step)))} left"


def _share(name: str) -> float:
    return SHARES.get(name, 10.0)
