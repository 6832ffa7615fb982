"""The multiple-choice knapsack: one option of every group, so that the total effect is least within limits on several costs.

Solved as a mixed-integer linear programme with one binary variable per option (HiGHS, through scipy). The solution is exact where
a bounded search finds and proves the optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_matrix

from convrewrite.process import standard_output_closed

SLACK = 1e-9
"""Rounding may overstep a limit by this part of it."""

DEAREST = 1e12
"""Costs above this many times a limit count as this many times: an item beyond the limit is never taken, and HiGHS refuses a
programme with coefficients above 1e15."""

LIMIT_REACHED = 1
"""The status that scipy's ``milp`` gives a search that was ended before it was done."""

NODES = 1000
"""Most nodes of the search tree. For 74 sites that were nearly alike the proof was not finished after minutes, and the best
choice found within this many nodes was less than 2e-4 above the bound; effects are interpolated between a few measured ones
anyway. A limit on nodes, unlike one on time, is the same on every machine."""

ALL_NODES = 2**31 - 1
"""No limit, as HiGHS writes it: where no choice was found within ``NODES``, the search goes on to its end."""

APART = 10.0
"""Where the largest single effect is more than this many times the best sum found, the search is repeated with effects scaled to
that sum: they are scaled to the largest one first, and HiGHS treats sums within 1e-6 as equal."""


@dataclass(frozen=True, slots=True)
class Item:
    """One option of a group: its effect on the outputs, and its cost in each resource."""

    effect: float
    costs: tuple[float, ...]


def choose(groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> tuple[int, ...] | None:
    """The index of the chosen item in every group, or None when no choice stays within ``limits``.

    ``limits`` has one entry per resource, as have the items' costs; all are at least zero.
    """
    if not groups:
        return ()
    efficient = [undominated(group) for group in groups]
    chosen = _solve([[group[i] for i in indices] for group, indices in zip(groups, efficient, strict=True)], limits)
    if chosen is None:
        return None
    return tuple(indices[i] for indices, i in zip(efficient, chosen, strict=True))


def undominated(group: Sequence[Item]) -> list[int]:
    """Indices of the items that no other beats or equals in effect and in every cost; of equals the first."""
    order = sorted(range(len(group)), key=lambda i: (group[i].effect, group[i].costs, i))
    costs = np.array([group[i].costs for i in order], dtype=np.float64).reshape(len(order), -1)
    kept: list[int] = []  # positions in the order: whatever comes earlier has no larger effect
    for position in range(len(order)):
        if not (costs[kept] <= costs[position]).all(axis=1).any():
            kept.append(position)
    return sorted(order[position] for position in kept)


def least(groups: Sequence[Sequence[Item]]) -> tuple[float, ...]:
    """The least that can be spent of each resource, regardless of the others."""
    if not groups:
        return ()
    resources = len(groups[0][0].costs)
    return tuple(sum(min(item.costs[r] for item in group) for group in groups) for r in range(resources))


def _solve(groups: Sequence[Sequence[Item]], limits: Sequence[float]) -> tuple[int, ...] | None:
    """As :func:`choose`. HiGHS keeps a constraint only to about 1e-7: limits are tightened until the sum really fits."""
    if any(spent > limit * (1 + SLACK) for spent, limit in zip(least(groups), limits, strict=True)):
        return None
    effects = np.array([item.effect for group in groups for item in group])
    # A cost of the size of its limit is 1; a limit of zero can only be met by costs of zero.
    costs = np.array(
        [[c / limit if limit else c for c, limit in zip(i.costs, limits, strict=True)] for g in groups for i in g]
    )
    costs = np.minimum(costs, DEAREST)
    bounds = np.array([1.0 if limit else 0.0 for limit in limits])
    sizes = [len(group) for group in groups]
    taken = _programme(effects, costs, bounds, sizes)
    for drawn_in in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5):
        if taken is None or (taken @ costs <= bounds * (1 + SLACK) + SLACK).all():
            break
        taken = _programme(effects, costs, bounds * (1 - drawn_in), sizes)
    if taken is None:
        return None
    starts = np.cumsum([0, *(len(group) for group in groups[:-1])])
    return tuple(int(taken[start : start + len(group)].argmax()) for start, group in zip(starts, groups, strict=True))


def _programme(
    effects: NDArray[np.float64], costs: NDArray[np.float64], bounds: NDArray[np.float64], sizes: Sequence[int]
) -> NDArray[np.float64] | None:
    """The optimal 0-1 vector over all items, or the best that was found within NODES; None when there is none.

    An item whose effect alone exceeds the best sum cannot be part of a better choice: such items are dropped, and effects are
    scaled to that sum.
    """
    largest = float(np.abs(effects).max())
    taken = _searched(effects, costs, bounds, sizes, largest)
    while taken is not None and 0 < APART * (total := float(taken @ effects)) < largest:
        nearer = _searched(effects, costs, bounds, sizes, total)
        if nearer is None or not nearer @ effects < total:
            break
        taken, largest = nearer, total
    return taken


def _searched(
    effects: NDArray[np.float64],
    costs: NDArray[np.float64],
    bounds: NDArray[np.float64],
    sizes: Sequence[int],
    largest: float,
) -> NDArray[np.float64] | None:
    """As above, of items whose effect is at most ``largest``; effects are scaled to it."""
    one_each: csr_matrix[np.float64] = csr_matrix(block_diag([np.ones((1, size)) for size in sizes]))
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(bounds):
        constraints.append(LinearConstraint(costs.T, -np.inf, bounds))
    scale = largest or 1.0

    def search(nodes: int) -> Any:
        with standard_output_closed():  # HiGHS writes lines of its own there, whatever ``disp`` says
            return milp(
                np.minimum(effects / scale, 1.0),
                constraints=constraints,
                integrality=np.ones(len(effects), dtype=np.int64),
                bounds=Bounds(0, np.where(effects <= largest, 1.0, 0.0)),
                options={"mip_rel_gap": 0.0, "node_limit": nodes},
            )

    found = search(NODES)
    if found.x is None and found.status == LIMIT_REACHED:
        found = search(ALL_NODES)
    return None if found.x is None else np.round(found.x)
