"""How near a rewritten model's outputs are to the original's, each measured according to what it means.

An output of class scores is measured by the divergence of its distributions and by its top class, one of independent
probabilities by the divergence of each entry, an embedding by the angle, numbers by their relative error. The models are run
elsewhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convrewrite.errors import VerificationError
from convrewrite.meanings.kinds import Meaning, OutputKind
from convrewrite.meanings.variation import Variation
from convrewrite.places import PROCESSOR, in_float64
from convrewrite.worst import Worst

MOST_ERROR, LEAST_AGREEMENT = 0.2, 0.9
"""Relative error and agreement of any output, unless the caller sets a limit: beyond them a model does not compute
the same any more."""

MOST_UNEXPLAINED = 0.5
"""A model that leaves more than this part of the variance of an output unexplained hardly follows its inputs any more."""


PIECE = 1 << 16
"""Numbers that are compared at a time: in float64 half a megabyte."""


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the rewritten model against the original's, over all examples, taken for a ``kind``.

    ``relative_error`` is ||a - b||_F / ||a||_F. Class scores, logits or probabilities, also have ``top1_agreement``, the share
    of examples (of positions, where there are any) with the same largest class, and ``kl``, the mean of their KL(a || b) in
    nats, of the softmax of logits and of probabilities as they are. Independent probabilities have ``kl``, the mean over
    their entries of the KL of two Bernoulli distributions; embeddings ``cosine``, the mean cosine between a and b.
    Integers and booleans have ``equal_share``, the share of their entries that are equal; their ``relative_error`` is the
    share that differ, as the distance of two indices means nothing.

    Values that vary have ``unexplained``, the part of the original's variance that is not explained: ||a - b||^2 over the squared
    deviations of a from the mean of its channel, n / (n - 1) times for n numbers, the mean over units (``Meaning.units``).
    Of scores beside boxes (``Meaning.parts``), ``relative_error`` is that of the worse.
    """

    name: str
    relative_error: float
    top1_agreement: float | None = None
    kl: float | None = None
    equal_share: float | None = None
    cosine: float | None = None
    kind: OutputKind = "values"
    unexplained: float | None = None

    @property
    def effect(self) -> float:
        """One number to be kept small: the KL where there is one, for embeddings the squared distance of unit vectors, the part
        of the variance of values that is not explained, otherwise the squared relative error."""
        if self.kl is not None:
            return self.kl
        if self.unexplained is not None:
            return self.unexplained
        return self.relative_error**2 if self.cosine is None else 2 * (1 - self.cosine)

    def lost(self) -> dict[str, float]:
        """Its figures that are beyond the limits, by what they are; only a number within them is good, and NaN is not."""
        if self.equal_share is not None:
            return {} if self.equal_share >= LEAST_AGREEMENT else {"equal entries": self.equal_share}
        found = {} if self.relative_error <= MOST_ERROR else {"relative output error": self.relative_error}
        if self.top1_agreement is not None and not self.top1_agreement >= LEAST_AGREEMENT:
            found["top-1 agreement"] = self.top1_agreement
        return found

    def unfollowed(self) -> dict[str, float]:
        """In the same form, what it leaves unexplained where it hardly follows the inputs any more, however small its error may
        be beside numbers that hardly vary."""
        if self.unexplained is None or self.unexplained <= MOST_UNEXPLAINED:
            return {}
        return {"unexplained variance": self.unexplained}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The fidelity of every output that is not ignored, over ``examples`` examples; ``meanings`` are those of all outputs,
    ``left_out`` names what the original returns besides tensors. ``constant``: the original gave the same outputs for all
    examples, so that nothing shows whether another model follows them."""

    outputs: tuple[OutputFidelity, ...]
    examples: int
    left_out: tuple[str, ...] = ()
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    constant: bool = False

    @property
    def least_agreement(self) -> float | None:
        """The smallest top-1 agreement of any output; None without class scores."""
        return Worst.of(self.outputs).agreement

    @property
    def effect(self) -> float:
        """How far all outputs are from the original's, as one number: the weighted mean of their own effects."""
        parts = [(self.meanings[output.name].weight, output.effect) for output in self.outputs]
        return sum(weight * effect for weight, effect in parts) / sum(weight for weight, _ in parts)

    @property
    def worst_error(self) -> float:
        """The largest relative error of any output."""
        return max(output.relative_error for output in self.outputs)

    @property
    def most_unexplained(self) -> float:
        """The largest part of the variance of any output of values that is not explained; 0 without values."""
        return max((output.unexplained for output in self.outputs if output.unexplained is not None), default=0.0)


@dataclass(slots=True)
class RunningFidelity:
    """The running sums of all outputs that count; float64, no tensor is kept."""

    meanings: Mapping[str, Meaning]
    where: str = "the rewritten model"
    _sums: dict[str, "_Sums"] = field(default_factory=dict)

    def add(self, original: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
        """One batch. Raises VerificationError where names differ, or shapes of what is not ignored."""
        ignored = {name for name, meaning in self.meanings.items() if not meaning.counts}
        require_same_outputs(original, found, self.where, ignored)
        for name, tensor in original.items():
            if name in ignored:
                continue
            sums = self._sums.setdefault(name, _Sums(self.meanings[name]))
            for pair in _pieces(tensor, found[name], self.meanings[name].axis):
                sums.add(*pair)

    def outputs(self) -> tuple[OutputFidelity, ...]:
        """The fidelity of every output, over what was added."""
        return tuple(sums.fidelity(name) for name, sums in self._sums.items())


def effect_of(
    pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], meanings: Mapping[str, Meaning]
) -> float:
    """:attr:`Fidelity.effect` of outputs. ``pairs`` are (original, found), batch by batch.

    Raises VerificationError where outputs differ in names or shapes.
    """
    fidelity = RunningFidelity(meanings)
    for original, found in pairs:
        fidelity.add(original, found)
    return Fidelity(fidelity.outputs(), 0, meanings=meanings).effect


def _pieces(original: Tensor, found: Tensor, axis: int) -> Iterable[tuple[Tensor, Tensor]]:
    """A batch of an output, and of another's, as some examples at a time: as many as the processor's cache holds. In one piece,
    every step of a comparison would read and write all of it, which takes two to five times as long."""
    if original.ndim < 2 or len(original) < 2 or axis % original.ndim == 0 or original.device.type != PROCESSOR:
        return ((original, found),)
    examples = max(1, PIECE // max(1, original[0].numel()))
    return zip(original.split(examples), found.split(examples), strict=True)


def require_same_outputs(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, ignored: Iterable[str] = ()
) -> None:
    """Raise VerificationError unless names, and the shapes of what is not ignored, are the same."""
    if expected.keys() != found.keys():
        raise VerificationError(f"{where}: expected outputs {', '.join(expected)}; found {', '.join(found)}")
    for name in expected.keys() - set(ignored):
        wanted, shape = tuple(expected[name].shape), tuple(found[name].shape)
        if wanted != shape:
            raise VerificationError(
                f"{where}: output {name!r}: expected shape {wanted}, found {shape}; an output whose size depends on the "
                f"numbers in it, as a list of detections, cannot be compared: ignore it (--output {name}=ignore), or give "
                "the part of the model that comes before"
            )


@dataclass(slots=True)
class _Sums:
    """Running sums of one output's fidelity."""

    meaning: Meaning
    squared_difference: float = 0.0
    squared_original: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    cosine: float = 0.0
    rows: int = 0
    equal: int = 0
    entries: int = 0
    variation: Variation = field(init=False)

    def __post_init__(self) -> None:
        self.variation = Variation(self.meaning)

    def add(self, original: Tensor, rewritten: Tensor) -> None:
        self.entries += original.numel()
        if self.meaning.kind == "discrete":
            self.equal += int((original.cpu() == rewritten.cpu()).sum())
            return
        a, b = in_float64(original.detach()), in_float64(rewritten.detach())
        if self.meaning.kind == "values":
            self.variation.add(a, b)
            return
        if a.isfinite().all():
            difference, known = a - b, a
        else:  # equal infinities, as in masks, count as equal, though their difference is not a number
            difference, known = torch.where(a == b, 0.0, a - b), a[a.isfinite()]
        self.squared_difference += float(difference.square_().sum())
        self.squared_original += float(known.square().sum())
        if self.meaning.scores:
            self._add_scores(a, b)
        elif self.meaning.kind == "multilabel":
            self.kl += _bernoulli_kl(a, b, torch.finfo(original.dtype).eps)
        elif self.meaning.kind == "embedding":
            rows = self.meaning.rows(a), self.meaning.rows(b)
            self.rows += len(rows[0])
            self.cosine += float(_cosines(*rows).sum())

    def _add_scores(self, a: Tensor, b: Tensor) -> None:
        agreed = a.argmax(self.meaning.axis) == b.argmax(self.meaning.axis)
        self.rows += agreed.numel()
        self.agreed += int(agreed.sum())
        log_p, log_q = self.meaning.log_probabilities(a), self.meaning.log_probabilities(b)
        terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
        total = float(terms.sum())
        if math.isnan(total):
            total = float(torch.where(self.meaning.masked(a, b), 0.0, terms).sum())
        self.kl += total

    def fidelity(self, name: str) -> OutputFidelity:
        kind = self.meaning.kind
        if kind == "discrete":
            share = self.equal / self.entries if self.entries else 1.0
            return OutputFidelity(name, 1 - share, equal_share=share, kind=kind)
        if kind == "values":
            return self._of_values(name)
        found = OutputFidelity(name, _relative(self.squared_difference, self.squared_original), kind=kind)
        if kind == "multilabel" and self.entries:
            return OutputFidelity(name, found.relative_error, kl=_divergence(self.kl / self.entries), kind=kind)
        if not self.rows:
            return found
        if kind == "embedding":
            # A vector with NaN has no direction: it counts as far from the original as an opposite one.
            cosine = -1.0 if math.isnan(self.cosine) else min(1.0, self.cosine / self.rows)
            return OutputFidelity(name, found.relative_error, cosine=cosine, kind=kind)
        kl = _divergence(self.kl / self.rows)
        return OutputFidelity(name, found.relative_error, self.agreed / self.rows, kl, kind=kind)

    def _of_values(self, name: str) -> OutputFidelity:
        error = max(_relative(*part) for part in self.variation.parts())
        unexplained = None if self.variation.constant else _number(self.variation.unexplained)
        return OutputFidelity(name, error, unexplained=unexplained)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of every pair of rows: 1 for equal rows, those without a direction included, and as exact for small rows as for
    large ones."""
    least = torch.finfo(a.dtype).tiny
    one, other = (rows / rows.abs().amax(1, keepdim=True).clamp_min(least) for rows in (a, b))
    return torch.where((a == b).all(1), 1.0, torch.cosine_similarity(one, other, dim=1))


def _bernoulli_kl(a: Tensor, b: Tensor, least: float) -> float:
    p, q = a.clamp(least, 1 - least), b.clamp(least, 1 - least)
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())


def _divergence(value: float) -> float:
    """Rounding can leave a sum of equal distributions a little below zero, and no KL is negative."""
    return max(_number(value), 0.0)


def _relative(squared_difference: float, squared_original: float) -> float:
    error = math.sqrt(squared_difference)
    return _number(error / math.sqrt(squared_original) if squared_original else math.inf if error else 0.0)


def _number(value: float) -> float:
    """NaN compares false with every limit and would pass every gate: let it be infinite."""
    return math.inf if math.isnan(value) else value
