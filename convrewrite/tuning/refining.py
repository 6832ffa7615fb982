"""All stages of a rewritten model are refined together, without labels, on the inputs that they were fitted to.

A fit in closed form sees one site and its inputs; only a gradient through the whole model shows what the errors of all sites
together do to the outputs. The model is trained towards the original's outputs and, far more, towards the outputs of the
original's activation functions: one input shows thousands of these, so that few inputs go a long way. The result is taken only
where it is nearer to the original on inputs that no step has seen.

Sources: Li et al. 2021 (BRECQ) and Lucas and Mazumder 2025 (SNOWS) refine one block after the other towards the output of the
original's block; here all move together, each to the benefit of all behind it. Hinton et al. 2015 for the outputs' part of the
loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from convrewrite.errors import ConvRewriteError, TraceError
from convrewrite.escaping import first_line, innermost_cause
from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning, effect_of, rounding_of
from convrewrite.modules import copy_model, kept_outputs, named_outputs, run
from convrewrite.places import out_of_memory
from convrewrite.precision import in_bfloat16
from convrewrite.progress import Progress, silent
from convrewrite.state import parameters_of
from convrewrite.tuning.activations import Activations, comparable
from convrewrite.tuning.blocks import observed
from convrewrite.tuning.composition import composed
from convrewrite.tuning.drawing import draws, mingled
from convrewrite.tuning.examples import results_of
from convrewrite.tuning.losses import ROUNDING, Distillation, Named, mean_square, scaled_on
from convrewrite.tuning.pace import Pace
from convrewrite.tuning.scaling import Scale
from convrewrite.tuning.stepping import Stepper
from convrewrite.tuning.trainable import laid_out, numbers_of, put_numbers, rewritten_parameters, training
from convrewrite.values import apart

WORTH = 5e-4
"""Refinement is worth its time if the effect on held-out inputs, in nats or unexplained variance, is at least this: below it
fewer than one top class in a thousand changes."""

WORK = 1.5e13
"""Most MACs of a training, where a step (forward of the original, forward and backward of the rewritten model) counts as four
runs of the original: about four minutes of two cores at 30 GMACs a second each."""

ASKED = 4
"""Where refinement was asked for, it may take this many times that work and the steps for an effect: up to a quarter of an
hour."""

PASSES = 4
"""How many runs of the original one example of a step costs: its own, one forwards and about two backwards."""

FEWEST, FEWEST_ASKED = 100, 20
"""With fewer steps than the first, refinement is not begun unasked, and with fewer than the second not at all: few steps of a
large model are expensive, and gain little before the rate falls again."""

EPOCHS = 200
"""Every input is drawn at most this many times: with few inputs, more of the same teaches nothing."""

HOPELESS = 20
"""Refinement ends once the effect is this many times the best one, as there is no way back. Steps of full size raise an effect
that is already small by a factor of three to five, and it falls again as they become smaller."""

CHECKS = 20
"""How often held-out inputs are looked at, evenly over the steps."""

STEPS, LEAST_STEPS, STEPS_OF_EFFECT, EXAMPLES = 2_000, 200, 40_000, 64
"""Most steps, fewest steps, and steps for an effect of one; and inputs in each step. Where little is to be gained, few steps gain
most of it: of the gain of 600 steps on two networks, three fifths came in 60 of them and 95 % in 300. With small budgets, more
steps go on gaining: at a tenth of the MACs an effect of 0.156 fell to 0.073 in 800 steps, and to 0.068 in 2,400 on inputs that
are patched together."""

RATE, LEAST_RATE, FULL_RATE_FROM = 0.01, 0.0005, 0.1
"""Size of the largest steps, as a part of the root mean square of each stage: ``RATE`` for effects of ``FULL_RATE_FROM`` and
more; below that it shrinks with the square root of the effect, down to ``LEAST_RATE``. For small budgets 0.005, 0.01 and 0.02 led
to about the same effect in 2,000 orthogonal steps, on two networks at 0.15 of the MACs, and 0.04 to 1.31 times that effect. Large
steps do harm where the effect is already small: at half the MACs, 200 steps of 0.003 gained nothing on an effect of 0.00075, 200
of 0.001 led to 0.00063, and 400 of 0.001 or 0.0005 to 0.0006; at a quarter, 251 steps led from 0.0081 to 0.0069 with 0.0064, to
0.0061 with 0.0028, and to 0.0062 with 0.0014, and on the other network 556 steps led to 0.67, 0.63 and 0.70 times the effect."""

FEATURES = 20.0
"""Weight of the features' mean relative squared error against the outputs' KL in nats. On held-out inputs a KL of 0.068 fell to
0.052 without features, to 0.0433 with 3 and to 0.0427 with 20, in 500 to 600 steps; 100 was slower than 20. In 2,000 steps on two
other networks 6, 20 and 60 led to the same effect within a hundredth, and 2 to 1.03 times that effect."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is refined: ``examples`` in each of at most ``steps`` steps, whose size is at most ``rate`` times each stage's
    own size; ``features`` is the weight of the features. The running average of all steps is what is judged and kept."""

    steps: int = STEPS
    examples: int = EXAMPLES
    rate: float = RATE
    features: float = FEATURES


Shown = Sequence[tuple[Inputs, Mapping[str, Tensor]]]
"""Inputs, batch by batch, and the original's outputs for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """What is to be refined, on what, and how.

    ``sites``: names of the rewritten sites, and of the BatchNorms that were folded into them; ``macs``: those of the original for
    one example; ``memory``: bytes that gradients may take; ``batch``: examples at a time where the model takes no other number;
    ``asked``: whether to refine even where there is little to gain, and where it takes long.
    """

    original: nn.Module
    rewritten: nn.Module
    sites: Mapping[str, str | None]
    fit: Sequence[Inputs]
    held_out: Sequence[Inputs]
    meanings: Mapping[str, Meaning]
    macs: int
    memory: int
    seed: int = 0
    batch: int | None = None
    asked: bool = True
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def examples(self) -> int:
        """Examples in a step: whole batches where the model takes a fixed number."""
        if self.batch is None:
            return self.recipe.examples
        return max(1, self.recipe.examples // self.batch) * self.batch

    @property
    def steps(self) -> int:
        """The most steps that may be taken."""
        by_work = int(self._effort * WORK / (PASSES * max(1, self.macs) * self.examples))
        return min(self.recipe.steps, by_work, self.steps_by_inputs)

    @property
    def steps_by_inputs(self) -> int:
        """The number of steps after which more of the same inputs teaches nothing."""
        return EPOCHS * sum(len(inputs[0]) for inputs in self.fit) // self.examples

    def steps_for(self, effect: float) -> int:
        """The steps to take for what there is to gain, within :attr:`steps`."""
        # Infinite where an output is zero for all held-out inputs in the original alone.
        by_effect = round(min(STEPS_OF_EFFECT * effect, self.steps))
        return min(self.steps, self._effort * max(LEAST_STEPS, by_effect))

    @property
    def _effort(self) -> int:
        return ASKED if self.asked else 1

    def rate_for(self, effect: float) -> float:
        """The recipe's rate, and less of it where there is little to gain: effects are squares of errors."""
        return self.recipe.rate * min(1.0, max(LEAST_RATE / RATE, (effect / FULL_RATE_FROM) ** 0.5))

    @property
    def too_few(self) -> str:
        """Why there are too few steps, and what to do."""
        if self.steps_by_inputs <= self.steps:
            return "there are too few inputs; give more"
        helps = not self.asked and replace(self, asked=True).steps >= FEWEST_ASKED
        more = "; --refine does it all the same, in a quarter of an hour or so" if helps else ""
        return f"it would take long for a model of this size{more}"

    def shown(self) -> Shown:
        """The held-out inputs with the original's outputs for them."""
        return [(batch, kept_outputs(self.original, batch)) for batch in self.held_out]

    def effect(self, shown: Shown | None = None) -> float:
        """How far the rewritten model now is from the original on held-out inputs; ``shown``: these with the original's outputs,
        where they are known."""
        pairs = self.shown() if shown is None else shown
        return effect_of(
            ((wanted, named_outputs(run(self.rewritten, batch))) for batch, wanted in pairs), self.meanings
        )


@dataclass(frozen=True, slots=True)
class Refined:
    """The result: the effect on held-out inputs ``before`` and ``after``, the ``steps`` taken, and the ``reason`` if there were
    none."""

    before: float
    after: float
    steps: int = 0
    reason: str | None = None

    @property
    def note(self) -> str:
        """A sentence for a report; empty where there was nothing to do."""
        if self.reason is not None:
            return f"not refined: {self.reason}"
        if not self.steps:
            return ""
        if self.after < self.before:
            before, after = apart(self.before, self.after)
            return f"refined in {self.steps} steps: the effect on held-out inputs fell from {before} to {after}"
        return f"refined in {self.steps} steps without a gain on held-out inputs: left as it was"


def refine(task: Refinement, progress: Progress = silent) -> Refined:
    """Refine the rewritten model of ``task`` in place; however this ends, the model is never left further from the original, on
    held-out inputs, than it was.

    Where it cannot be trained, as no gradient passes, nothing is changed, and the result says why.
    """
    if not task.fit or not task.held_out:
        return Refined(0.0, 0.0, reason="there are no inputs to fit to and others to measure on")
    before = task.effect()
    if not task.asked and before < WORTH:
        return Refined(before, before)
    if task.steps < (FEWEST_ASKED if task.asked else FEWEST):
        return Refined(before, before, reason=task.too_few)
    start = numbers_of(rewritten_parameters(task.rewritten, list(task.sites)))
    best = _Best(before, start)
    try:
        steps = _descend(_at_work(task), best, progress)
    except (RuntimeError, ConvRewriteError) as error:  # an operator without a derivative, or one that works in place
        if out_of_memory(error):
            raise
        best.numbers = start
        return Refined(before, before, reason=f"it cannot be trained: {first_line(error)}")
    finally:
        _put(task, best.numbers)
    if not steps:
        return Refined(before, before, reason="its loss is not a finite number on the inputs that are fitted on")
    after = task.effect()  # as the model is computed in use, stage by stage
    if after < before:
        return Refined(before, after, steps)
    _put(task, start)
    return Refined(before, before, steps)


def _put(task: Refinement, numbers: Mapping[str, Tensor]) -> None:
    put_numbers(rewritten_parameters(task.rewritten, list(task.sites)), numbers)


def _at_work(task: Refinement) -> Refinement:
    """The task on copies of both models, in the memory layout of the inputs: convolutions take half the time if their kernels
    have the same layout."""
    last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in task.fit[0])
    copies = [copy_model(model) for model in (task.original, task.rewritten)]
    original, rewritten = [laid_out(model, torch.channels_last) for model in copies] if last else copies
    return replace(task, original=original, rewritten=rewritten)


@dataclass(slots=True)
class _Best:
    """The best numbers so far, by the names of parameters, and their effect on held-out inputs."""

    effect: float
    numbers: dict[str, Tensor]


def _descend(task: Refinement, best: _Best, progress: Progress) -> int:
    """Take steps until there are enough, or the effect on held-out inputs is hopeless, or numbers are not finite; returns how
    many there were."""
    sites, steps = list(task.sites), task.steps_for(best.effect)
    parameters, pace = rewritten_parameters(task.rewritten, sites), Pace(task.rate_for(best.effect), steps)
    stepper, every = Stepper(parameters, _sizes(task, parameters), orthogonal=True), max(1, steps // CHECKS)
    generator = torch.Generator().manual_seed(task.seed)
    batches = (mingled(batch, generator) for batch in draws(task.fit, task.examples, generator))
    with training(task.rewritten, parameters), ExitStack() as stack:
        shown = task.shown()
        towards = _Towards.of(task)
        if rounding_of(task.original, shown, task.meanings) <= ROUNDING * best.effect:
            towards = _in_bfloat16(towards, parameters)
        stack.enter_context(composed(task.rewritten, sites, towards.bfloat16))
        size, scale = task.batch or towards.examples_within(task.memory), Scale(task.rewritten)
        for step in range(steps):
            parts = list(_parts(next(batches), size))
            if not isfinite(scale.differentiated(list(parameters.values()), partial(towards.gradients, parts))):
                return step
            stepper.step(pace.rate_at(pace.progress(step, 0.0)), scale.factor)
            if (step + 1) % every:
                continue
            with stepper.averaged():
                effect = task.effect(shown)
                if effect < best.effect:
                    best.effect, best.numbers = effect, numbers_of(parameters)
            progress("refine", step + 1, steps, f"effect on held-out inputs {effect:.3g}")
            if not effect < HOPELESS * best.effect:
                return step + 1
    return steps


def _in_bfloat16(exact: "_Towards", parameters: Mapping[str, nn.Parameter]) -> "_Towards":
    """The same loss in bfloat16, if a trial with a few inputs shows that it can be differentiated."""
    rounded, few = replace(exact, bfloat16=True), exact.few
    try:
        rounded.backward(few, len(few[0]))
    except (RuntimeError, ConvRewriteError):  # an operator whose gradient does not support bfloat16
        return exact
    finally:
        for parameter in parameters.values():
            parameter.grad = None
    return rounded


def _parts(inputs: Inputs, size: int) -> Iterator[Inputs]:
    for start in range(0, len(inputs[0]), size):
        yield tuple(tensor[start : start + size] for tensor in inputs)


def _sizes(task: Refinement, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """The size that a step of each parameter is relative to: for a kernel its root mean square; for a bias, which may be zero,
    that of its site's outputs, to which it is added."""
    with observed(task.rewritten, list(task.sites)) as seen:
        run(task.rewritten, task.fit[0])
    outputs = {name: mean_square(value) ** 0.5 for name, value in seen.items()}
    modules = dict(task.rewritten.named_modules(remove_duplicate=False))
    site_of = {id(p): name for name in task.sites for p in parameters_of(modules[name])}
    return {
        name: mean_square(p) ** 0.5 if p.dim() > 1 else outputs.get(site_of[id(p)], mean_square(p) ** 0.5)
        for name, p in parameters.items()
    }


@contextmanager
def _refusals_told() -> Iterator[None]:
    """What the caller's own code raises where it is run with gradients becomes a TraceError, or is the RuntimeError that torch
    raises itself."""
    try:
        yield
    except (RuntimeError, ConvRewriteError):
        raise
    except Exception as error:  # a forward may refuse gradients in any way
        raise TraceError(innermost_cause(error)) from error


@dataclass(frozen=True, slots=True)
class _Towards:
    """The loss of a batch against the original; ``bfloat16``: whether both run in bfloat16."""

    task: Refinement
    distillation: Distillation
    bfloat16: bool = False

    @classmethod
    def of(cls, task: Refinement) -> "_Towards":
        """With the scales of the first batches. Features count where both models call the same activation functions."""
        return cls(task, Distillation.over(_seen(task), task.meanings, weight=task.recipe.features))

    def loss(self, inputs: Inputs) -> Tensor:
        """The loss of one batch, with its graph. Raises TraceError where no gradient leads to what is trained."""
        with in_bfloat16(self.bfloat16), Activations() as features:
            wanted = named_outputs(run(self.task.original, inputs))
        with in_bfloat16(self.bfloat16), Activations() as others, _refusals_told():
            found = results_of(self.task.rewritten, inputs)
        loss = self.distillation(wanted, found, features.seen, others.seen)
        if not loss.requires_grad:
            raise TraceError("no gradient leads from the outputs to a rewritten site, as where onnxruntime runs a part")
        return loss

    def gradients(self, parts: Sequence[Inputs], factor: float) -> float:
        """Add the gradients of a batch, which comes in parts, times ``factor``; returns its loss."""
        return sum(self.backward(part, self.task.examples, factor) for part in parts)

    def backward(self, inputs: Inputs, examples: int, factor: float = 1.0) -> float:
        """Add the gradients of a part of a batch of ``examples`` examples; returns the part's share of the loss."""
        loss = self.loss(inputs) * (len(inputs[0]) / examples)
        with _refusals_told():
            (loss * factor).backward()
        return float(loss.detach())

    @property
    def few(self) -> Inputs:
        """Two examples, or as many as the model takes."""
        return tuple(tensor[: self.task.batch or 2] for tensor in self.task.fit[0])

    def examples_within(self, memory: int) -> int:
        """How many examples need no more than ``memory`` bytes for what the backward pass keeps."""
        held = 0

        def noted(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
            self.loss(self.few)
        return max(1, memory * len(self.few[0]) // max(1, held))


def _seen(task: Refinement) -> Iterator[tuple[Named, Named]]:
    """What scales are measured on: the original's outputs, and its features where the rewritten model has the same, by batch."""
    same = None
    for inputs in scaled_on(task.fit):
        with Activations() as features:
            outputs = named_outputs(run(task.original, inputs))
        if same is None:
            with Activations() as others:
                run(task.rewritten, inputs)
            same = comparable(features.seen, others.seen)
        yield outputs, features.seen if same else {}
