"""Fits to few inputs: where one has learned its inputs by heart, what less trust in them gives, down to the weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting.found import Fit, left_unexplained, told
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.stages import LARGE, Roots, fit, refit, targets_of
from convrewrite.fitting.trust import Trust, doubtable, doubtful, lesser_trusts
from convrewrite.structures import Setting, Structure, composed_kernel, initial_kernels
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
    room: bool = True

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
        targets = targets_of(self.kernel, self.spec, self.seen, trusts)
        found = fit(structure, self.spec, setting, targets, self.seen, self.unseen, roots=self.roots)
        return replace(found, trusts=trusts)

    def _last_stage(self, structure: Structure, setting: Setting, found: Fit, trusts: tuple[Trust, ...]) -> Fit:
        """``found`` with its last stage alone fitted again, in float32: how much trust is best shows in it as well. For four
        structures at a layer of 128 to 64 channels with 324 to 2,592 positions, in nine of twelve cases the same trust was
        chosen as by fits with all of them, and the errors were within 0.001."""
        targets = targets_of(self.kernel, self.spec, self.seen, trusts, torch.float32)
        stages = structure.stages(self.spec.per_group, setting)
        single = replace(found, kernels=tuple(kernel.float() for kernel in found.kernels))
        roots = [None if root is None else root.float() for root in self.roots]
        return replace(refit(stages, single, targets, self.seen, self.unseen, 0, roots), trusts=trusts)

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
        kernel = composed_kernel(found.kernels, structure.stages(self.spec.per_group, setting), self.spec.groups)
        return left_unexplained(kernel, self.seen)

    def from_weights(self, structure: Structure, setting: Setting) -> Fit:
        """The decomposition of the kernel alone; only its bias knows the inputs."""
        kernels = initial_kernels(structure, self.kernel, self.spec, setting)
        groups = zip(*(stage.chunk(self.spec.groups) for stage in kernels), strict=True)
        stages = structure.stages(self.spec.per_group, setting)
        return told([tuple(group) for group in groups], stages, self.seen, self.unseen)


def _left(found: Fit) -> float:
    return found.unexplained
