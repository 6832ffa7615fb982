"""What goes through one site, gathered over all batches: moments, and where a ReLU follows, the positions themselves."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convrewrite.fitting import (
    LARGE,
    Accumulator,
    Block,
    MomentBytes,
    Moments,
    doubtable,
    position_limit,
)
from convrewrite.graph import Site
from convrewrite.machine import give_back_heap
from convrewrite.places import PROCESSOR
from convrewrite.progress import Stopwatch
from convrewrite.rewriting.propagation import Propagation

OF_MEMORY = 8
"""Where the patches of kept positions take more than one eighth of the memory, and input planes less than three quarters of that,
the planes are kept, and patches are cut from them at each use, in about a quarter of the time of the product that follows."""

SQUARES = 4
"""Matrices of the size of a covariance that a site needs at once: those of the fitted and of the held-out inputs, the target's
and a factor of it. Where inputs are few, a target with less trust in them is tried as well, if there is room."""


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """Moments of every group, and the positions that are kept, of the inputs that are fitted on and of those held out; both are
    the same where nothing is held out. ``room``: whether memory has room for a target with less trust."""

    seen: tuple[Moments, ...]
    unseen: tuple[Moments, ...]
    fitted: tuple[Block, ...]
    held_out: tuple[Block, ...]
    room: bool

    def to(self, place: torch.device) -> "SiteInputs":
        """The same on ``place``."""
        seen = tuple(moments.to(place) for moments in self.seen)
        unseen = seen if self.unseen is self.seen else tuple(moments.to(place) for moments in self.unseen)
        fitted = tuple(block.to(place) for block in self.fitted)
        held_out = fitted if self.held_out is self.fitted else tuple(block.to(place) for block in self.held_out)
        return SiteInputs(seen, unseen, fitted, held_out, self.room)


def where_solved(site: Site, device: torch.device) -> torch.device:
    """Where options of a site whose inputs lie on ``device`` are fitted: small ones on the processor, side by side, as a device
    waits for each of their many small steps. When all were fitted on the device (an H100 with 16 cores), a survey of a ResNet-18
    took 56 s of solves."""
    return device if is_large(site) else torch.device(PROCESSOR)


def is_large(site: Site) -> bool:
    """Whether a fit of its options takes long, and matrices of the size of its covariance take much of the memory."""
    return site.folded_spec.patch >= LARGE


@dataclass(frozen=True, slots=True)
class Gathering:
    """Gathers the inputs of the site that ``walk`` stands before; the first ``split`` batches are fitted on."""

    walk: Propagation
    site: Site
    split: int
    seed: int
    device: torch.device

    def gathered(self, watch: Stopwatch) -> SiteInputs | None:
        """The inputs of the site; None where no input that is fitted on reaches it.

        The wanted output is the original's at the original's input, plus what is missing in the sum that follows.
        """
        give_back_heap()
        with watch.timed("forward passes"):
            keep = self.walk.rectified(self.site)
        fitted, held_out, room = self._accumulators(keep)
        for sample in watch.each("forward passes", self.walk.samples(self.site)):
            chosen = fitted if sample.batch < self.split else held_out
            with watch.timed("moments"):
                shown = sample.planar(self.site.spec)
                chosen.add(shown.rewritten, shown.wanted, shown.rewritten_skip)
        if fitted.empty:
            return None
        give_back_heap()  # that of batches and their patches, before matrices as large as the covariance are made
        seen, rows = self._moments(fitted), tuple(fitted.kept or ())
        if held_out.empty:
            return SiteInputs(seen, seen, rows, rows, room)
        return SiteInputs(seen, self._moments(held_out), rows, tuple(held_out.kept or ()), room)

    def _moments(self, accumulator: Accumulator) -> tuple[Moments, ...]:
        found = accumulator.result()
        return found if self.site.folded_spec.bias else tuple(moments.about_zero() for moments in found)

    def _accumulators(self, keep: bool) -> tuple[Accumulator, Accumulator, bool]:
        """Accumulators for the inputs to fit on and for those held out; and whether there is room for a target with less trust.
        Activations make room for what the accumulators keep in memory."""
        spec, walk = self.site.folded_spec, self.walk
        every = self._positions(walk.examples[: self.split]), self._positions(walk.examples[self.split :])
        size = (spec.patch, spec.out_channels // spec.groups)
        limits = position_limit(*size), position_limit(*size, held_out=True)
        wanted = [min(pair) for pair in zip(every, limits, strict=True)]
        taken = MomentBytes(spec)
        squares, rows = SQUARES * taken.squares, sum(wanted) * taken.row if keep else 0
        room = max(0, walk.memory - squares)
        planes = self._planes(taken) + sum(wanted) * taken.outputs
        cut = OF_MEMORY * rows > walk.memory and 4 * planes < 3 * rows and planes <= room
        rows = planes if cut else rows
        if rows > room:
            wanted = [max(1, count * room // rows) for count in wanted]
        spare = taken.squares if doubtable(wanted[0], size[0]) else 0
        fits = rows + spare <= room
        walk.make_room(squares + min(rows, room) + (spare if fits else 0))
        fitted, held_out = (
            Accumulator(spec, positions, self.seed + index, keep=keep, cut=cut, limit=count, device=self.device)
            for index, (positions, count) in enumerate(zip(every, wanted, strict=True))
        )
        return fitted, held_out, fits

    def _planes(self, taken: MomentBytes) -> int:
        """Bytes of the padded inputs of all calls. A transposed convolution's, which are spread out, are never kept."""
        if self.site.spec.transposed:
            return sys.maxsize
        return sum(self.walk.examples) * taken.planes(self.site.input_sizes)

    def _positions(self, examples: Sequence[int]) -> int:
        """Output positions of all calls, over batches with these numbers of ``examples``."""
        sizes = (self.site.folded_spec.output_size(size) for size in self.site.input_sizes)
        return sum(examples) * sum(height * width for height, width in sizes)
