"""Fits to few inputs: where a fit has overfitted its inputs, fits with less trust in them are tried, down to the weights
alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting.found import Fit, fit_of, left_unexplained, pooled
from convrewrite.fitting.goals import Goal, Roots
from convrewrite.fitting.last_stages import LastStages
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.stages import effort_within, fit, grounds_of, refit
from convrewrite.fitting.targets import LARGE, Ground
from convrewrite.fitting.trust import FULL, Trust, doubtable, doubtful, lesser_trusts
from convrewrite.structures import Setting, Structure, initial_kernels
from convrewrite.workers import side_by_side

HUGE = 3000
"""For patches of at least this many numbers, a doubtful fit is repeated only with the most promising of the lesser trusts, not
with every one. For patches of 1,024 to 2,048 numbers of a pitch network, in a fast run, trying all kept 91.1 % of the voiced
frames within 25 cents, trying the most promising one 89.3 %."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a site: its folded kernel ``(O, C / g, kh, kw)``, for every group the moments of its inputs ``seen`` from
    ``examples`` and of the ``unseen``, held-out ones, and the ``roots`` of the weights of its outputs. ``room``: whether memory
    has room for another matrix of the size of a covariance; without it, data is trusted in full or not at all."""

    spec: ConvSpec
    kernel: Tensor
    seen: Sequence[Moments]
    unseen: Sequence[Moments]
    examples: int
    roots: Roots
    room: bool
    grounds: Sequence[Ground]

    @classmethod
    def of(
        cls, spec: ConvSpec, kernel: Tensor, seen: Sequence[Moments], unseen: Sequence[Moments],
        examples: int, roots: Roots, room: bool = True,
    ) -> "Evidence":  # fmt: skip
        """The evidence together with what all targets are made from."""
        return cls(spec, kernel, seen, unseen, examples, roots, room, grounds_of(kernel, spec, seen))

    def goals(self, trusts: Sequence[Trust] = (), *, solved: bool = True) -> list[Goal]:
        """What fits of every group aim at; ``trusts`` are those of the groups, full if empty. See :meth:`Ground.target`.

        For huge patches with few positions W* is both uncertain and expensive, and W is as good to start from: at three layers of
        512 to 512 channels with 10,045 positions, fits from W left 0.6325, 0.2686 and 0.7512 of the variance, and fits from W*
        0.6324, 0.2689 and 0.7511.
        """
        solved = solved and not (self._huge and doubtable(*self._size))
        each = zip(self.grounds, trusts or (FULL,) * len(self.grounds), self.roots, strict=True)
        return [Goal.of(ground.target(t.ridge, t.shrinkage, solved=solved), root) for ground, t, root in each]

    def believed(self, structure: Structure, setting: Setting, found: Fit) -> Fit:
        """``found``; or where it is doubtful, the one with the least error on held-out inputs of ``found`` and of fits of the
        same option with less trust in the data or with none."""
        if not self._doubts(structure, setting, found):
            return found
        least = min(found, self.from_weights(structure, setting), key=_left)
        if not self.room:
            return least
        trusts = list(zip(*(lesser_trusts(moments, self.examples) for moments in self.seen), strict=True))
        tasks = [partial(self._fit, structure, setting, each) for each in trusts]
        # Side by side each would need a matrix of the size of a covariance, and there is room for one.
        fits = side_by_side(tasks) if self.kernel[0].numel() < LARGE else [task() for task in tasks]
        return min([least, *fits], key=_left)

    def fit_large(self, structure: Structure, setting: Setting, full: Sequence[Goal], near: Fit) -> Fit:
        """A fit of a large site. A fit of a huge one takes long, so there only last stages are solved for every trust, behind the
        other stages of ``near``, a rough fit, and the fit with the best trust goes on from ``near``. ``full`` are the goals of
        full trust.

        For four structures at a layer of 128 to 64 channels with 324 to 2,592 positions, in nine of twelve cases this chose the
        same trust as fits with all of them, and the errors were within 0.001.
        """
        whole = partial(fit, structure, self.spec, setting, full, self.seen, self.unseen)
        if not self._huge:
            return self.believed(structure, setting, whole())
        trusts = self._likely(structure, setting, near)
        if trusts is None:
            return whole()
        return min(self._gone_on(structure, setting, trusts, near), self.from_weights(structure, setting), key=_left)

    def _likely(self, structure: Structure, setting: Setting, near: Fit) -> tuple[Trust, ...] | None:
        """For every group the trust that does best on held-out inputs; None where there is nothing to doubt."""
        if not self._doubtable:
            return None
        stages = structure.stages(self.spec.per_group, setting)
        kernels = _by_group([kernel.double() for kernel in near.kernels], self.spec.groups)
        each = zip(kernels, self.grounds, self.unseen, strict=True)
        groups = [LastStages.of(own[:-1], stages, ground, unseen) for own, ground, unseen in each]
        full = [(group, FULL) for group in groups]
        seen = pooled([group.shares(trust)[0] for group, trust in full], self.seen)
        if not doubtful(*self._size, seen, self._left_unseen(full)):
            return None
        lesser = (
            zip(*(lesser_trusts(moments, self.examples) for moments in self.seen), strict=True) if self.room else ()
        )
        tried = [full, *([*zip(groups, trusts, strict=True)] for trusts in lesser)]
        return tuple(trust for _, trust in min(tried, key=self._left_unseen))

    def _left_unseen(self, groups: Sequence[tuple[LastStages, Trust]]) -> float:
        return pooled([group.shares(trust)[1] for group, trust in groups], self.unseen)

    def _fit(self, structure: Structure, setting: Setting, trusts: tuple[Trust, ...]) -> Fit:
        found = fit(structure, self.spec, setting, self.goals(trusts), self.seen, self.unseen)
        return replace(found, trusts=trusts)

    def _gone_on(self, structure: Structure, setting: Setting, trusts: tuple[Trust, ...], near: Fit) -> Fit:
        """A fit with these trusts that starts from another one."""
        stages, goals = structure.stages(self.spec.per_group, setting), self.goals(trusts)
        positions, unknowns = self._size
        effort = effort_within(unknowns, goals[0].outputs, positions)
        start = replace(near, kernels=tuple(kernel.double() for kernel in near.kernels))
        return replace(refit(stages, start, goals, self.seen, self.unseen, effort), trusts=trusts)

    @property
    def _huge(self) -> bool:
        return self.kernel[0].numel() >= HUGE

    @property
    def _size(self) -> tuple[int, int]:
        """Positions that were gathered, and unknowns."""
        return self.seen[0].count, self.kernel[0].numel()

    @property
    def _doubtable(self) -> bool:
        """Without held-out inputs nothing can be doubted."""
        return bool(self.seen) and self.unseen is not self.seen and doubtable(*self._size)

    def _doubts(self, structure: Structure, setting: Setting, found: Fit) -> bool:
        return self._doubtable and doubtful(*self._size, self.left_by(structure, setting, found), found.unexplained)

    def left_by(self, structure: Structure, setting: Setting, found: Fit) -> float:
        """The share of the output's variance that a fit leaves unexplained on the inputs that it was fitted on."""
        stages = structure.stages(self.spec.per_group, setting)
        return left_unexplained(_by_group(found.kernels, self.spec.groups), stages, self.seen)

    def from_weights(self, structure: Structure, setting: Setting) -> Fit:
        """The decomposition of the kernel alone; only its bias depends on the inputs."""
        kernels = initial_kernels(structure, self.kernel, self.spec, setting)
        stages = structure.stages(self.spec.per_group, setting)
        return fit_of(_by_group(kernels, self.spec.groups), stages, self.seen, self.unseen)


def _by_group(kernels: Sequence[Tensor], groups: int) -> list[tuple[Tensor, ...]]:
    """The stage kernels of every group."""
    return list(zip(*(stage.chunk(groups) for stage in kernels), strict=True))


def _left(found: Fit) -> float:
    return found.unexplained
