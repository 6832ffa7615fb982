"""Fit the stages of any structure to a convolution's real inputs, in closed form and without labels.

The objective is ``E = tr[(W* - W') S (W* - W')^T]`` with S the covariance of the input patches and ``W*`` the kernel that
best reproduces the original output *from the inputs this site really gets*, ridged towards W. It is quadratic in each
stage. Nothing here knows a particular structure: stages are applied to S through their shapes.

- ``reduced``: the last stage is a dense linear map, so it is eliminated in closed form and E is minimised over the others
  (variable projection, Golub and Pereyra 1973). Only the covariance of the last stage's input is needed.
- ``full``: otherwise all stages are refined jointly, then the last is solved for, each of its groups by itself.

Both use L-BFGS on a first stage whose inputs were whitened, and start from several initial values. Iterations run in float64, for
large problems in float32; the last step, the closed form of the last stage, and every comparison are in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convrewrite.conv import ConvSpec
from convrewrite.fitting.found import Fit, bias_of, fit_of, unexplained
from convrewrite.fitting.goals import Goal, Kernels
from convrewrite.fitting.moments import Moments
from convrewrite.fitting.objective import LastInput, Loss, full_loss, reduced_loss
from convrewrite.fitting.targets import FLOOR, LARGE, FitTarget, Ground, colour, first_stage_root, uncolour
from convrewrite.structures import Setting, Stage, Structure, join_groups, split_groups

ITERATIONS = 40
"""Iterations of L-BFGS for patches of up to ``EASY`` numbers; fewer for larger ones, as an iteration's cost grows with their
square."""

MIN_ITERATIONS = 4
"""Fewest iterations, whatever the size of a patch."""

EASY = 600
"""Up to this many numbers in a patch every iteration is cheap."""

SINGLE = 600
"""For patches of at least this many numbers, iterations run in float32, which takes half the time."""

SHARE = 0.25
"""Where patches are large, refinement may take this part of the products of a covariance: with few outputs that allows many
iterations. Only one start is refined there, so twice the usual number of iterations is allowed. Measured on 64 x 1 kernels, 128
to 16 channels, rank 1: errors of 0.387, 0.328, 0.304 and 0.294 after 4, 15, 40 and 100 iterations."""

WORK = 3 * 10**9
"""Refinement is cheap on any machine if outputs times the square of a patch times iterations is at most this: as much as all
iterations take for a patch of ``EASY`` numbers with 200 outputs."""


def fit(
    structure: Structure,
    spec: ConvSpec,
    setting: Setting,
    goals: Sequence[Goal],
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
    iterations: int | None = None,
) -> Fit:
    """Fit one option at one site; ``goals``, ``moments`` and ``held_out`` have one entry per group.

    ``iterations`` of L-BFGS; None: as many as the size of the problem allows. The best start is chosen by the held-out inputs.
    """
    stages = structure.stages(spec.per_group, setting)
    fitted: list[Kernels] = []
    shares = []
    for goal, seen, unseen in zip(goals, moments, held_out, strict=True):
        aim, effort = goal.aim(stages), iterations
        target = aim.target
        if effort is None:
            effort = effort_within(len(target.covariance), goal.outputs, seen.count)
        root = first_stage_root(stages[0], target)
        starts = _starts(structure, spec.per_group, setting, aim.wanted, root)
        begun = [_begin(aim.begun(start), stages, target) for start in starts]
        if len(target.covariance) >= LARGE:
            begun = [min(begun, key=lambda point: point.objective)]
        refined = [aim.real(_refine(point, stages, target, root, effort).kernels) for point in begun]
        share, best = min(((unexplained(own, stages, unseen), own) for own in refined), key=lambda entry: entry[0])
        if not all(torch.isfinite(kernel).all() for kernel in best):
            raise ArithmeticError("its fit is not finite")
        fitted.append(best)
        shares.append(share)
    return fit_of(fitted, stages, moments, held_out, shares)


def grounds_of(kernel: Tensor, spec: ConvSpec, moments: Sequence[Moments]) -> list[Ground]:
    """What the targets of every group of a canonical kernel are made from."""
    parts = split_groups(kernel.double(), spec.groups)
    return [Ground.of(part, m) for part, m in zip(parts, moments, strict=True)]


def rough_fit(
    structure: Structure,
    spec: ConvSpec,
    setting: Setting,
    moments: Sequence[Moments],
    goals: Sequence[Goal],
) -> Fit:
    """One start with the last stage's optimum, in the precision of ``goals``, for comparing options of large sites.

    What is left unexplained is the objective, relative to that of a kernel of zeros; held-out inputs are not used.
    """
    stages = structure.stages(spec.per_group, setting)
    kernels, left, scale = [], 0.0, 0.0
    for goal in goals:
        aim = goal.aim(stages)
        target, own = aim.target, spec.per_group
        if stages[0].axes == "hw" and stages[0].groups == 1:  # there the whitened start is the optimum
            root = first_stage_root(stages[0], target)
            first, *others = structure.weights(colour(aim.wanted, stages[0], root), own, setting)
            start = (uncolour(first, root), *others)
        else:
            start = structure.weights(aim.wanted, own, setting)
        point = _begin(aim.begun(start), stages, target)
        kernels.append(tuple(kernel.double() for kernel in aim.real(point.kernels)))
        left, scale = left + point.objective, scale + target.scale
    bias = torch.cat([bias_of(own, stages, m) for own, m in zip(kernels, moments, strict=True)])
    return Fit(join_groups(kernels), bias, max(0.0, left) / max(scale, FLOOR))


def effort_for(d: int, most: int) -> int:
    """Iterations of L-BFGS for patches of ``d`` numbers, ``most`` for small ones."""
    return max(MIN_ITERATIONS, min(most, round(most * (EASY / d) ** 2)))


def effort_within(d: int, outputs: int, count: int, most: int = 2 * ITERATIONS) -> int:
    """The same, but more at large patches where ``outputs`` are so few that an iteration, ``4 * outputs * d^2`` products, is
    cheap: in itself, or compared with the covariance of ``count`` positions, ``count * d^2 / 2``. Up to ``most``, and as many as
    stay within ``WORK`` or about ``SHARE`` of the covariance's products."""
    usual = effort_for(d, min(most, ITERATIONS))
    if d < LARGE:
        return usual
    return max(usual, min(most, max(int(SHARE * count / (4 * outputs)), WORK // (outputs * d * d))))


def refit(
    stages: Sequence[Stage],
    found: Fit,
    goals: Sequence[Goal],
    moments: Sequence[Moments],
    held_out: Sequence[Moments],
    iterations: int,
) -> Fit:
    """Go on from a fit of these stages, towards other wanted outputs if ``goals`` and ``moments`` have such; ``held_out`` has the
    outputs of the original."""
    starts = zip(*(kernels.chunk(len(goals)) for kernels in found.kernels), strict=True)
    refined = []
    for start, goal in zip(starts, goals, strict=True):
        aim = goal.aim(stages)
        begun = _begin(aim.own(start), stages, aim.target)
        if iterations:
            begun = _refine(begun, stages, aim.target, first_stage_root(stages[0], aim.target), iterations)
        refined.append(aim.real(begun.kernels))
    return fit_of(refined, stages, moments, held_out)


def _starts(
    structure: Structure, spec: ConvSpec, setting: Setting, wanted: Tensor, root: Tensor
) -> list[tuple[Tensor, ...]]:
    """Initial stage kernels: the decomposition of the ``wanted`` kernel, and its decomposition with whitened first-stage inputs.

    For the structure ``channel`` the whitened decomposition is the closed-form optimum (reduced-rank regression).
    """
    first = structure.stages(spec, setting)[0]
    whitened = structure.weights(colour(wanted, first, root), spec, setting)
    plain = structure.weights(wanted, spec, setting)
    return [plain, (uncolour(whitened[0], root), *whitened[1:])]


@dataclass(frozen=True, slots=True)
class _Point:
    """Stage kernels during a fit, and their E."""

    kernels: tuple[Tensor, ...]
    objective: float


def _begin(start: tuple[Tensor, ...], stages: Sequence[Stage], target: FitTarget) -> _Point:
    """``start`` with the last stage's optimum, unless rounding made that one worse."""
    seen = LastInput.of(start[:-1], stages, target.second)
    point = _Point(start, seen.objective(start[-1], target.scale))
    solved = seen.optimum().reshape(start[-1].shape)
    objective = _descended(point.objective, seen.objective(solved, target.scale), target)
    return point if objective > point.objective else _Point((*start[:-1], solved), objective)


def _refine(start: _Point, stages: Sequence[Stage], target: FitTarget, root: Tensor, iterations: int) -> _Point:
    """Lower E from ``start``: the last stage in closed form, the others by L-BFGS. Never returns a higher E."""
    if iterations == 0:
        return start
    reduced = stages[-1].groups == 1
    kernels = start.kernels[:-1] if reduced else start.kernels
    precision = torch.float32 if len(target.covariance) >= SINGLE else target.kernel.dtype
    near, whitener = target.to(precision), root.to(precision)
    first, *others = (kernel.to(precision) for kernel in kernels)
    variables = [(first.reshape(root.shape[0], -1, root.shape[1]) @ whitener).reshape(first.shape), *others]

    def assemble(values: Sequence[Tensor]) -> list[Tensor]:
        return [uncolour(values[0], whitener), *values[1:]]

    loss = reduced_loss(stages, near) if reduced else full_loss(stages, near)
    try:
        refined = [kernel.to(root.dtype) for kernel in assemble(_minimise(loss, assemble, variables, iterations))]
    except ArithmeticError:  # as where outputs hardly vary: their squares are zero in float32
        return start
    if not all(bool(kernel.isfinite().all()) for kernel in refined):
        return start
    end = _begin((*refined, start.kernels[-1]) if reduced else tuple(refined), stages, target)
    if not end.objective <= start.objective:  # L-BFGS lost its gain to rounding: the start stands
        return start
    return end


def _descended(before: float, after: float, target: FitTarget) -> float:
    """``after``. Raises ArithmeticError where E rose by more than rounding."""
    rounding = 1e-9 if target.kernel.dtype == torch.float64 else 1e-3
    if not after <= before + rounding * target.scale:
        raise ArithmeticError(f"its error rose from {before:.3g} to {after:.3g}")
    return after


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
