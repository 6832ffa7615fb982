"""Fits to few inputs: where one has learned its inputs by heart, what less trust in them gives, down to the weights alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting import Fit, Moments, Roots, doubtful, fit, left_unexplained, lesser_trusts, targets_of, told
from convrewrite.rewriting.kernels import composed_kernel
from convrewrite.structures import Setting, Structure, initial_kernels


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a site: its folded kernel ``(O, C / g, kh, kw)``, the moments of its inputs ``seen`` from ``examples``
    and of the ``unseen``, held-out ones, for every group, and the weights of its outputs."""

    spec: ConvSpec
    kernel: Tensor
    seen: Sequence[Moments]
    unseen: Sequence[Moments]
    examples: int
    roots: Roots

    def believed(self, structure: Structure, setting: Setting, found: Fit) -> Fit:
        """``found``, or where it is doubtful the fit of the same option with less trust in the data, or with none, that has
        the least error on held-out inputs."""
        if not self._doubts(structure, setting, found):
            return found
        least = min(found, self.from_weights(structure, setting), key=lambda each: each.unexplained)
        for trusts in zip(*(lesser_trusts(moments, self.examples) for moments in self.seen), strict=True):
            targets = targets_of(self.kernel, self.spec, self.seen, trusts)
            other = fit(structure, self.spec, setting, targets, self.seen, self.unseen, roots=self.roots)
            if other.unexplained < least.unexplained:
                least = replace(other, trusts=trusts)
        return least

    def _doubts(self, structure: Structure, setting: Setting, found: Fit) -> bool:
        """Without held-out inputs nothing can be doubted."""
        if not self.seen or self.unseen is self.seen:
            return False
        kernel = composed_kernel(found.kernels, structure.stages(self.spec.per_group, setting), self.spec.groups)
        count, unknowns = self.seen[0].count, self.kernel[0].numel()
        return doubtful(count, unknowns, left_unexplained(kernel, self.seen), found.unexplained)

    def from_weights(self, structure: Structure, setting: Setting) -> Fit:
        """The decomposition of the kernel alone; only its bias knows the inputs."""
        kernels = initial_kernels(structure, self.kernel, self.spec, setting)
        groups = zip(*(stage.chunk(self.spec.groups) for stage in kernels), strict=True)
        stages = structure.stages(self.spec.per_group, setting)
        return told([tuple(group) for group in groups], stages, self.seen, self.unseen)
