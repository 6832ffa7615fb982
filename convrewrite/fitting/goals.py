"""What a fit of one group aims at: its target, in the outputs that the fit works on.

The fit works on outputs that are changed in two ways, and the last stage that it finds is changed back:

- *weighed*: they are multiplied by the root ``R (O, O)`` of their weights, so that E weighs their errors by ``R^T R``.
- *narrow*: where there are more outputs than the ``d`` numbers of a patch, they are combinations of ``d``. With the response
  ``Q T``, the columns of Q orthonormal, E of stages towards T equals E towards Q T of the same stages with the last one
  multiplied by Q; and no other last stage has a lower E, as any part outside the space of Q only adds to it.

Neither applies to a last stage that does not mix its outputs, as it fits each by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convrewrite.fitting.moments import Moments
from convrewrite.fitting.targets import FitTarget
from convrewrite.structures import Stage

Roots = Sequence[Tensor | None]
"""Roots of the weights of outputs, for every group: R ``(O, O)``, upper triangular, with ``R^T R`` the weights of its outputs;
None if all count alike."""

Kernels = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Aim:
    """A target whose outputs are the real ones multiplied by ``root (O, O)`` and then by the transpose of ``basis (O, d)``, each
    unless it is None. ``back (O, d)`` is the basis in the real outputs, ``wide (O, d)`` the kernel before the basis was
    applied."""

    target: FitTarget
    root: Tensor | None = None
    basis: Tensor | None = None
    back: Tensor | None = None
    wide: Tensor | None = None

    @property
    def wanted(self) -> Tensor:
        """The weighed kernel ``(O, C, kh, kw)`` with all outputs, which a structure decomposes to start from."""
        kernel = self.target.kernel if self.wide is None else self.wide
        return kernel.reshape(-1, *self.target.shape[1:])

    def begun(self, kernels: Kernels) -> Kernels:
        """Stage kernels of :attr:`wanted` -> those towards this target."""
        if self.basis is None:
            return kernels
        last = self.basis.T @ kernels[-1].flatten(1)
        return (*kernels[:-1], last.unflatten(1, kernels[-1].shape[1:]))

    def real(self, kernels: Kernels) -> Kernels:
        """Stage kernels towards this target -> those for the real outputs."""
        last = kernels[-1].flatten(1)
        if self.back is not None:
            last = self.back @ last
        elif self.root is not None:
            last = torch.linalg.solve_triangular(self.root, last, upper=True)
        return (*kernels[:-1], last.unflatten(1, kernels[-1].shape[1:]))

    def own(self, kernels: Kernels) -> Kernels:
        """The inverse of :meth:`real`; a last stage that is not narrow gives the nearest one that is."""
        if self.root is None:
            return self.begun(kernels)
        last = self.root @ kernels[-1].flatten(1)
        return self.begun((*kernels[:-1], last.unflatten(1, kernels[-1].shape[1:])))

    def sharing(self, covariance: Tensor) -> "Aim":
        """The same with this covariance and in its precision."""
        dtype = covariance.dtype
        parts = (self.root, self.basis, self.back, self.wide)
        changes = (None if part is None else part.to(dtype) for part in parts)
        return Aim(self.target.to(dtype, covariance), *changes)

    def narrowed(self) -> "Aim":
        """The same with as many outputs as a patch has numbers, if there are more."""
        target = self.target
        outputs, d = target.kernel.shape
        if outputs <= d:
            return self
        basis, response = torch.linalg.qr(target.response)
        kernel, shape = basis.T @ target.kernel, (d, *target.shape[1:])
        narrow = replace(target, kernel=kernel, response=response, pull=None, shape=shape)
        back = basis if self.root is None else torch.linalg.solve_triangular(self.root, basis, upper=True)
        return Aim(narrow, self.root, basis, back, target.kernel)


@dataclass(frozen=True, slots=True)
class Goal:
    """The target of one group in all forms that stages may need: as it is, weighed, and weighed and narrow."""

    plain: Aim
    weighed: Aim
    narrow: Aim

    @classmethod
    def of(cls, target: FitTarget, root: Tensor | None = None) -> "Goal":
        """``root``: the root of the weights of its outputs; None if all count alike."""
        plain = Aim(target)
        weighed = plain if root is None else Aim(target.weighted(root), root)
        return cls(plain, weighed, weighed.narrowed())

    @property
    def target(self) -> FitTarget:
        """The target in the real outputs."""
        return self.plain.target

    @property
    def outputs(self) -> int:
        """How many real outputs there are."""
        return len(self.target.kernel)

    def aim(self, stages: Sequence[Stage]) -> Aim:
        """The form of the target that fits of these stages aim at."""
        last = stages[-1]
        if last.groups > 1:
            return self.plain
        return self.narrow if last.in_channels <= len(self.narrow.target.kernel) else self.weighed

    def to(self, dtype: torch.dtype) -> "Goal":
        """The same in another precision; the covariance is held once."""
        covariance, each = self.target.covariance.to(dtype), (self.plain, self.weighed, self.narrow)
        made = {id(aim): aim.sharing(covariance) for aim in each}
        return Goal(*(made[id(aim)] for aim in each))

    def towards(self, moments: Moments) -> "Goal":
        """The same patches with other wanted outputs; see :meth:`FitTarget.towards`."""
        return Goal.of(self.target.towards(moments), self.weighed.root)
