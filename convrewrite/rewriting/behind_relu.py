"""Fits of a site whose outputs go into a ReLU alone: refitted to what the ReLU lets through, and compared by that."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from convrewrite.fitting import LARGE, Block, Fit, Moments, Roots, summed_squares, with_wanted_outputs
from convrewrite.rewriting.attempts import without_failed
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.rules import Candidate
from convrewrite.structures import Option, Stage, Structure, composed_kernel

ROUNDS = 3
"""At most this many refits to what a ReLU lets through; the first one brings most of the gain."""

REFIT_ITERATIONS = 15
"""Iterations of L-BFGS in each refit of a small site."""

CLOSE = 1.1
"""Only fits whose error behind the ReLU is at most this many times the least are refitted: a refit changes errors by a few
hundredths, and by about as much for all options of one site. At 18 sites the same option was taken as by refitting all."""


@dataclass(frozen=True, slots=True)
class BehindRelu:
    """The fits of one site, compared and refitted behind the ReLU that alone uses its outputs; where there is none, as they
    are."""

    site_fit: SiteFit

    def best_of(self, fits: Sequence[tuple[Candidate, Fit]], structures: dict[str, Structure]) -> tuple[Candidate, Fit]:
        """The fit with the least error after the leading ones were refitted to what a ReLU lets through, where nothing else uses
        the output. ``fits`` keep the limits of their candidates, and so does what is found."""
        ahead = self._ahead(fits, structures)
        candidates = [candidate for candidate, _ in ahead]
        tasks = [partial(self.rectify, structures[p.option.structure], p.option, f, p.most_error) for p, f in ahead]
        candidate, (found, _) = min(
            without_failed(candidates, self.site_fit.tried(tasks)), key=lambda entry: entry[1][1]
        )
        return candidate, found

    def _ahead(
        self, fits: Sequence[tuple[Candidate, Fit]], structures: dict[str, Structure]
    ) -> list[tuple[Candidate, Fit]]:
        """The fits whose error behind the ReLU is about the least."""
        if len(fits) == 1 or not self.site_fit.fitted:
            return list(fits)
        each = [
            (structures[p.option.structure].stages(self.site_fit.site.folded_spec.per_group, p.option.parameters), f)
            for p, f in fits
        ]
        errors = self.site_fit.solved([partial(self.error, stages, found) for stages, found in each])
        return [own for own, error in zip(fits, errors, strict=True) if error <= CLOSE * min(errors)]

    def rectify(
        self, structure: Structure, option: Option, found: Fit, most_error: float = math.inf
    ) -> tuple[Fit, float]:
        """Refit to what the ReLU lets through, where nothing else uses the output: below zero any value is as good as another.
        Also returns the error on held-out inputs, which after a refit is the absolute one behind the ReLU: it serves to compare
        the options of one site.

        Where the original is negative, the wanted output becomes what the rewritten site gives, if that is negative too,
        otherwise zero; a fit to these targets never raises the error behind the ReLU, since its objective bounds that error from
        above and touches it at the present fit (majorisation; the relaxation of Zhang et al. 2016, section 2.2). Rounds go on
        while the error behind the ReLU falls on the held-out inputs, and the error without the ReLU, which rises, is at most
        ``most_error``, the rule's limit.
        """
        if not self.site_fit.fitted:
            return found, found.error
        best, least = found, float("inf")
        stages = structure.stages(self.site_fit.site.spec.per_group, option.parameters)
        rounds = ROUNDS if self.site_fit.patch < LARGE else 1
        effort = self.site_fit.effort(REFIT_ITERATIONS)
        own = self.site_fit.goals_of(found)
        for index in range(rounds + 1):
            error = self.error(stages, found)
            if not error < least or found.error > most_error:
                break
            best, least = found, error
            if index < rounds:
                moments = self._relaxed_moments(stages, best)
                goals = [goal.towards(m) for goal, m in zip(own, moments, strict=True)]
                found = self.site_fit.refitted(structure, option, best, goals, moments, effort)
        return best, least

    def error(self, stages: Sequence[Stage], found: Fit) -> float:
        """The error behind the ReLU on held-out positions: the root of the sum of squares."""
        outputs = self._outputs(stages, found, self.site_fit.held_out)
        return sum(_squared_error(block, given, self.site_fit.roots) for block, given in outputs) ** 0.5

    def _relaxed_moments(self, stages: Sequence[Stage], found: Fit) -> tuple[Moments, ...]:
        """The moments with the wanted outputs that take the ReLU into account."""
        relaxed = [_relaxed(block, outputs) for block, outputs in self._outputs(stages, found, self.site_fit.fitted)]
        return with_wanted_outputs(self.site_fit.seen, self.site_fit.fitted, relaxed)

    def _outputs(self, stages: Sequence[Stage], found: Fit, blocks: Sequence[Block]) -> Iterator[tuple[Block, Tensor]]:
        """The outputs of a fit at every position of the blocks."""
        if not blocks:
            return
        kernel = composed_kernel(found.kernels, stages, self.site_fit.site.spec.groups).to(blocks[0].outputs)
        weights = kernel.flatten(1).unflatten(0, (self.site_fit.site.spec.groups, -1))
        bias = found.bias.to(kernel).reshape(self.site_fit.site.spec.groups, 1, -1)
        for block in blocks:
            yield block, block.patches @ weights.transpose(1, 2) + bias


def _squared_error(block: Block, outputs: Tensor, roots: Roots) -> float:
    skip = 0.0 if block.skips is None else block.skips
    difference = (block.outputs + skip).relu() - (outputs + skip).relu()
    weighted = (rows if root is None else rows @ root.T.to(rows) for rows, root in zip(difference, roots, strict=True))
    return sum(float(summed_squares(rows).sum()) for rows in weighted)


def _relaxed(block: Block, outputs: Tensor) -> Tensor:
    """The wanted outputs; where the original sum is negative, the nearest to the given ones that the ReLU still turns to zero."""
    skip = 0.0 if block.skips is None else block.skips
    wanted = block.outputs + skip
    return torch.where(wanted > 0, wanted, (outputs + skip).clamp_max(0)) - skip
