"""What each output of a model means: class scores, probabilities, a direction, or numbers whose size counts.

How far a rewritten output is off can only be said once that is known. It is inferred from evidence, the strongest first: the
user's word, what holds for the values whatever the inputs (rows that sum to one, unit vectors), the function that gave the
output, the names of the output and of the module that gave it, and what its values look like on representative inputs.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from convrewrite.errors import ModelError, TraceError, UsageError
from convrewrite.inputs import Inputs
from convrewrite.meanings.looks import Seen
from convrewrite.meanings.origins import Origin, origins_noted
from convrewrite.meanings.words import Hint, hint_of
from convrewrite.modules import ROOT, alike, kept_outputs, named_outputs, run
from convrewrite.state import state_of
from convrewrite.values import near, shown

OutputKind = Literal["logits", "probabilities", "multilabel", "embedding", "values", "ignore", "discrete"]
SCORES = ("logits", "probabilities")
SIGMOIDS = ("sigmoid", "special_expit", "hardsigmoid")
OF_UNIT_NUMBERS = (*SIGMOIDS, "softmax")
OF_MEASURES = ("relu", "tanh", "hardtanh", "clamp", "softplus", "exp", "abs", "square", "sqrt", "atan", "sin", "cos")

QUANTITIES = 32
"""Up to so many entries of values are quantities that each have a unit of their own."""

BESIDE = "it holds numbers in [0, 1] beside large ones, as scores beside boxes"
"""The reason of an output that is compared in two parts."""

QUOTIENTS = ("reciprocal", "div", "mul")
"""Functions that come last in a sigmoid that is written out, such as ``1 / (1 + exp(-x))``."""

ASKABLE = tuple(kind for kind in get_args(OutputKind) if kind != "discrete")
"""Kinds that a user may name; integers and booleans are found to be discrete."""

EXAMPLES = 64
"""Inputs that meanings are inferred from, unless one batch alone has more."""

WantedOutputs = Mapping[str, "str | tuple[str, float]"]
NOTHING: Mapping[str, "Meaning"] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an output was taken for and why, how much it counts among several, and the axis of its classes or vectors.

    ``logits``: any scores whose softmax are probabilities; ``probabilities``: sum to one; ``multilabel``: each a
    probability of its own; ``embedding``: only its direction counts; ``values``; ``discrete``: integers and booleans;
    ``ignore``: not compared. ``shares`` are the entries of ``values`` along the axis that lie in [0, 1] beside large numbers, as
    a detector's scores beside its boxes in pixels.
    """

    kind: OutputKind
    reason: str
    weight: float = 1.0
    axis: int = 1
    shares: tuple[int, ...] = ()

    @property
    def scores(self) -> bool:
        """Whether one class is on top."""
        return self.kind in SCORES

    @property
    def counts(self) -> bool:
        """Whether the output is compared at all."""
        return self.kind != "ignore"

    def rows(self, output: Tensor) -> Tensor:
        """``(rows, K)``: the classes of every example and position, or its vectors."""
        return output.movedim(self.axis, -1).flatten(0, -2)

    def inside(self, entries: int) -> Tensor:
        """``(entries,)``: which entries along the axis are shares; none of an output of another size."""
        inside = torch.zeros(entries, dtype=torch.bool)
        if self.shares and self.shares[-1] < entries:
            inside[list(self.shares)] = True
        return inside

    def parts(self, output: Tensor) -> tuple[Tensor, ...]:
        """The output in parts of one unit each, in which errors can be added: one, or the large numbers and the shares."""
        inside = self.inside(output.shape[self.axis]) if self.shares else None
        if inside is None or not bool(inside.any()):
            return (output,)
        return tuple(
            output.index_select(self.axis, chosen.nonzero().flatten().to(output.device)) for chosen in (~inside, inside)
        )

    def units(self, entries: int) -> Tensor:
        """``(entries,)``: the number of the unit of each entry along the axis. A few entries are quantities of their own, as an
        angle beside a distance; many are features of one unit, or the large numbers and the shares."""
        return torch.arange(entries) if entries <= QUANTITIES else self.inside(entries).long()

    def masked(self, original: Tensor, other: Tensor) -> Tensor:
        """Which rows of class scores have no distribution, but are equal: the same numbers in both outputs, the largest one
        infinite, as where a mask leaves no class. In the shape of the outputs, with one entry along the axis."""
        return (original == other).all(self.axis, keepdim=True) & original.amax(self.axis, keepdim=True).isinf()

    def log_scores(self, output: Tensor) -> Tensor:
        """``(rows, K)``: logarithms of the class probabilities."""
        return self.rows(self.log_probabilities(output))

    def log_probabilities(self, output: Tensor) -> Tensor:
        """:meth:`log_scores` in the shape of the output."""
        if self.kind == "logits":
            return output.log_softmax(self.axis)
        return output.clamp_min(torch.finfo(torch.float32).tiny).log()


def asked_meanings(wanted: WantedOutputs | None) -> dict[str, Meaning]:
    """What a user said of outputs, ``{"logits": "embedding", "aux": ("logits", 0.5)}``. Raises UsageError for other words and
    weights that are no positive numbers."""
    found: dict[str, Meaning] = {}
    for name, value in (wanted or {}).items():
        kind, weight = (value, 1.0) if isinstance(value, str) else value
        if kind not in ASKABLE:
            known = ", ".join(ASKABLE)
            raise UsageError(f"output {name}: expected one of {known}, found {kind!r}{near(kind, ASKABLE)}")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight <= sys.float_info.max:
            raise UsageError(f"output {name}: expected a positive number as its weight, found {shown(weight)}")
        found[name] = Meaning(kind, "as asked", float(weight))  # type: ignore[arg-type]
    return found


def tell(
    model: nn.Module,
    batches: Iterable[Inputs],
    asked: Mapping[str, Meaning] = NOTHING,
    *,
    known: Mapping[str, Meaning] = NOTHING,
    representative: bool = True,
    comparable: bool = False,
) -> dict[str, Meaning]:
    """What every output of ``model`` means, inferred from the first of the batches. ``asked`` overrides all evidence, and what is
    ``known`` from an earlier run.

    ``representative``: whether the inputs are like those that the model will get; statistics on random noise are not trusted.
    Raises UsageError for names that no output has, and for meanings that an output cannot have; ModelError where all outputs that
    count are empty, or, if all have to be ``comparable``, where one holds NaN, which nothing equals; TraceError when the model
    does not run.
    """
    parts: list[dict[str, Tensor]] = []
    origins: dict[str, Origin] = {}
    examples = 0
    sizes: set[tuple[int, ...]] = set()
    for batch in batches:
        if parts:
            parts.append(kept_outputs(model, batch))
        else:
            outputs, origins = outputs_and_origins(model, batch)
            parts.append({name: tensor.clone() for name, tensor in outputs.items()})  # the next run may write to them
        sizes |= {tuple(tensor.shape[1:]) for tensor in batch}
        examples += len(batch[0])
        if examples >= EXAMPLES:
            break
    samples = {name: _together([part[name] for part in parts if name in part]) for name in parts[0]}
    found = read(samples, asked, origins=origins, known=known, input_sizes=sizes, representative=representative)
    _require_numbers(parts, found, examples)
    if comparable:
        _require_no_nan(parts, found)
    return found


def _require_no_nan(parts: Sequence[Mapping[str, Tensor]], meanings: Mapping[str, Meaning]) -> None:
    """Raise ModelError for NaN in an output that counts."""
    for name, values in ((name, values) for part in parts for name, values in part.items()):
        if name in meanings and meanings[name].counts and values.is_floating_point() and bool(values.isnan().any()):
            raise ModelError(
                f"output {name!r}: expected numbers for every input, found NaN among them, which nothing equals; give inputs for "
                "which the model gives numbers (--calib), the part of it that comes before, or, if there are other outputs, "
                f"ignore this one (--output {name}=ignore)"
            )


def _require_numbers(parts: Sequence[Mapping[str, Tensor]], meanings: Mapping[str, Meaning], examples: int) -> None:
    """Raise ModelError where there is nothing to compare: whatever a rewritten model gives would be told to be the same."""
    counted = [name for name, meaning in meanings.items() if meaning.counts]
    if not any(part[name].numel() for part in parts for name in counted if name in part):
        raise ModelError(
            f"{', '.join(counted[:3])}: expected numbers to compare, found none at all on {examples} inputs, as of a detector "
            "that finds nothing; give inputs in which the model finds something (--calib), or the part of it that comes before"
        )


def read(
    samples: Mapping[str, Tensor],
    asked: Mapping[str, Meaning],
    *,
    known: Mapping[str, Meaning] = NOTHING,
    origins: Mapping[str, Origin],
    input_sizes: Iterable[tuple[int, ...]] = (),
    representative: bool,
) -> dict[str, Meaning]:
    """As :func:`tell`, from outputs that were computed before; ``input_sizes`` are the inputs' without their batches."""
    said = {**_by_name(known, list(samples)), **_by_name(asked, list(samples))}
    found: dict[str, Meaning] = {}
    for name, sample in samples.items():
        seen = Seen.of(name, sample, origins.get(name), tuple(input_sizes), representative)
        told = _judged(seen)
        found[name] = _in_parts(seen, _agreed(name, said[name], told, sample) if name in said else told)
    if not any(meaning.counts for meaning in found.values()):
        raise UsageError(f"outputs: every output is ignored; keep one of {', '.join(found)}")
    return found


def require_outputs(model: nn.Module, inputs: Inputs, *said: Mapping[str, Meaning], repeatable: bool = False) -> None:
    """Raise UsageError, before any long work, for names that no output of the model has, and ModelError for outputs that nothing
    could be compared with: one of NaN alone, one with NaN where the model itself holds some, or, if they have to be
    ``repeatable``, one that differs each time for the same input. Outputs that are ignored may be so."""
    outputs = kept_outputs(model, inputs)
    ignored: set[str] = set()
    for meanings in said:
        ignored |= {name for name, meaning in _by_name(meanings, list(outputs)).items() if not meaning.counts}
    counted = {name: values for name, values in outputs.items() if name not in ignored}
    for name, values in counted.items():
        nan = values.isnan() if values.is_floating_point() else torch.zeros(0, dtype=torch.bool)
        if nan.numel() and bool(nan.all()):
            raise ModelError(f"output {name!r}: expected numbers, found NaN alone; {_whence_nan(model)}")
        if bool(nan.any()) and any(bool(held.isnan().any()) for held in _real_numbers(model).values()):
            raise ModelError(f"output {name!r}: expected numbers, found NaN among them; {_whence_nan(model)}")
    if repeatable:
        _require_same_again(model, inputs, counted)


def _require_same_again(model: nn.Module, inputs: Inputs, found: Mapping[str, Tensor]) -> None:
    again = named_outputs(run(model, inputs, draw=1))
    for name, values in found.items():
        if name not in again or not alike({name: values}, {name: again[name]}):
            raise ModelError(
                f"output {name!r}: expected the same for the same input, found another each time; take out what draws random "
                "numbers in eval mode, as F.dropout does without training=self.training, or keeps a state"
            )


def _whence_nan(model: nn.Module) -> str:
    """What may have led to NaN, and what to do."""
    held = [name for name, values in _real_numbers(model).items() if not bool(values.isfinite().all())]
    if held:
        return f"the model holds NaN or infinity in {', '.join(held[:3])}: give one whose training went well"
    return "give an input that the model is made for (--input FILE.py:NAME), in place of random numbers"


def _real_numbers(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that hold real numbers."""
    state = {name: values for name, values in state_of(model).items() if isinstance(values, Tensor)}
    return {name: values for name, values in state.items() if values.is_floating_point()}


def outputs_and_origins(model: nn.Module, batch: Inputs) -> tuple[dict[str, Tensor], dict[str, Origin]]:
    """The outputs of one run and their origins, none where the model cannot be followed. TraceError when it does not run."""
    try:
        with origins_noted(model) as origins_of:
            outputs = named_outputs(run(model, batch))
            return outputs, origins_of(outputs)
    except TraceError:  # it runs, but not while it is followed: values alone; if it never runs, this raises
        return named_outputs(run(model, batch)), {}


def _together(parts: Sequence[Tensor]) -> Tensor:
    joinable = parts[0].ndim and all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(list(parts)) if joinable else parts[0]


def _by_name(asked: Mapping[str, Meaning], names: Sequence[str]) -> dict[str, Meaning]:
    """What was said, under the outputs' full names: ``logits`` stands for ``output.logits`` too."""
    found: dict[str, Meaning] = {}
    for said, meaning in asked.items():
        name = said if said in names else f"{ROOT}.{said}"
        if name not in names:
            raise UsageError(f"output {said!r}: the model has no output of this name; it has {', '.join(names)}")
        if name in found:
            raise UsageError(f"output {said!r}: was named twice, once as {name!r}; name it once")
        found[name] = meaning
    return found


def _agreed(name: str, said: Meaning, told: Meaning, sample: Tensor) -> Meaning:
    """What was said, with the axis that the evidence gives. Raises UsageError for what the output cannot be."""
    if said.kind in ("ignore", told.kind):
        return replace(said, axis=told.axis)
    if told.kind == "discrete":
        raise UsageError(f"output {name}: holds integers or booleans and cannot be {said.kind}; say ignore, or nothing")
    if said.kind in (*SCORES, "embedding") and (sample.ndim < 2 or sample.shape[told.axis] < 2):
        raise UsageError(
            f"output {name}: its shape {tuple(sample.shape)} has no axis of several classes or entries; it cannot be {said.kind}"
        )
    low, high = (float(sample.min()), float(sample.max())) if sample.numel() else (0.0, 0.0)
    if said.kind in ("probabilities", "multilabel") and not (low >= -1e-3 and high <= 1 + 1e-3):
        raise UsageError(
            f"output {name}: expected {said.kind} in [0, 1], found {low:.3g} to {high:.3g}; say logits, or values"
        )
    return replace(said, axis=told.axis)


def _judged(seen: Seen) -> Meaning:
    """What the evidence says, the strongest first."""
    if not seen.floating:
        return Meaning("discrete", "it holds integers or booleans")
    hint = hint_of(seen.name, seen.origin.module if seen.origin else "")
    told = (
        _by_what_always_holds(seen)
        or _by_function(seen, hint)
        or _by_words(seen, hint)
        or _by_layer(seen)
        or _by_looks(seen)
    )
    if told is not None:
        return told
    if seen.ndim == 2 and seen.width >= 2:
        return Meaning("logits", "rows of real numbers, and nothing speaks against class scores")
    return Meaning("values", "nothing shows that it holds class scores, probabilities or unit vectors", axis=seen.axis)


def _in_parts(seen: Seen, meaning: Meaning) -> Meaning:
    """With the shares among the values, unless a function gave all of them that leaves no units apart."""
    found = seen.shares() if meaning.kind == "values" and seen.enough and seen.ndim > 2 else None
    if found is None or seen.function in OF_MEASURES:
        return meaning
    told = "" if BESIDE in meaning.reason else f", and {BESIDE}"
    return replace(meaning, reason=meaning.reason + told, axis=found[0], shares=found[1])


def _by_what_always_holds(seen: Seen) -> Meaning | None:
    # Of numbers that a sigmoid gave one by one, it holds by chance: two times 0.5 sums to one, four times 0.5 has length one.
    for axis in () if seen.function in SIGMOIDS else seen.axes:
        if seen.sums_to_one(axis):
            by = " and a softmax gave it" if seen.function == "softmax" else ""
            return Meaning("probabilities", f"its entries lie in [0, 1] and sum to one{by}", axis=axis)
        if seen.log_sums_to_zero(axis):
            return Meaning("logits", "it holds logarithms of probabilities", axis=axis)
        if seen.unit_norm(axis):
            return Meaning("embedding", "it holds vectors of length one", axis=axis)
    return None


def _by_function(seen: Seen, hint: Hint | None) -> Meaning | None:
    if seen.function == "softmax" and seen.ndim > 2:
        return Meaning("values", "a softmax over other axes than its channels gave it", axis=seen.axis)
    by_hand = seen.origin is None or (seen.function in QUOTIENTS and seen.ndim == 2 and seen.width >= 2)
    if seen.function in OF_UNIT_NUMBERS or (by_hand and seen.within_unit):
        return _of_unit_numbers(seen, hint)
    if seen.function == "log_sigmoid_forward":
        return Meaning("values", "it holds logarithms of independent probabilities", axis=seen.axis)
    if seen.function in OF_MEASURES and (hint is None or hint.kind != "class"):
        return Meaning("values", f"a {seen.function} gave it", axis=seen.axis)
    return None


def _of_unit_numbers(seen: Seen, hint: Hint | None) -> Meaning:
    """Numbers in [0, 1], each by itself: probabilities of their own, or a picture, or coordinates."""
    if hint is not None and hint.kind in ("size", "vector"):
        return Meaning("values", hint.reason, axis=seen.axis)
    if seen.like_an_input and not seen.saturated:
        return Meaning("values", "it is an image like an input", axis=seen.axis)
    if seen.width == 4 and not seen.saturated and seen.ndim < 4:
        why = "four numbers in [0, 1] that are seldom near 0 or 1, as coordinates are"
        return Meaning("values", why, axis=seen.axis)
    given = seen.function in OF_UNIT_NUMBERS
    by = f"a {seen.function} gave it" if given else "its entries lie in [0, 1] and do not sum to one"
    return Meaning("multilabel", by, axis=seen.axis)


def _by_words(seen: Seen, hint: Hint | None) -> Meaning | None:
    if hint is None:
        return None
    several = seen.ndim >= 2 and seen.width >= 2
    if hint.kind == "class":
        return Meaning("logits", hint.reason, axis=seen.axis) if several else None
    if hint.kind == "vector" and seen.ndim == 2 and several:
        return Meaning("embedding", hint.reason)
    return Meaning("values", hint.reason, axis=seen.axis)


def _by_layer(seen: Seen) -> Meaning | None:
    if seen.ndim == 2 and seen.width >= 32 and "batch_norm" in seen.function:
        return Meaning("embedding", "a BatchNorm over many channels gave it, as the embeddings of faces have it")
    return None


def _by_looks(seen: Seen) -> Meaning | None:
    if not seen.enough:
        return None
    if seen.ndim == 2:
        why = seen.against_classes()
        return Meaning("values", why) if why else None
    if seen.ndim > 2 and seen.shares():
        return Meaning("values", BESIDE, axis=seen.axis)
    if seen.ndim > 2 and seen.width >= 2 and seen.confident_map():
        return Meaning("logits", "one class is on top at nearly every position", axis=seen.axis)
    return None
