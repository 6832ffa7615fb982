"""Makes a training task from a model, its rewritten form and inputs: what is held out, which parameters are trained, and towards
what."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convrewrite.errors import CalibrationError, UsageError
from convrewrite.inputs import Inputs, in_batches_of
from convrewrite.meanings import Meaning
from convrewrite.modules import alike, copy_model, eval_mode
from convrewrite.settings import Recovery
from convrewrite.tuning.blocks import joins, observed
from convrewrite.tuning.distilling import Task
from convrewrite.tuning.examples import Augment, Examples, kept_results_of, results_of
from convrewrite.tuning.losses import Distillation, scaled_on, takes_labels
from convrewrite.tuning.processes import Processes
from convrewrite.tuning.trainable import every_parameter, laid_out, rewritten_parameters

HELD_OUT, MOST_HELD_OUT = 0.2, 2048
"""Part of the inputs that is held out, and how many at most: enough to measure a KL to a hundredth, and quick to run."""

MOST_OUTPUTS = 0.5
"""Part of the memory that the original's outputs may take, where they are kept; the inputs are in memory already."""

TRIED = 2
"""Examples that a layout is tried on, for a model that takes any number."""

SCALED_ON = 256
"""Most examples of a held-out batch on which scales of outputs and features are measured."""


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """Inputs in two parts, and the labels of the first, where there are any; ``at_a_time``: how many examples the model takes,
    where it does not take any number."""

    train: Inputs
    held_out: Inputs
    labels: Tensor | None = None
    at_a_time: int | None = None

    @classmethod
    def split(
        cls, inputs: Inputs, labels: Tensor | None, seed: int, batch: int | None = None, own: int | None = None
    ) -> "TrainingInputs":
        """A part chosen by the seed is held out; with ``own``, the first so many inputs are trained on, and of the others as many
        are held out as may be. ``batch``: how many examples the model takes at a time, where it does not take any number.

        Raises CalibrationError for a single input, or fewer than two such batches; UsageError for labels that are not one whole
        number for each input.
        """
        count, least = len(inputs[0]), batch or 1
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held = max(least, min(round(count * HELD_OUT), MOST_HELD_OUT) // least * least)
        first, second = order[held:], order[:held]
        if own is not None:
            first, second = order[order < own], order[order >= own][: max(least, MOST_HELD_OUT)]
        first, second = (rows[: len(rows) // least * least] for rows in (first, second))
        if not len(first) or not len(second):
            raise CalibrationError(
                f"data: expected at least {2 * least} inputs, to train on and to hold out, found {count}; give more"
            )
        if labels is not None and (labels.dim() != 1 or len(labels) != count or not _whole(labels.dtype)):
            raise UsageError(
                f"labels: expected {count} whole numbers, one for each input, found {labels.dtype} {tuple(labels.shape)}"
            )
        chosen = None if labels is None else labels[first].long()
        trained, held_out = (tuple(tensor[rows] for tensor in inputs) for rows in (first, second))
        return cls(trained, held_out, chosen, batch)

    def held_out_batches(self, batch: int) -> tuple[Inputs, ...]:
        """The held-out inputs, ``batch`` examples at a time."""
        whole = in_batches_of((self.held_out,), batch)
        done = len(whole) * batch
        rest = tuple(tensor[done:] for tensor in self.held_out)
        return (*whole, rest) if len(rest[0]) else whole


def task_of(
    original: nn.Module,
    rewritten: nn.Module,
    sites: Mapping[str, str | None],
    given: TrainingInputs,
    meanings: Mapping[str, Meaning],
    asked: Recovery,
    processes: Processes,
    augment: Augment | None = None,
) -> Task:
    """Everything that a training works on, on the device of the process. ``sites``: names of rewritten sites and of the
    BatchNorms that were folded into them. The two models are moved to that device, in channels-last layout if they run in it.

    Raises UsageError where no output can be trained towards, and for labels that are not classes of the model; CalibrationError
    where there is not an input for each process, or a whole batch of a model that takes no other.
    """
    layout = _layout(original, tuple(tensor[: given.at_a_time or TRIED] for tensor in given.train))
    for model in (original, rewritten):
        laid_out(model.to(device=processes.device), layout)
    train = _placed(given.train, processes, layout)
    held_out = [_placed(part, processes, layout) for part in given.held_out_batches(asked.batch)]
    few = [tuple(tensor[: given.at_a_time or SCALED_ON] for tensor in batch) for batch in scaled_on(held_out)]
    names = joins(original, rewritten, sites, few[0]) if asked.features else ()
    with eval_mode(original), torch.no_grad(), observed(original, names) as seen:
        shown = ((results_of(original, batch), dict(seen)) for batch in few)
        loss = Distillation.over(shown, meanings, asked.temperature, asked.features)
    with eval_mode(original), torch.no_grad():
        pairs = [(batch, kept_results_of(original, batch)) for batch in held_out]
    if given.labels is not None:
        _require_labels(given.labels, pairs[0][1], meanings)
    parameters = every_parameter(rewritten) if asked.everything else rewritten_parameters(rewritten, list(sites))
    labels = None if given.labels is None else given.labels.to(processes.device)
    batch = _batch(given, asked, processes)
    examples = Examples(train, batch, asked.seed, augment, labels=labels, at_a_time=given.at_a_time)
    return Task(original, rewritten, parameters, list(sites), names, loss, examples, pairs, meanings)


def _batch(given: TrainingInputs, asked: Recovery, processes: Processes) -> int:
    """Examples in a step of all processes together: the same number for each, which is all that some models take."""
    count, each = len(given.train[0]), given.at_a_time or 1
    least = each * processes.count
    if count < least:
        taken = f"the model takes {each} at a time and " if each > 1 else ""
        raise CalibrationError(
            f"data: expected at least {least} inputs to train on, as {taken}there are {processes.count} processes, found "
            f"{count}; give more, or launch fewer"
        )
    return least if given.at_a_time else max(least, min(asked.batch, count) // least * least)


def _require_labels(labels: Tensor, outputs: Mapping[str, Tensor], meanings: Mapping[str, Meaning]) -> None:
    """Raise UsageError unless some output is class scores, and every such output has a class for every label."""
    classes = {name: output.shape[1] for name, output in outputs.items() if takes_labels(meanings[name], output)}
    if not classes:
        found = ", ".join(f"{name} ({meaning.kind})" for name, meaning in meanings.items())
        raise UsageError(
            f"labels: expected an output of class scores, (N, C), which they count for, found {found}; leave them out, or say "
            "what an output means"
        )
    least, most = int(labels.min()), int(labels.max())
    for name, count in classes.items():
        if least < 0 or most >= count:
            raise UsageError(
                f"labels: expected 0 to {count - 1}, as {name} has {count} classes, found {least if least < 0 else most}; "
                "number the classes as the model does"
            )


def _whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def keeps_outputs(task: Task, memory: int) -> bool:
    """Whether the original's outputs for all inputs can be kept: nothing is augmented, there is room for them, and those of an
    example are the same whatever else is in its batch."""
    given, wanted = task.held_out[0]
    alone = len(given[0]) == 1 < task.examples.at_once  # one example does not show what others in its batch do to it
    if alone or task.examples.augment is not None or not _apart(task.original, given, wanted):
        return False
    each = sum(values.numel() * values.element_size() for values in wanted.values()) / len(given[0])
    return each * task.examples.count <= MOST_OUTPUTS * memory


def _apart(original: nn.Module, given: Inputs, wanted: Mapping[str, Tensor]) -> bool:
    """Whether the first half of a batch gets the same outputs among others: not where a model normalises by its batch, or draws
    random numbers."""
    half = (len(given[0]) + 1) // 2
    twice = torch.arange(len(given[0]), device=given[0].device) % half
    with torch.no_grad():
        others = results_of(original, tuple(tensor[twice] for tensor in given))
    parts = [{name: values[:half] for name, values in found.items() if values.dim()} for found in (wanted, others)]
    return alike(parts[0], parts[1])


def _layout(original: nn.Module, few: Inputs) -> torch.memory_format:
    """Channels last, in which convolutions take half the time forwards and backwards, if the model runs in that layout: one that
    calls ``view`` on an image does not. The model itself keeps its layout."""
    if not all(tensor.dim() == 4 for tensor in few):
        return torch.contiguous_format
    try:
        trial = laid_out(copy_model(original), torch.channels_last)
        with torch.no_grad():
            results_of(trial, tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in few))
    except Exception:  # a forward may refuse a layout in any way
        return torch.contiguous_format
    return torch.channels_last


def _placed(inputs: Inputs, processes: Processes, layout: torch.memory_format) -> Inputs:
    """On the device, images in this layout."""
    return tuple(
        tensor.to(processes.device).contiguous(memory_format=layout if tensor.dim() == 4 else torch.contiguous_format)
        for tensor in inputs
    )
