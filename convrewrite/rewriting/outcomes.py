"""What became of the sites of a model."""

from dataclasses import dataclass

from convrewrite.graph import Site
from convrewrite.rules import Candidate


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one site: the option and its relative output error, or the reason why it is kept.

    ``positions``: how many of its inputs' patches the option was fitted on, and ``fit_error`` the error on these; None
    without inputs. ``held_out``: whether ``error`` was measured on other inputs than these.
    """

    site: Site
    candidate: Candidate | None
    error: float | None = None
    reason: str | None = None
    positions: int | None = None
    fit_error: float | None = None
    held_out: bool = True

    @property
    def unknowns(self) -> int:
        """The unknowns of a filter, which are to be found from the positions."""
        return self.site.spec.patch
