"""What a site is fitted to: the ridged least-squares target and the covariance that measures distances from it.

Also the whitening of a first stage's inputs, and the Cholesky factor that both need.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convrewrite.errors import FitError
from convrewrite.escaping import first_line
from convrewrite.fitting.moments import Moments
from convrewrite.structures import Stage

RIDGE = 1e-3
"""The pull of the target towards the original kernel, as a part of the mean variance of a patch."""

JITTER = 1e-9
"""This part of the mean diagonal is added to the diagonal, which keeps Cholesky factors of singular covariances finite."""

FLOOR = 1e-30
"""This is added to the variance of every patch element, so that inputs that are always zero leave factors that float32 can
hold."""

UNCHANGED = 1e-5
"""If B differs from W S by at most this part of it, the difference is taken for the rounding of float32."""

MANY_POSITIONS = 10
"""With at least this many positions per unknown, a fit is never doubted; for the largest patches no more are gathered."""

LARGE = 1000
"""For patches of at least this many numbers, only the best start is refined, and W* is solved for in float32 where positions are
many."""

ENOUGH_POSITIONS = 5
"""With fewer positions per unknown, some directions of a covariance rest on too little data to be trusted."""


Shape = tuple[int, int, int, int]
"""The shape of a kernel, ``(O, C, kh, kw)``."""


@dataclass(frozen=True, slots=True)
class Second:
    """Second moments for a kernel of this ``shape``: the ``covariance (d, d)`` of patches, and ``response (O, d)``, the
    covariance of the wanted output and patches."""

    covariance: Tensor
    response: Tensor
    shape: Shape


@dataclass(frozen=True, slots=True)
class FitTarget:
    """What one group is fitted to: kernel ``(O, d)``, covariance ``(d, d)`` with its ridge, and the kernel's shape.

    ``response (O, d)`` is the kernel times the covariance, ``pull (O, d)`` the part of it that the ridge and the shrinkage add to
    the covariance of wanted outputs and patches; None where the outputs are not the real ones. ``scale`` is E of a kernel of
    zeros. In a target that was not solved for, ``kernel`` is the original's and ``scale`` is only about right: E is known up to a
    constant.
    """

    kernel: Tensor
    covariance: Tensor
    shape: Shape
    response: Tensor
    pull: Tensor | None
    scale: float

    @property
    def second(self) -> Second:
        """The second moments that define the quadratic E."""
        return Second(self.covariance, self.response, self.shape)

    def towards(self, moments: Moments) -> "FitTarget":
        """The same patches with other wanted outputs. ``kernel`` and ``scale`` stay: E is then known up to a constant."""
        assert self.pull is not None, "other outputs are wanted of a target in the real ones"
        return replace(self, response=moments.cov_yp + self.pull)

    def weighted(self, root: Tensor) -> "FitTarget":
        """The same problem for outputs multiplied by ``root (O, O)``, ``R``: there E weighs output errors by ``R^T R``."""
        kernel, response = root @ self.kernel, root @ self.response
        scale = float((response * kernel).sum().abs())
        return replace(self, kernel=kernel, response=response, pull=None, scale=scale)

    def to(self, dtype: torch.dtype, covariance: Tensor | None = None) -> "FitTarget":
        """The same in another precision; ``covariance``: the one in that precision, where there is one already."""
        kernel, response = self.kernel.to(dtype), self.response.to(dtype)
        pull = None if self.pull is None else self.pull.to(dtype)
        shared = self.covariance.to(dtype) if covariance is None else covariance
        return FitTarget(kernel, shared, self.shape, response, pull, self.scale)


@dataclass(frozen=True, slots=True)
class Ground:
    """What the targets of one group are made from, whatever the trust in its data: its ``kernel (O, C, kh, kw)``, the moments of
    its inputs, and ``known (O, d)``, the kernel times their covariance."""

    kernel: Tensor
    moments: Moments
    known: Tensor

    @classmethod
    def of(cls, kernel: Tensor, moments: Moments) -> "Ground":
        """Made from a kernel in float64."""
        return cls(kernel, moments, kernel.flatten(1) @ moments.cov_p)

    @property
    def shape(self) -> Shape:
        """The shape of the kernel."""
        return shape_of(self.kernel)

    def target(self, ridge: float = RIDGE, shrinkage: float | None = None, *, solved: bool = True) -> FitTarget:
        """``W* = W + (B - W S)(S + lam I)^-1``, MATH: the data's answer, ridged towards the original kernel.

        ``shrinkage`` draws S towards its diagonal, 0 to 1; None: it depends on the positions per unknown. Only starts need W*
        itself: where there is one already, ``solved=False`` saves the factorisation. On the original's own inputs B is W S, and
        W* is W.
        """
        moments, flat = self.moments, self.kernel.flatten(1)
        shrinkage, lam = self.drawn(ridge, shrinkage)
        covariance = _shrunk(moments, shrinkage)
        diagonal = covariance.diagonal()
        # W (S' + lam I) - W S, without a second product by a matrix of d x d.
        pull = lam * flat - shrinkage * (self.known - flat * diagonal)
        diagonal.add_(lam)
        # Where positions are few the matrix is so nearly singular that float32 would make the fit worse.
        precision = torch.float64 if len(covariance) < LARGE or self._few else torch.float32
        more = moments.cov_yp - self.known
        solved = solved and float(more.norm()) > UNCHANGED * float(self.known.norm())
        wanted = flat + _solution(covariance, more, precision) if solved else flat
        response = moments.cov_yp + pull
        return FitTarget(wanted, covariance, self.shape, response, pull, float((response * wanted).sum().abs()))

    @property
    def _few(self) -> bool:
        return self.moments.count < MANY_POSITIONS * len(self.moments.cov_p)

    def drawn(self, ridge: float, shrinkage: float | None) -> tuple[float, float]:
        """How much S is drawn towards its diagonal, and the lambda that is added to the diagonal."""
        lam = ridge * float(self.moments.cov_p.diagonal().mean()) + FLOOR
        return (_shrinkage(self.moments) if shrinkage is None else shrinkage), lam


def shape_of(kernel: Tensor) -> Shape:
    """The shape of a kernel ``(O, C, kh, kw)``."""
    outputs, channels, height, width = kernel.shape
    return outputs, channels, height, width


def _solution(covariance: Tensor, rows: Tensor, precision: torch.dtype) -> Tensor:
    """``rows (O, d)`` times the inverse of a covariance."""
    factor = cholesky(covariance.to(precision))
    return torch.cholesky_solve(rows.T.to(precision), factor).T.to(rows.dtype)


def _shrinkage(moments: Moments) -> float:
    """How much a covariance is drawn towards its diagonal by default: where there are few positions per unknown."""
    return 0.05 * max(0.0, 1 - moments.count / (ENOUGH_POSITIONS * len(moments.cov_p)))


def _shrunk(moments: Moments, shrinkage: float) -> Tensor:
    """The covariance, drawn towards its diagonal."""
    shrunk = moments.cov_p * (1 - shrinkage)
    shrunk.diagonal().copy_(moments.cov_p.diagonal())
    return shrunk


def cholesky(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a covariance, or of a batch of them; singular ones get a growing share of their diagonal."""
    for jitter in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        extra = jitter * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(extra) if jitter else matrix)
        if not bool(failed.any()):
            return factor
    raise ArithmeticError("a covariance is not positive semidefinite beyond rounding")


def first_stage_root(first: Stage, target: FitTarget) -> Tensor:
    """Cholesky factors ``(groups, n, n)`` of the covariance of the first stage's own patches, averaged over free axes."""
    _, channels, kh, kw = target.shape
    g = first.groups
    blocks = target.covariance.reshape(g, channels // g, kh, kw, g, channels // g, kh, kw)
    blocks = blocks.diagonal(dim1=0, dim2=4).movedim(-1, 0)  # (g, c, kh, kw, c, kh, kw)
    if "w" not in first.axes:
        blocks = blocks.diagonal(dim1=3, dim2=6).mean(-1)[:, :, :, None, :, :, None]
    if "h" not in first.axes:
        blocks = blocks.diagonal(dim1=2, dim2=5).mean(-1)[:, :, None, :, :, None, :]
    size = blocks.shape[1] * blocks.shape[2] * blocks.shape[3]
    square = blocks.reshape(g, size, size).clone()
    diagonal = square.diagonal(dim1=1, dim2=2)
    diagonal.add_(JITTER * diagonal.mean(1, keepdim=True) + FLOOR)
    return cholesky(square)


def colour(kernel: Tensor, first: Stage, root: Tensor) -> Tensor:
    """The kernel as it acts on whitened first-stage inputs: its columns times the Cholesky factor."""
    outputs, channels, kh, kw = kernel.shape
    a, b = (kh if "h" in first.axes else 1), (kw if "w" in first.axes else 1)
    k = kernel.reshape(outputs, first.groups, channels // first.groups, a, kh // a, b, kw // b)
    k = k.permute(1, 0, 4, 6, 2, 3, 5)  # (g, O, free h, free w, c, a, b)
    shape = k.shape
    product = k.flatten(4).flatten(1, 3) @ root
    recoloured: Tensor = product.reshape(shape).permute(1, 0, 4, 5, 2, 6, 3).reshape(kernel.shape)
    return recoloured


def uncolour(kernel: Tensor, root: Tensor) -> Tensor:
    """A first-stage kernel for whitened inputs -> the one for the real inputs."""
    rows = kernel.reshape(root.shape[0], -1, root.shape[1])
    return torch.linalg.solve_triangular(root, rows, upper=False, left=False).reshape(kernel.shape)


@contextmanager
def solving(site: str) -> Iterator[None]:
    """Turn failures of the linear algebra into a FitError that names the site."""
    try:
        yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise FitError(
            site,
            "expected inputs and weights of ordinary size, found numbers that it cannot be fitted to "
            f"({first_line(error)}); normalise the inputs as for training, leave out extreme ones, or fit to the weights alone: "
            "--calib weights",
        ) from error
