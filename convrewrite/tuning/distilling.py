"""The training itself: steps that bring a rewritten model nearer to the original, of which the best state is kept.

From time to time the distance of the outputs from the original's is measured on held-out inputs, and decides what is best. The
first state to beat is the one before training, so nothing worse is ever handed back.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.errors import ConvRewriteError, TraceError
from convrewrite.escaping import innermost_cause
from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning, effect_of, rounding_of
from convrewrite.places import out_of_memory
from convrewrite.precision import in_bfloat16
from convrewrite.tuning.blocks import observed
from convrewrite.tuning.checkpoint import Checkpoint, Point, Standing
from convrewrite.tuning.composition import composed
from convrewrite.tuning.examples import Examples, results_of
from convrewrite.tuning.losses import ROUNDING, Distillation, Named, takes_labels
from convrewrite.tuning.pace import Pace
from convrewrite.tuning.processes import Processes
from convrewrite.tuning.scaling import Scale
from convrewrite.tuning.stepping import Stepper
from convrewrite.tuning.trainable import numbers_of, put_numbers, training

LOOKS = 20
"""How often the held-out inputs are looked at in a training."""

PATIENCE = 12
"""A training ends after this many looks in a row without a new best: three fifths of all looks, as a high rate may first do harm
that is undone when it decays."""

LOOKED_AT = 10
"""Steps between two checks that the losses are finite, as each check waits for the device."""

OUTPUTS_SHARE = 0.1
"""The original's outputs for all inputs are computed in advance if that takes at most this part of a training's time: they save a
quarter of each step."""

LABELS = 0.1
"""Weight of the cross-entropy to labels, where there are any, relative to the loss against the original's outputs."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained: ``rewritten`` towards ``original``, both on the device and in the layout of the examples; ``parameters``
    by name; ``sites`` that were rewritten and ``joins`` at which features are compared; ``loss`` on ``examples``; ``held_out``
    batches with the original's outputs; ``meanings`` of the outputs."""

    original: nn.Module
    rewritten: nn.Module
    parameters: Mapping[str, nn.Parameter]
    sites: Sequence[str]
    joins: Sequence[str]
    loss: Distillation
    examples: Examples
    held_out: Sequence[tuple[Inputs, Mapping[str, Tensor]]]
    meanings: Mapping[str, Meaning]

    def effect(self) -> float:
        """How far the rewritten model's outputs are from the original's on the held-out inputs, in the units of reports."""
        with torch.no_grad():
            return effect_of(
                ((wanted, results_of(self.rewritten, given)) for given, wanted in self.held_out), self.meanings
            )


@dataclass(frozen=True, slots=True)
class Distilled:
    """The result of a training: the effect on held-out inputs over its steps; the parameters now hold the best. ``ended`` says
    why it ended earlier than asked, if it did."""

    curve: tuple[Point, ...]
    steps: int
    seconds: float
    ended: str | None = None

    @property
    def before(self) -> float:
        """The effect before training."""
        return self.curve[0].effect

    @property
    def best(self) -> Point:
        """The first point with the least effect."""
        return min(self.curve, key=lambda point: point.effect)


@dataclass(slots=True)
class Training:
    """A training under way. ``keep`` receives every checkpoint, in the main process; ``tell`` receives the progress and the
    effect."""

    task: Task
    pace: Pace
    processes: Processes
    run: str = ""
    keep: Callable[[Checkpoint], None] | None = None
    tell: Callable[[float, str], None] | None = None
    clock: Callable[[], float] = time.perf_counter
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    bfloat16: bool = False
    scale: Scale = field(init=False)

    def __post_init__(self) -> None:
        self.scale = Scale(self.task.rewritten)

    def train(self, resumed: Checkpoint | None = None, *, keep_outputs: bool = False) -> Distilled:
        """Train to the end, or until nothing is gained any more; afterwards the parameters hold the best, which may be what they
        held before. ``resumed``: go on from there. ``keep_outputs``: compute the original's outputs for all inputs in advance, if
        that takes little of the training. Raises ProcessLostError where another process is gone."""
        started = self.clock()
        with ExitStack() as stack:
            stack.enter_context(training(self.task.rewritten, self.task.parameters))
            if keep_outputs and not self.task.joins and self._outputs_pay():
                self.task = replace(self.task, examples=self.task.examples.with_outputs(self.task.original))
            ended = None
            if self.task.parameters:
                stepper = Stepper(self.task.parameters, orthogonal=True)
                self._begin(stepper, resumed)
                self.bfloat16 = self._bfloat16_pays()
                ended = self._steps(stepper, started - self.seconds) if self.curve[0].effect > 0 else None
                put_numbers(self.task.parameters, self.best)
            else:
                self.curve = [Point(step=0, seconds=0.0, effect=self._effect())]
        return Distilled(tuple(self.curve), self.step, self.seconds, ended)

    def _begin(self, stepper: Stepper, resumed: Checkpoint | None) -> None:
        if resumed is None:
            self.best = numbers_of(self.task.parameters)
            self.curve = [Point(step=0, seconds=0.0, effect=self._effect())]
            return
        self.step, self.seconds = resumed.standing.step, resumed.standing.seconds
        self.curve, self.best = list(resumed.standing.curve), dict(resumed.best)
        stepper.resume(self.step, resumed.now, resumed.average, resumed.first, resumed.second)

    def _bfloat16_pays(self) -> bool:
        """Whether steps are taken in bfloat16 unasked: if no precision was asked for, and rounding does little compared with what
        there is to gain. The main process decides, as the others may run on another processor."""
        if self.processes.precision_asked:
            return False
        rounding = rounding_of(self.task.original, self.task.held_out, self.task.meanings)
        return self.processes.of_main(rounding) <= ROUNDING * self.curve[0].effect

    def _outputs_pay(self) -> bool:
        """Whether computing the original's outputs in advance pays: in a training by steps, if every input is seen at least once;
        in one by the clock, if the original takes at most a tenth of the time for all inputs."""
        examples, pace = self.task.examples, self.pace
        if pace.steps is not None:
            return pace.steps >= examples.steps_of_epoch
        started = self.clock()
        with torch.no_grad():
            results_of(self.task.original, tuple(tensor[: examples.at_once] for tensor in examples.inputs))
        each = self.processes.of_main(self.clock() - started)
        return each * max(1, examples.count // examples.at_once) <= OUTPUTS_SHARE * pace.seconds

    def _steps(self, stepper: Stepper, started: float) -> str | None:
        """Take all steps that are left; returns why training ended early, if it did. ``started``: the clock when the training
        began."""
        if (reason := self._in_vain()) is not None:  # it had already ended when its checkpoint was written
            return reason
        task, parameters = self.task, list(self.task.parameters.values())
        with observed(task.original, task.joins) as wanted, observed(task.rewritten, task.joins) as found:
            bad = torch.zeros((), device=self.processes.device)
            progress = self.pace.progress(self.step, self.seconds)
            while progress < 1.0:
                with composed(task.rewritten, task.sites, self.bfloat16):
                    loss = self.scale.differentiated(parameters, lambda factor: self._gradients(wanted, found, factor))
                bad += loss.isfinite().logical_not()
                stepper.step(self.pace.rate_at(progress), self.scale.factor)
                self.step += 1
                self.seconds = self._now(started)
                before, progress = progress, self.pace.progress(self.step, self.seconds)
                looks = int(progress * LOOKS + 1e-9) > int(before * LOOKS + 1e-9)
                if (looks or self.step % LOOKED_AT == 0) and bool(bad):
                    return f"the loss was no number any more within {self.step} steps; {self._to_numbers(wanted)} would help"
                if looks and (reason := self._look(stepper, progress)) is not None:
                    return reason
        return None

    def _now(self, started: float) -> float:
        """Seconds of training, the same in all processes where these seconds decide anything."""
        seconds = self.clock() - started
        return seconds if self.pace.steps is not None else self.processes.of_main(seconds)

    def _gradients(self, wanted: Named, found: Named, factor: float) -> Tensor:
        """As below; in float32 from the first step that fails in bfloat16. Raises TraceError where there are no gradients."""
        try:
            return self._loss_and_gradients(wanted, found, factor)
        except ConvRewriteError:
            raise
        except Exception as error:  # a forward may refuse gradients in any way
            if self.bfloat16:  # an operator whose gradient does not support bfloat16
                self.bfloat16 = False
                return self._gradients(wanted, found, factor)
            if out_of_memory(error):
                raise
            raise TraceError(
                f"{type(self.task.rewritten).__name__}: expected a model that torch can differentiate, found that it cannot: "
                f"{innermost_cause(error)}; give a version without operators that have no gradient, and without work in "
                "place on numbers that a gradient needs"
            ) from error

    def _loss_and_gradients(self, wanted: Named, found: Named, factor: float) -> Tensor:
        """One batch forwards and backwards: returns the loss of all processes together, and leaves the gradients of ``factor``
        times that loss."""
        task, processes = self.task, self.processes
        examples = task.examples
        rows = examples.rows(self.step, processes.index, processes.count)
        given = examples.drawn(self.step, rows, processes.index, processes.count)
        with in_bfloat16() if self.bfloat16 else processes.autocast():
            if examples.outputs:
                outputs = examples.wanted(rows)
            else:
                with torch.no_grad():
                    outputs = results_of(task.original, given)
            results = results_of(task.rewritten, given)
            loss = task.loss(outputs, results, wanted, found)
        if examples.labels is not None:
            loss = loss + LABELS * self._to_labels(results, examples.labels[rows.to(examples.labels.device)])
        if not any(result.requires_grad for result in results.values()):
            raise TraceError(
                f"{type(task.rewritten).__name__}: expected outputs that gradients lead back from to what is trained, found "
                "none, as the model cuts them off (detach, no_grad, numpy); give a version that lets them through"
            )
        for parameter in task.parameters.values():
            parameter.grad = None
        (loss * factor).backward()
        return self._together(loss.detach())

    def _to_labels(self, results: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The mean cross-entropy of the outputs that are class scores."""
        parts = [
            F.nll_loss(self.task.meanings[name].log_scores(result.float()), labels.to(result.device))
            for name, result in results.items()
            if takes_labels(self.task.meanings[name], result)
        ]
        return torch.stack(parts).mean()

    def _together(self, loss: Tensor) -> Tensor:
        """The mean of the loss and of the gradients over the processes, all in one message."""
        if self.processes.count == 1:
            return loss
        parameters = list(self.task.parameters.values())
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        dtype = reduce(torch.promote_types, (gradient.dtype for gradient in gradients), torch.float32)
        flat = torch.cat([part.reshape(-1).to(dtype) for part in (loss, *gradients)])
        flat = self.processes.mean(flat)
        parts = flat[1:].split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter.dtype)
        return flat[0]

    def _look(self, stepper: Stepper, progress: float) -> str | None:
        """Measure the effect on held-out inputs, keep the best, and write a checkpoint; returns the reason to end, if there is
        one."""
        with stepper.averaged():
            effect = self._effect()
        if effect < min(point.effect for point in self.curve):
            self.best = {name: value.clone() for name, value in stepper.average.items()}
        self.curve.append(Point(step=self.step, seconds=self.seconds, effect=effect))
        if self.tell is not None:
            self.tell(progress, f"held out {effect:.3g}, {self.curve[0].effect:.3g} before")
        if self.keep is not None and self.processes.index == 0:
            self.keep(self._checkpoint(stepper))
        self.scale.begin()
        return self._in_vain()

    def _in_vain(self) -> str | None:
        """Why to end, if nothing was gained for ``PATIENCE`` looks."""
        since = len(self.curve) - 1 - self.curve.index(min(self.curve, key=lambda point: point.effect))
        return f"nothing was gained in {since} looks at the held-out inputs in a row" if since >= PATIENCE else None

    def _to_numbers(self, wanted: Named) -> str:
        """What would make the loss finite: the rate is not to blame where the original gives no numbers in the last steps."""
        steps = range(max(0, self.step - LOOKED_AT), self.step)
        if all(self._finite(step, part, wanted) for step in steps for part in range(self.processes.count)):
            return "a smaller rate"
        inputs = "inputs for which the original gives numbers"
        return (
            inputs if self.task.examples.augment is None else f"an augmentation that gives finite numbers, or {inputs},"
        )

    def _finite(self, step: int, part: int, wanted: Named) -> bool:
        """Whether the original is a finite distance from itself on what a process saw in a step."""
        examples, count = self.task.examples, self.processes.count
        given = examples.drawn(step, examples.rows(step, part, count), part, count)
        with torch.no_grad():
            outputs = results_of(self.task.original, given)
            return bool(self.task.loss(outputs, outputs, wanted, wanted).isfinite())

    def _effect(self) -> float:
        """The main process's effect, so that all processes keep the same numbers; infinite where it is not a number."""
        effect = self.processes.of_main(self.task.effect())
        return math.inf if math.isnan(effect) else effect

    def _checkpoint(self, stepper: Stepper) -> Checkpoint:
        standing = Standing(run=self.run, step=self.step, seconds=self.seconds, curve=tuple(self.curve))
        now = {name: value.clone() for name, value in stepper.exact.items()}
        return Checkpoint(standing, now, self.best, stepper.average, stepper.first, stepper.second)
