"""Fits to few inputs: where one has learned its inputs by heart, what less trust in them gives, down to the weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting.found import Fit, left_unexplained, told
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.stages import Roots, fit, grounds_of, refit
from convrewrite.fitting.targets import LARGE, Ground, Target
from convrewrite.fitting.trust import FULL, Trust, doubtable, doubtful, lesser_trusts
from convrewrite.structures import Setting, Structure, initial_kernels
from convrewrite.workers import side_by_side


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a site: its folded kernel ``(O, C / g, kh, kw)``, the moments of its inputs ``seen`` from ``examples``
    and of the ``unseen``, held-out ones, for every group, and the weights of its outputs. ``room``: whether memory has any for
    another matrix of the size of a covariance; without it, data is believed in full or not at all."""

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
        """With what all targets are made from."""
        return cls(spec, kernel, seen, unseen, examples, roots, room, grounds_of(kernel, spec, seen))

    def targets(self, trusts: Sequence[Trust] = (), *, solved: bool = True) -> list[Target]:
        """The target of every group; ``trusts`` are those of the groups, none: full. See :meth:`Ground.target`."""
        each = zip(self.grounds, trusts or (FULL,) * len(self.grounds), strict=True)
        return [ground.target(trust.ridge, trust.shrinkage, solved=solved) for ground, trust in each]

    def believed(self, structure: Structure, setting: Setting, found: Fit) -> Fit:
        """``found``, or where it is doubtful the fit of the same option with less trust in the data, or with none, that has
        the least error on held-out inputs."""
        if not self._doubts(structure, setting, found):
            return found
        least = min(found, self.from_weights(structure, setting), key=_left)
        if not self.room:
            return least
        trusts = list(zip(*(lesser_trusts(moments, self.examples) for moments in self.seen), strict=True))
        if self.kernel[0].numel() >= LARGE:
            trials = [self._last_stage(structure, setting, found, each) for each in trusts]
            trusts = [min(trials, key=_left).trusts]
        fits = side_by_side([partial(self._fit, structure, setting, each) for each in trusts])
        return min([least, *fits], key=_left)

    def _fit(self, structure: Structure, setting: Setting, trusts: tuple[Trust, ...]) -> Fit:
        found = fit(structure, self.spec, setting, self.targets(trusts), self.seen, self.unseen, roots=self.roots)
        return replace(found, trusts=trusts)

    def _last_stage(self, structure: Structure, setting: Setting, found: Fit, trusts: tuple[Trust, ...]) -> Fit:
        """``found`` with its last stage alone fitted again: how much trust is best shows in it as well. For four structures at
        a layer of 128 to 64 channels with 324 to 2,592 positions, in nine of twelve cases the same trust was chosen as by fits
        with all of them, and the errors were within 0.001."""
        targets = self.targets(trusts, solved=False)
        stages = structure.stages(self.spec.per_group, setting)
        return replace(refit(stages, found, targets, self.seen, self.unseen, 0, self.roots), trusts=trusts)

    def _doubts(self, structure: Structure, setting: Setting, found: Fit) -> bool:
        """Without held-out inputs nothing can be doubted."""
        if not self.seen or self.unseen is self.seen:
            return False
        count, unknowns = self.seen[0].count, self.kernel[0].numel()
        if not doubtable(count, unknowns):
            return False
        return doubtful(count, unknowns, self.left_by(structure, setting, found), found.unexplained)

    def left_by(self, structure: Structure, setting: Setting, found: Fit) -> float:
        """The share of the output's variance on the inputs fitted on that a fit leaves unexplained."""
        stages = structure.stages(self.spec.per_group, setting)
        return left_unexplained(_by_group(found.kernels, self.spec.groups), stages, self.seen)

    def from_weights(self, structure: Structure, setting: Setting) -> Fit:
        """The decomposition of the kernel alone; only its bias knows the inputs."""
        kernels = initial_kernels(structure, self.kernel, self.spec, setting)
        stages = structure.stages(self.spec.per_group, setting)
        return told(_by_group(kernels, self.spec.groups), stages, self.seen, self.unseen)


def _by_group(kernels: Sequence[Tensor], groups: int) -> list[tuple[Tensor, ...]]:
    """The stage kernels of every group."""
    return list(zip(*(stage.chunk(groups) for stage in kernels), strict=True))


def _left(found: Fit) -> float:
    return found.unexplained
