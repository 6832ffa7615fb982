"""Fit the stages of any structure to a convolution's real inputs, in closed form and without labels.

The objective is ``E = tr[(W* - W') S (W* - W')^T]`` with S the covariance of the input patches and ``W*`` the kernel that
best reproduces the original output *from the inputs this site really gets*, ridged towards W. It is quadratic in each
stage. Nothing here knows a particular structure: stages are applied to S through their shapes.

- ``reduced``: the last stage is a dense linear map, so it is eliminated in closed form and E is minimised over the others
  (variable projection, Golub and Pereyra 1973). Only the covariance of the last stage's input is needed.
- ``full``: otherwise all stages are refined jointly, then the last is solved for, each of its groups by itself.

Both use L-BFGS in float64 on a first stage whose inputs were whitened, and start from several initial values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.moments import Moments
from convrewrite.structure import Setting, Stage, Structure, compose, join_groups, split_groups, through

RIDGE = 1e-3
"""Of the mean variance of a patch: the pull of the target towards the original kernel."""

JITTER = 1e-9
"""Of the mean diagonal: keeps Cholesky factors of singular covariances finite."""

ITERATIONS = 40
"""Of L-BFGS, for patches of up to ``EASY`` numbers; beyond, fewer, as an iteration's cost grows with their square."""

MIN_ITERATIONS = 4

EASY, LARGE = 600, 1000
"""Numbers in a patch: up to the first every iteration is cheap, from the second on only the best start is refined."""

SOLVE_CHUNK = 1 << 25
"""Numbers in one block of intermediate products: 256 MB in float64."""

FLOOR = 1e-30
"""Added to the variance of every patch element: inputs that are always zero leave factors that float32 can hold."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Stage kernels and bias of one site (float64, groups joined), and their relative output errors."""

    kernels: tuple[Tensor, ...]
    bias: Tensor
    error: float
    held_out_error: float


@dataclass(frozen=True, slots=True)
class Target:
    """What one group is fitted to: kernel ``(O, d)``, covariance ``(d, d)`` with its ridge, and the kernel's shape.

    ``response (O, d)`` is the kernel times the covariance, ``scale`` is E of a kernel of zeros.
    """

    kernel: Tensor
    covariance: Tensor
    shape: tuple[int, int, int, int]
    response: Tensor
    scale: float

    @classmethod
    def from_moments(cls, kernel: Tensor, moments: Moments, ridge: float = RIDGE) -> "Target":
        """``W* = W + (B - W S)(S + lam I)^-1``, MATH: the data's answer, ridged towards the original kernel."""
        flat = kernel.double().flatten(1)
        covariance = _shrunk(moments)
        scale = covariance.diagonal().mean()
        covariance.diagonal().add_(ridge * scale + FLOOR)
        residual = moments.cov_yp - flat @ moments.cov_p
        solved = torch.cholesky_solve(residual.T, cholesky(covariance)).T
        shape = (kernel.shape[0], kernel.shape[1], kernel.shape[2], kernel.shape[3])
        wanted = flat + solved
        response = wanted @ covariance
        return cls(wanted, covariance, shape, response, float((response * wanted).sum()))

    def error(self, kernel: Tensor) -> float:
        """E of a composed kernel."""
        difference = self.kernel - kernel.flatten(1)
        return float(((difference @ self.covariance) * difference).sum())


def _shrunk(moments: Moments) -> Tensor:
    """The covariance, drawn towards its diagonal where there are fewer than five positions per unknown."""
    d = moments.cov_p.shape[0]
    lack = max(0.0, 1 - moments.count / (5 * d))
    diagonal = moments.cov_p.diagonal().clone()
    shrunk = moments.cov_p * (1 - 0.05 * lack)
    shrunk.diagonal().copy_(diagonal)
    return shrunk


def fit(
    structure: Structure,
    spec: ConvSpec,
    setting: Setting,
    kernel: Tensor,
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
    iterations: int | None = None,
    targets: Sequence[Target] | None = None,
) -> Fit:
    """Fit one option at one site; ``kernel`` is canonical, ``moments`` and ``held_out`` have one entry per group.

    ``iterations`` of L-BFGS; None: as many as the size of the problem allows.
    """
    parts = split_groups(kernel.double(), spec.groups)
    targets = targets or [Target.from_moments(part, m) for part, m in zip(parts, moments, strict=True)]
    stages = structure.stages(spec.per_group, setting)
    fitted = []
    for target, unseen in zip(targets, held_out, strict=True):
        starts = _starts(structure, spec.per_group, setting, target, stages)
        effort = effort_for(len(target.covariance)) if iterations is None else iterations
        if len(target.covariance) >= LARGE and effort > 0:
            solved = [_solve_last(start, stages, target) for start in starts]
            starts = [min(solved, key=lambda kernels: target.error(compose(kernels, stages)))]
        refined = [_refine(start, stages, target, effort) for start in starts]
        # The start is chosen on the held-out inputs; of equals the first stays.
        fitted.append(min(refined, key=lambda kernels: unseen.relative_error(compose(kernels, stages))))
        assert all(torch.isfinite(k).all() for k in fitted[-1]), "a fit must be finite"
    return _result(fitted, stages, moments, held_out)


def effort_for(d: int, most: int = ITERATIONS) -> int:
    """Iterations of L-BFGS for patches of ``d`` numbers."""
    return max(MIN_ITERATIONS, min(most, round(most * (EASY / d) ** 2)))


def refit(
    structure: Structure,
    spec: ConvSpec,
    setting: Setting,
    kernel: Tensor,
    found: Fit,
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
    iterations: int,
) -> Fit:
    """Go on from a fit towards other wanted outputs; ``moments`` has them, ``held_out`` the ones the error is told of."""
    stages = structure.stages(spec.per_group, setting)
    parts = split_groups(kernel.double(), spec.groups)
    starts = zip(*(stage.chunk(spec.groups) for stage in found.kernels), strict=True)
    refined = [
        _refine(start, stages, Target.from_moments(part, m), iterations)
        for start, part, m in zip(starts, parts, moments, strict=True)
    ]
    return _result(refined, stages, moments, held_out)


def _result(
    fitted: Sequence[tuple[Tensor, ...]],
    stages: Sequence[Stage],
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
) -> Fit:
    """The groups' kernels joined, with the bias that goes with them, and their errors."""
    composed = [compose(kernels, stages) for kernels in fitted]
    return Fit(
        kernels=join_groups(fitted),
        bias=torch.cat([m.bias(k) for m, k in zip(moments, composed, strict=True)]),
        error=_pooled(moments, composed),
        held_out_error=_pooled(held_out, composed),
    )


def _pooled(moments: Sequence[Moments], kernels: Sequence[Tensor]) -> float:
    """The relative error over all groups: each counts by its output's variance."""
    weights = [float(m.var_y.sum()) for m in moments]
    errors = [m.relative_error(k) for m, k in zip(moments, kernels, strict=True)]
    total = sum(weights)
    return sum(w * e for w, e in zip(weights, errors, strict=True)) / total if total > 0 else 0.0


def _starts(
    structure: Structure, spec: ConvSpec, setting: Setting, target: Target, stages: Sequence[Stage]
) -> list[tuple[Tensor, ...]]:
    """Initial stage kernels: the decomposition of the target, and that of the target with whitened first-stage inputs.

    For the structure ``channel`` the whitened one is the closed-form optimum (reduced-rank regression).
    """
    wanted = target.kernel.reshape(target.shape)
    root = first_stage_root(stages[0], target)
    whitened = structure.weights(colour(wanted, stages[0], root), spec, setting)
    plain = structure.weights(wanted, spec, setting)
    return [plain, (_uncolour(whitened[0], root), *whitened[1:])]


def first_stage_root(first: Stage, target: Target) -> Tensor:
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


def _uncolour(kernel: Tensor, root: Tensor) -> Tensor:
    """A first-stage kernel for whitened inputs -> the one for the real inputs."""
    rows = kernel.reshape(root.shape[0], -1, root.shape[1])
    return torch.linalg.solve_triangular(root, rows, upper=False, left=False).reshape(kernel.shape)


def _refine(start: tuple[Tensor, ...], stages: Sequence[Stage], target: Target, iterations: int) -> tuple[Tensor, ...]:
    """Lower E from ``start``: the last stage in closed form, the others by L-BFGS. Never returns a higher E."""
    begun = target.error(compose(start, stages))
    root = first_stage_root(stages[0], target)
    reduced = stages[-1].groups == 1
    kernels = _solve_last(start, stages, target)
    before = _descended(begun, target.error(compose(kernels, stages)), target)
    free = len(stages) - 1 if reduced else len(stages)
    variables = [
        (kernels[0].reshape(root.shape[0], -1, root.shape[1]) @ root).reshape(kernels[0].shape),
        *kernels[1:free],
    ]

    def assemble(values: Sequence[Tensor]) -> list[Tensor]:
        return [_uncolour(values[0], root), *values[1:]]

    if iterations == 0:
        return kernels
    loss = _reduced_loss(stages, target) if reduced else _full_loss(stages, target)
    refined = assemble(_minimise(loss, assemble, variables, iterations))
    candidate = _solve_last((*refined, kernels[-1]) if reduced else tuple(refined), stages, target)
    after = target.error(compose(candidate, stages))
    if not after <= before:  # L-BFGS lost by rounding what it had: the start stands
        return kernels
    _descended(before, after, target)
    return candidate


def _descended(before: float, after: float, target: Target) -> float:
    """``after``, once it is certain that E did not rise beyond rounding."""
    assert after <= before + 1e-9 * target.scale, f"E rose from {before} to {after}"
    return after


def cholesky(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a covariance, or of a batch of them; singular ones get a growing share of their diagonal."""
    for jitter in (0.0, 1e-8, 1e-6, 1e-4, 1e-2):
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        extra = jitter * diagonal.mean(-1, keepdim=True).expand_as(diagonal)
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(extra) if jitter else matrix)
        if not bool(failed.any()):
            return factor
    raise ArithmeticError("a covariance is not positive semidefinite beyond rounding")


Loss = Callable[[list[Tensor]], Tensor]


def _reduced_loss(stages: Sequence[Stage], target: Target) -> Loss:
    """E after the last stage's optimum, up to a constant: ``-tr[M H^-1 M^T]``, H the covariance of its input."""
    d = target.covariance.shape[0]
    covariance = target.covariance.reshape(d, *target.shape[1:])
    wanted = target.response.reshape(target.shape)
    scale = target.scale + torch.finfo(torch.float64).tiny

    def loss(kernels: list[Tensor]) -> Tensor:
        inner, cross = _last_input(kernels, stages, covariance, wanted)
        with torch.no_grad():
            last = torch.cholesky_solve(cross.T, cholesky(inner)).T
            square = last.T @ last
        # With the optimal last stage P held fixed, <P^T P, H> - 2 <P, M> has the value and the gradient of E (the
        # envelope theorem), and nothing has to be differentiated through the factorisation.
        return 1 + ((square * inner).sum() - 2 * (last * cross).sum()) / scale

    return loss


def _last_input(
    kernels: Sequence[Tensor], stages: Sequence[Stage], covariance: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariance ``H (q, q)`` of the last stage's input patches and ``M (O, q)`` with the wanted output."""
    q_by_d = _through_all(kernels, stages, covariance).T.unflatten(1, covariance.shape[1:])
    inner = _through_all(kernels, stages, q_by_d)
    return _jittered(inner), _through_all(kernels, stages, wanted)


def _jittered(covariance: Tensor) -> Tensor:
    """Covariances ``(..., q, q)`` made symmetric, with a trace of their mean diagonal added."""
    symmetric = (covariance + covariance.mT) / 2
    jitter = JITTER * symmetric.diagonal(dim1=-2, dim2=-1).mean(-1) + FLOOR**2
    return symmetric + jitter[..., None, None] * torch.eye(symmetric.shape[-1], dtype=symmetric.dtype)


def _through_all(kernels: Sequence[Tensor], stages: Sequence[Stage], patches: Tensor) -> Tensor:
    """Rows of patches through all stages but the last, flattened."""
    for stage, kernel in zip(stages[:-1], kernels, strict=False):
        patches = through(stage, kernel, patches)
    return patches.flatten(1)


def _full_loss(stages: Sequence[Stage], target: Target) -> Loss:
    """E over the scale of the target, with one product by S for value and gradient together."""
    scale = target.scale + torch.finfo(torch.float64).tiny

    def loss(kernels: list[Tensor]) -> Tensor:
        difference = compose(kernels, stages).flatten(1) - target.kernel
        slope = difference.detach() @ target.covariance
        # The value of <D, S D> with the gradient 2 S D: the second factor is a constant here.
        value = (difference * slope).sum()
        return (2 * value - value.detach()) / scale

    return loss


def _minimise(
    loss: Loss, assemble: Callable[[Sequence[Tensor]], list[Tensor]], start: Sequence[Tensor], iterations: int
) -> list[Tensor]:
    """L-BFGS with a strong Wolfe line search."""
    variables = [value.clone(memory_format=torch.contiguous_format).requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(
        variables,
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-12,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(assemble(variables))
        value.backward()
        return value

    optimizer.step(closure)
    return [value.detach() for value in variables]


def _solve_last(kernels: tuple[Tensor, ...], stages: Sequence[Stage], target: Target) -> tuple[Tensor, ...]:
    """The last stage's optimum given the others: least squares on its own inputs, each of its groups by itself."""
    last = stages[-1]
    if last.groups == 1:
        d = target.covariance.shape[0]
        wanted = target.response.reshape(target.shape)
        covariance = target.covariance.reshape(d, *target.shape[1:])
        inner, cross = _last_input(kernels[:-1], stages, covariance, wanted)
        solved = torch.cholesky_solve(cross.T, cholesky(inner)).T
    else:
        solved = _solve_groups(kernels, stages, target)
    candidate = (*kernels[:-1], solved.reshape(kernels[-1].shape))
    worse = target.error(compose(candidate, stages)) > target.error(compose(kernels, stages))
    return kernels if worse else candidate


def _solve_groups(kernels: tuple[Tensor, ...], stages: Sequence[Stage], target: Target) -> Tensor:
    """As above for a grouped last stage: every group has its own inputs, which only the stage before gives it."""
    last, before = stages[-1], stages[-2]
    assert len(stages) == 2 and before.groups == 1 and before.axes == "", "a grouped last stage follows a pointwise one"
    d, groups = target.covariance.shape[0], last.groups
    covariance = target.covariance.reshape(d, *target.shape[1:])
    wanted = target.response.reshape(groups, -1, *target.shape[1:])
    first = kernels[0][:, :, 0, 0].unflatten(0, (groups, -1))  # (g, r, C)
    patch = first.shape[1] * target.shape[2] * target.shape[3]
    solved = []
    for part in torch.arange(groups).split(max(1, SOLVE_CHUNK // (d * patch))):
        a = first[part]
        half = torch.einsum("dchw,grc->dgrhw", covariance, a).reshape(*target.shape[1:], len(part), patch)
        inner = torch.einsum("grc,chwgq->grhwq", a, half).reshape(len(part), patch, patch)
        cross = torch.einsum("grc,gochw->gorhw", a, wanted[part]).flatten(2)
        solved.append(torch.cholesky_solve(cross.mT, cholesky(_jittered(inner))).mT.flatten(0, 1))
    return torch.cat(solved)
