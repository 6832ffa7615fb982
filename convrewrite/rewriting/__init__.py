"""Fit and apply, front to back. Knows no budget."""

from convrewrite.rewriting.front_to_back import Rewritten, rewrite
from convrewrite.rewriting.kept_fits import keepable, run_cache_of
from convrewrite.rewriting.outcomes import Outcome
from convrewrite.rewriting.output_weighting import output_weights, roots_of
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.site_fit import UNREACHED, SiteFit, require_memory
from convrewrite.rewriting.surgery import (
    build_conv,
    build_option,
    counted_as_replaced,
    empty_option,
    folded_kernel,
    replace_site,
    settle,
)
from convrewrite.rewriting.work import Prepared, Work

__all__ = [
    "UNREACHED",
    "Outcome",
    "Prepared",
    "Propagation",
    "Rewritten",
    "SiteFit",
    "Work",
    "build_conv",
    "build_option",
    "counted_as_replaced",
    "empty_option",
    "folded_kernel",
    "keepable",
    "output_weights",
    "replace_site",
    "require_memory",
    "rewrite",
    "roots_of",
    "run_cache_of",
    "settle",
]
