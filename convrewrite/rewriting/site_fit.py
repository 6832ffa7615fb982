"""One site during fitting: its kernel, the moments of its inputs, and the fits of options to them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.errors import FitError, UsageError
from convrewrite.fitting import (
    LARGE,
    Block,
    Evidence,
    Fit,
    Goal,
    MomentBytes,
    Moments,
    Roots,
    effort_within,
    fit,
    refit,
    rough_fit,
    solving,
)
from convrewrite.graph import Site
from convrewrite.places import exact_place
from convrewrite.progress import Stopwatch
from convrewrite.rewriting.attempts import attempts, require_one, until_within, without_failed
from convrewrite.rewriting.output_weighting import roots_of
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_inputs import SQUARES, Gathering, where_solved
from convrewrite.rewriting.surgery import build_conv, build_option, folded_kernel, in_place_of
from convrewrite.rules import Candidate
from convrewrite.structures import Option, Stage, Structure, composed_kernel, initial_kernels, option_cost
from convrewrite.values import some_of
from convrewrite.workers import side_by_side

Found = TypeVar("Found")

WIDE, WORTH = 256, 0.6
"""With at least this many channels in a group, and at most this part of the MACs, a chain is faster in torch than the one
composed convolution: it takes half to three quarters of its time at half the MACs. With 128 channels it takes 0.75 to 1.7 times
as long, with 64 more than twice."""

SHOWN = 6
"""Most names of sites in a message."""

UNREACHED = "none of the calibration inputs gets to it, so no error could be measured; give some that do"
"""Reason why a site that no input reaches is kept."""


@dataclass(frozen=True, slots=True)
class SiteFit:
    """One site with its folded kernel ``(O, C / g, kh, kw)``, its bias, and the moments of its inputs where there are any.

    ``reached``: False where no input to fit on reaches the site, as the path through a model may depend on its inputs.
    ``evidence`` is set where there are moments.
    """

    walk: Propagation
    site: Site
    kernel: Tensor
    bias: Tensor
    like: Tensor
    fitted_batches: int
    seed: int
    roots: Roots
    seen: tuple[Moments, ...] = ()
    unseen: tuple[Moments, ...] = ()
    goals: tuple[Goal, ...] = ()
    fitted: tuple[Block, ...] = ()
    held_out: tuple[Block, ...] = ()
    reached: bool = True
    evidence: Evidence | None = None

    @classmethod
    def of(
        cls,
        walk: Propagation,
        site: Site,
        calibration: Calibration,
        weights: Mapping[str, Tensor],
        seed: int,
        watch: Stopwatch,
    ) -> "SiteFit":
        """The site that ``walk`` stands before; its inputs are gathered unless the calibration is of the weights only.

        ``weights`` are those of the outputs, by site: see :mod:`convrewrite.rewriting.output_weighting`.
        """
        with solving(site.name):
            roots = roots_of(weights, site)
        bare = replace(cls.bare(walk, site, calibration, seed), roots=roots)
        return bare if calibration.kind == "weights only" else bare._with_moments(watch)

    @classmethod
    def bare(cls, walk: Propagation, site: Site, calibration: Calibration, seed: int) -> "SiteFit":
        """The site alone: its options can be built but not fitted."""
        kernel, bias = folded_kernel(walk.model, site)
        like = walk.model.get_submodule(site.name).weight
        assert isinstance(like, Tensor)
        return cls(walk, site, kernel, bias, like, len(calibration.fit), seed, (None,) * site.spec.groups)

    def solved(self, tasks: Sequence[Callable[[], Found]]) -> list[Found]:
        """The results of tasks that fit this site's options, run side by side; a single one has all threads where matrices are
        large."""
        return [tasks[0]()] if len(tasks) == 1 and self.patch >= LARGE else side_by_side(tasks)

    def tried(self, tasks: Sequence[Callable[[], Found]]) -> list[Found | FitError]:
        """As :meth:`solved`, with the error in place of a result that cannot be found. Raises FitError where none can be
        found."""
        found = self.solved(attempts(tasks))
        require_one(found)
        return found

    def fit_all(self, candidates: Sequence[Candidate], structures: dict[str, Structure]) -> list[tuple[Candidate, Fit]]:
        """Every candidate with its stage kernels: fitted to the inputs as far as these are to be trusted, or without inputs the
        initial values. Candidates that cannot be fitted are left out.

        For large problems only the candidate that does best in a rough fit is fitted and returned; if that fails, the next best;
        and if it misses its rule's error limit, also the best with a larger limit.
        Raises FitError where no candidate can be fitted.
        """
        if self.patch >= LARGE and self.evidence is not None:
            return self._best_large(candidates, structures, self.evidence)
        fits = [partial(self._believed_fit, structures[p.option.structure], p.option) for p in candidates]
        return without_failed(candidates, self.tried(fits))

    def _best_large(
        self, candidates: Sequence[Candidate], structures: dict[str, Structure], evidence: Evidence
    ) -> list[tuple[Candidate, Fit]]:
        goals = [goal.to(torch.float32) for goal in self.goals]
        tried = [partial(self.rough, structures[p.option.structure], p.option, goals) for p in candidates]
        rough = without_failed(candidates, self.tried(tried))
        ordered = sorted(rough, key=lambda entry: entry[1].error)

        def finished(option: Option, begun: Fit) -> Fit:
            with solving(self.site.name):
                return evidence.fit_large(structures[option.structure], option.parameters, self.goals, begun)

        return until_within([p for p, _ in ordered], [partial(finished, p.option, begun) for p, begun in ordered])

    def _believed_fit(self, structure: Structure, option: Option) -> Fit:
        return self.believed(structure, option, self.fit(structure, option))

    def believed(self, structure: Structure, option: Option, found: Fit) -> Fit:
        """A fit, or where it overfitted few inputs, one that does better on held-out ones."""
        if self.evidence is None:
            return found
        with solving(self.site.name):
            return self.evidence.believed(structure, option.parameters, found)

    def fit(self, structure: Structure, option: Option, iterations: int | None = None) -> Fit:
        """One option fitted to the inputs, or without inputs its initial values.

        ``iterations`` None: as many as the size of the problem allows.
        """
        if not self.seen:
            return weights_only(structure, self.site, option, self.kernel, self.bias)
        with solving(self.site.name):
            return fit(
                structure, self.site.folded_spec, option.parameters, self.goals, self.seen, self.unseen, iterations
            )

    def rough(self, structure: Structure, option: Option, goals: Sequence[Goal]) -> Fit:
        """A quick fit for comparing options; ``goals`` are the site's own, in any precision."""
        if not self.seen:
            return weights_only(structure, self.site, option, self.kernel, self.bias)
        with solving(self.site.name):
            return rough_fit(structure, self.site.folded_spec, option.parameters, self.seen, goals)

    def go_on(self, structure: Structure, option: Option, found: Fit, iterations: int) -> Fit:
        """A fit of an option to the same inputs with more ``iterations``."""
        return self.refitted(structure, option, found, self.goals, self.seen, iterations)

    def refitted(
        self,
        structure: Structure,
        option: Option,
        found: Fit,
        goals: Sequence[Goal],
        moments: Sequence[Moments],
        iterations: int,
    ) -> Fit:
        """A fit that goes on from another, towards other ``goals`` with their ``moments``, for so many more ``iterations``."""
        stages = structure.stages(self.site.folded_spec.per_group, option.parameters)
        with solving(self.site.name):
            return refit(stages, found, goals, moments, self.unseen, iterations)

    @property
    def patch(self) -> int:
        """Numbers in a patch of one group."""
        return self.kernel[0].numel()

    def build(self, structure: Structure, option: Option, found: Fit) -> nn.Module:
        """The module that takes the site's place."""
        stages = structure.stages(self.site.spec.per_group, option.parameters)
        chain = build_option(self.site.folded_spec, stages, option, found.kernels, found.bias, self.like)
        return in_place_of(self.walk.model.get_submodule(self.site.name), chain)

    def merged(self, structure: Structure, option: Option, found: Fit) -> nn.Module:
        """The same as one convolution with the composed kernel: equal up to rounding, and in torch faster than a chain, unless
        channels are many, since every further operator costs time. A dynamic convolution stays a chain, as its kernels are mixed
        at every call."""
        stages = structure.stages(self.site.spec.per_group, option.parameters)
        if self.site.spec.kernels > 1 or self._pays(stages):
            return self.build(structure, option, found)
        kernel = composed_kernel(found.kernels, stages, self.site.spec.groups)
        return build_conv(self.site.folded_spec, kernel, found.bias, self.like)

    def _pays(self, stages: Sequence[Stage]) -> bool:
        """Whether torch runs the chain in less time than the convolution it replaces."""
        spec, sizes = self.site.folded_spec, self.site.input_sizes
        if min(spec.in_channels, spec.out_channels) < WIDE * spec.groups:
            return False
        return option_cost(spec, stages, sizes).macs <= WORTH * spec.cost(sizes).macs

    def effort(self, most: int) -> int:
        """Iterations of refinement at this site: ``most`` where patches are small, otherwise as many as are cheap."""
        return effort_within(self.patch, len(self.kernel) // self.site.spec.groups, self._count, most)

    def fit_error(self, structure: Structure, option: Option, found: Fit) -> float | None:
        """The relative output error on the inputs that were fitted on; None without any."""
        if self.evidence is None:
            return None
        return self.evidence.left_by(structure, option.parameters, found) ** 0.5

    @property
    def _count(self) -> int:
        return self.seen[0].count if self.seen else 0

    def goals_of(self, found: Fit) -> Sequence[Goal]:
        """The goals that a fit was made for: those of its trusts where they are less than full."""
        if not found.trusts or self.evidence is None:
            return self.goals
        with solving(self.site.name):
            return self.evidence.goals(found.trusts, solved=False)

    def _with_moments(self, watch: Stopwatch) -> "SiteFit":
        """The same with the moments of the inputs, gathered on the device where these lie, and moved to where fits take less
        time."""
        gathering = Gathering(self.walk, self.site, self.fitted_batches, self.seed, self.like.device)
        gathered = gathering.gathered(watch)
        if gathered is None:
            return replace(self, reached=False)
        place = where_solved(self.site, self.like.device)
        inputs, kernel = gathered.to(place), self.kernel.to(exact_place(place))
        roots = tuple(None if root is None else root.to(exact_place(place)) for root in self.roots)
        with watch.timed("solves"), solving(self.site.name):
            _require_finite((*inputs.seen, *inputs.unseen))
            examples = sum(self.walk.examples[: self.fitted_batches])
            evidence = Evidence.of(
                self.site.folded_spec, kernel, inputs.seen, inputs.unseen, examples, roots, inputs.room
            )
            goals = tuple(evidence.goals())
        return replace(
            self,
            kernel=kernel,
            bias=self.bias.to(exact_place(place)),
            roots=roots,
            seen=inputs.seen,
            unseen=inputs.unseen,
            goals=goals,
            fitted=inputs.fitted,
            held_out=inputs.held_out,
            evidence=evidence,
        )


def require_memory(sites: Sequence[Site], memory: int) -> None:
    """Raise UsageError, before any long work, where ``memory`` bytes do not hold what each site needs at least."""
    needs = sorted(((_least_memory(site), site) for site in sites), key=lambda pair: -pair[0])
    over = [site for least, site in needs if least > memory]
    if not over:
        return
    least, worst = needs[0]
    raise UsageError(
        f"memory: {worst.name}, {worst.spec.describe()}, needs {least / 2**20:.1f} MB for the covariances of its patches, "
        f"found a limit of {memory / 2**20:.1f} MB; give more (--memory {math.ceil(least / 2**28) / 4:g}), or keep what needs "
        f"more than the limit as it is ({some_of([f'--exclude {site.name}' for site in over], SHOWN)})"
    )


def _least_memory(site: Site) -> int:
    """Bytes for the covariances of a site, and for four kept positions per unknown."""
    spec, size = site.folded_spec, MomentBytes(site.folded_spec)
    return SQUARES * size.squares + 4 * spec.patch * size.row


def weights_only(structure: Structure, site: Site, option: Option, kernel: Tensor, bias: Tensor) -> Fit:
    """The initial values as they are; ``unexplained`` is the share of the kernel's energy that they miss."""
    with solving(site.name):
        kernels = initial_kernels(structure, kernel, site.folded_spec, option.parameters)
    stages = structure.stages(site.spec.per_group, option.parameters)
    composed = composed_kernel(kernels, stages, site.spec.groups)
    unexplained = float(((composed - kernel).norm() / kernel.norm().clamp_min(torch.finfo(kernel.dtype).tiny)) ** 2)
    return Fit(kernels, bias, unexplained)


def _require_finite(moments: Sequence[Moments]) -> None:
    """Raise ArithmeticError where the site's inputs or outputs, or their squares, overflowed."""
    for part in moments:
        # The sum is not finite if any number is not, and needs no second matrix.
        if not all(bool(tensor.sum().isfinite()) for tensor in (part.mean_p, part.mean_y, part.cov_p, part.cov_yp)):
            raise ArithmeticError("its inputs or outputs are so large that their squares overflow")
