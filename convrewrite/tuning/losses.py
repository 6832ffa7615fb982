"""What is minimised without labels: the distance of the outputs from the original's, each according to its meaning, and that of
features inside the model.

Every loss is a mean over the examples of a batch, with scales that were measured once. So if several processes have parts of
equal size of a batch, the mean of their losses is the loss of the whole. Logits: Hinton et al. 2015, "Distilling the Knowledge in
a Neural Network", the KL at a temperature T, times T squared. Features: Romero et al. 2015, "FitNets", without the regressor, as
the rewritten model has the original's shapes, and relative, as scales differ from block to block.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convrewrite.errors import UsageError
from convrewrite.inputs import Inputs
from convrewrite.meanings import Meaning, Variation, along_axis
from convrewrite.places import PROCESSOR, in_float64
from convrewrite.tuning.trainable import at_least_single

ROUNDING = 0.1
"""Steps are taken in bfloat16 only if the effect of its rounding on the outputs is at most this part of what there is to gain."""

SCALED_ON = 32
"""Scales are measured on the first batches that have so many examples together, as a batch has as a rule: the variance of a
single number would be its own square."""

Named = Mapping[str, Tensor]
"""Outputs or features of one batch, by name."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """The loss of a batch of the rewritten model against the original.

    ``scales`` are the variances of the original's values, unit by unit, ``feature_scales`` the mean squares of its features;
    ``features`` is the weight of the mean relative squared error of the features against that of the outputs, in nats per unit.
    """

    meanings: Mapping[str, Meaning]
    scales: Mapping[str, Tensor]
    feature_scales: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if not self.scales and not self.feature_scales:
            found = ", ".join(f"{name} ({meaning.kind})" for name, meaning in self.meanings.items())
            raise UsageError(
                f"outputs: expected one that gradients can come from, found {found}; give the part of the model that "
                "comes before, whose outputs are numbers"
            )

    @classmethod
    def of(
        cls,
        outputs: Named,
        meanings: Mapping[str, Meaning],
        features: Named | None = None,
        temperature: float = 1.0,
        weight: float = 0.0,
    ) -> "Distillation":
        """:meth:`over` one batch."""
        return cls.over([(outputs, features or {})], meanings, temperature, weight)

    @classmethod
    def over(
        cls,
        seen: Iterable[tuple[Named, Named]],
        meanings: Mapping[str, Meaning],
        temperature: float = 1.0,
        weight: float = 0.0,
    ) -> "Distillation":
        """With the scales of the original's outputs and features, which are ``seen`` batch by batch. Outputs that are ignored or
        discrete do not count. Raises UsageError where nothing is left."""
        sums: dict[str, Variation] = {}
        squares: dict[str, list[tuple[float, int]]] = {}
        for outputs, features in seen:
            for name, output in outputs.items():
                if meanings[name].counts and meanings[name].kind != "discrete":
                    sums.setdefault(name, Variation(meanings[name])).see(output)
            for name, feature in features.items():
                squares.setdefault(name, []).append(_squares(feature))
        scales = {
            name: found.scales() if meanings[name].kind == "values" else torch.ones(1) for name, found in sums.items()
        }
        feature_scales = {name: _mean(parts) for name, parts in squares.items()}
        return cls(meanings, scales, feature_scales, temperature, weight)

    def __call__(self, wanted: Named, found: Named, wanted_features: Named, found_features: Named) -> Tensor:
        """The loss of one batch, a scalar: the weighted mean of the losses of outputs, plus the loss of the features."""
        total: Tensor | None = None
        weights = sum(self.meanings[name].weight for name in self.scales)
        for name, scales in self.scales.items():
            meaning = self.meanings[name]
            part = output_loss(wanted[name], found[name], meaning, scales, self.temperature) * (
                meaning.weight / weights
            )
            total = part if total is None else total + part
        both = wanted_features.keys() & found_features.keys() if self.features else ()
        # What gets the examples that an earlier layer picks gets others in the rewritten model, and as a rule not as many.
        shown = [n for n in self.feature_scales if n in both and wanted_features[n].shape == found_features[n].shape]
        for name in shown:
            error = relative_loss(wanted_features[name], found_features[name], self.feature_scales[name])
            part = error * (self.features / len(shown))
            total = part if total is None else total + part
        if total is None:
            raise UsageError("outputs: none is trained towards, and no feature was seen; give other inputs")
        return total


def scaled_on(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The first batches, of :data:`SCALED_ON` examples together where there are so many."""
    count = 0
    for batch in batches:
        yield batch
        count += len(batch[0])
        if count >= SCALED_ON:
            return


def takes_labels(meaning: Meaning, output: Tensor) -> bool:
    """Whether labels count for an output: if it is class scores, with one row for each example."""
    return meaning.scores and output.dim() == 2


def output_loss(wanted: Tensor, found: Tensor, meaning: Meaning, scales: Tensor, temperature: float = 1.0) -> Tensor:
    """How far one output of a batch is from the original's, a scalar in the unit of its effect: nats for class scores and
    independent probabilities, squared distance of unit vectors, or the part of the variance that is not explained, ``scales``
    being the variances of what is wanted, by unit."""
    if meaning.scores:
        return _score_loss(wanted.float(), found.float(), meaning, temperature)
    if meaning.kind == "multilabel":
        return _bernoulli_loss(wanted.float(), found.float())
    if meaning.kind == "embedding":
        rows = meaning.rows(wanted.float()), meaning.rows(found.float())
        return 2 * (1 - torch.cosine_similarity(*rows, dim=1).mean())
    wanted, found = _whole(wanted), _whole(found)
    if len(scales) == 1:
        return relative_loss(wanted, found, float(scales))
    weights = along_axis(scales, found, meaning).rsqrt()
    return relative_loss(wanted * weights, found * weights, 1.0)


def relative_loss(wanted: Tensor, found: Tensor, scale: float) -> Tensor:
    """The mean squared difference over ``scale``; numbers that are equal, infinities too, count as zero. ``wanted`` gets no
    gradient."""
    total: Tensor = _SquaredDistance.apply(wanted.detach(), found)  # type: ignore[no-untyped-call]
    return total / (max(1, found.numel()) * scale)


class _SquaredDistance(torch.autograd.Function):
    """The sum of the squared differences in one pass over them, and their gradients in another: features are most of what a step
    reads and writes, and computed operator by operator this took as long as the convolutions."""

    @staticmethod
    def forward(ctx: Any, wanted: Tensor, found: Tensor) -> Tensor:
        """The sum, a scalar, at least in single precision. Equal infinities count as equal: on the processor this is handled only
        if the sum is not finite, on a device always, as a check would wait for the device."""
        difference, waits = found - wanted, found.device.type != PROCESSOR
        if waits:
            difference = torch.where(wanted == found, 0.0, difference)
        total = _square(difference)
        if not waits and not total.isfinite():
            difference = torch.where(wanted == found, 0.0, difference)
            total = _square(difference)
        ctx.save_for_backward(difference)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        """The gradient of the sum with respect to ``found``."""
        (difference,) = ctx.saved_tensors
        return None, difference * (2 * gradient).to(difference.dtype)


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=at_least_single(values)).square()


def _whole(values: Tensor) -> Tensor:
    return values.to(at_least_single(values))


def mean_square(values: Tensor) -> float:
    """The mean square of the finite numbers, or 1 where that is zero, so that errors are absolute then."""
    return _mean([_squares(values)])


def _squares(values: Tensor) -> tuple[float, int]:
    """The sum of the squares of the finite numbers, and how many these are."""
    finite = in_float64(values.detach()[values.isfinite()])
    return float(finite.square().sum()), finite.numel()


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    """The mean of sums, or 1 where that is zero or too large."""
    mean = sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))
    return mean if mean > 0 and math.isfinite(mean) else 1.0


def _score_loss(wanted: Tensor, found: Tensor, meaning: Meaning, temperature: float) -> Tensor:
    """The mean KL of rows of class scores. Rows that are masked in both count as equal and get no gradient; as with
    :class:`_SquaredDistance`, they are looked for on the processor only if the loss is not finite."""
    if found.device.type == PROCESSOR:
        loss = _divergence(meaning.log_scores(wanted), meaning.log_scores(found), temperature)
        if loss.isfinite():
            return loss
    masked = meaning.masked(wanted, found)
    wanted, found = (torch.where(masked, 0.0, scores) for scores in (wanted, found))
    return _divergence(meaning.log_scores(wanted), meaning.log_scores(found), temperature)


def _divergence(log_p: Tensor, log_q: Tensor, temperature: float) -> Tensor:
    """The mean KL of rows of log-probabilities, both softened by the temperature, times its square."""
    if temperature != 1:
        log_p, log_q = ((values / temperature).log_softmax(1) for values in (log_p, log_q))
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))  # NaN stays NaN, and ends the training
    return terms.sum(1).mean() * temperature**2


def _bernoulli_loss(wanted: Tensor, found: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).eps
    p, q = wanted.clamp(least, 1 - least), found.clamp(least, 1 - least)
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
