"""The inputs that are trained on, drawn batch by batch, with the original's outputs for them.

Order and augmentation follow from the seed and the number of the step alone, so that an interrupted run goes on as it would have
without the interruption, and several processes draw what one process would.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from convrewrite.errors import UsageError
from convrewrite.escaping import message_of
from convrewrite.inputs import Inputs, seed_of
from convrewrite.modules import named_outputs
from convrewrite.process import same_random_numbers

Augment = Callable[[Tensor], Tensor] | Callable[[Inputs], Inputs]
"""A function that may change anything in a batch of inputs except shapes, dtypes and devices. It takes a tensor where a model has
one input, otherwise a tuple. Its random numbers come from torch, numpy or Python, which are seeded before every call."""

APART = 1_000_003
"""The seeds of two successive epochs differ by this prime, so that runs of neighbouring seeds draw different orders."""


@dataclass(frozen=True, slots=True)
class Examples:
    """``inputs`` on the device that trains, in the layout in which they run fastest; ``batch`` examples in a step of all
    processes together; ``outputs`` are the original's, where they are kept; ``at_a_time``: how many examples the models take,
    where that is not any number."""

    inputs: Inputs
    batch: int
    seed: int
    augment: Augment | None = None
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    at_a_time: int | None = None
    _order: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self.inputs[0])

    @property
    def steps_of_epoch(self) -> int:
        """Steps in which every example is seen once; examples left over come in another epoch."""
        return max(1, self.count // self.batch)

    @property
    def at_once(self) -> int:
        """How many examples the original is given where it is run on all of them."""
        return self.at_a_time or self.batch

    def rows(self, step: int, part: int = 0, parts: int = 1) -> Tensor:
        """The examples of a step that process ``part`` of ``parts`` sees: each process gets equally many, one after the other."""
        epoch, place = divmod(step, self.steps_of_epoch)
        if epoch not in self._order:
            self._order.clear()  # the last epoch is over
            generator = torch.Generator().manual_seed((self.seed + APART * epoch) % 2**63)
            self._order[epoch] = torch.randperm(self.count, generator=generator)
        order = self._order[epoch]
        size = max(1, min(self.batch, self.count) // parts)
        start = place * size * parts + part * size
        return order[start : start + size]

    def drawn(self, step: int, rows: Tensor, part: int = 0, parts: int = 1) -> Inputs:
        """The inputs of these rows. An augmentation is applied to those of all processes together, so that the same random
        numbers are drawn however many processes there are. Raises UsageError for one that fails or returns other shapes,
        dtypes, layouts or devices."""
        if self.augment is None:
            return tuple(_chosen(tensor, rows) for tensor in self.inputs)
        every = torch.cat([self.rows(step, index, parts) for index in range(parts)])
        whole = tuple(_chosen(tensor, every) for tensor in self.inputs)
        with same_random_numbers((self.seed + step) % 2**63):
            changed = _augmented(self.augment, whole)
        return tuple(_like(tensor.chunk(parts)[part], whole[0]) for tensor in changed)

    def with_outputs(self, original: nn.Module) -> "Examples":
        """The examples with the original's outputs for all of them, computed a batch at a time; without outputs if one of these
        does not have one row for every example, so that rows cannot be assigned to examples, or has rows of another size in
        another batch."""
        parts: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for start in range(0, self.count, self.at_once):
                given = tuple(tensor[start : start + self.at_once] for tensor in self.inputs)
                parts.append(kept_results_of(original, given))
                if any(values.dim() == 0 or len(values) != len(given[0]) for values in parts[-1].values()):
                    return self
                if _rows(parts[-1]) != _rows(parts[0]):
                    return self
        return replace(self, outputs={name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def wanted(self, rows: Tensor) -> dict[str, Tensor]:
        """The original's outputs for these rows, where they are kept."""
        return {name: values[rows.to(values.device)] for name, values in self.outputs.items()}


def results_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs of a model, by name, with their graphs; the model gets copies, as it may change its inputs in place, and draws
    what it draws for the same inputs every time."""
    with same_random_numbers(seed_of(inputs)):
        return named_outputs(model(*(tensor.clone() for tensor in inputs)))


def _rows(outputs: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes that outputs have for one example."""
    return {name: values.shape[1:] for name, values in outputs.items()}


def kept_results_of(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The same, to be held beyond the model's next run, which may write to the same tensors again."""
    return {name: tensor.clone() for name, tensor in results_of(model, inputs).items()}


def _chosen(tensor: Tensor, rows: Tensor) -> Tensor:
    return _like(tensor[rows.to(tensor.device)], tensor)


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor in the layout of another one."""
    if tensor.dim() == 4 and other.dim() == 4 and other.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def _augmented(augment: Augment, whole: Inputs) -> Inputs:
    try:
        with torch.no_grad():
            made = augment(whole[0]) if len(whole) == 1 else augment(whole)  # type: ignore[arg-type]
    except Exception as error:  # the caller's own code may raise anything
        raise UsageError(f"augmentation: calling it raised {type(error).__name__}: {message_of(error)}") from error
    changed = tuple(made) if isinstance(made, tuple | list) else (made,)
    wanted, found = (", ".join(map(_described, batch)) for batch in (whole, changed))
    if wanted != found:
        raise UsageError(f"augmentation: expected it to give what it takes, {wanted}, found {found}")
    return changed


def _described(value: object) -> str:
    """What has to stay the same of a tensor; of anything else its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} {tuple(value.shape)} on {value.device}"
