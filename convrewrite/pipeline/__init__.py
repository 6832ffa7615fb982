"""The way through, from a model to a result in a folder."""

from convrewrite.pipeline.api import RewriteConvolutions, analyze, apply, optimize, plan
from convrewrite.pipeline.comparing import verify, verify_related
from convrewrite.pipeline.exporting import export_result
from convrewrite.pipeline.points import Frontier
from convrewrite.pipeline.profiling import profile
from convrewrite.pipeline.quantising import Int8Row, quantise
from convrewrite.pipeline.recovery import recover
from convrewrite.pipeline.relations import Relation
from convrewrite.pipeline.run import Run
from convrewrite.pipeline.sweeping import Sweep, frontier_of, sweep, sweep_all

__all__ = [
    "Frontier",
    "Int8Row",
    "Relation",
    "RewriteConvolutions",
    "Run",
    "Sweep",
    "analyze",
    "apply",
    "export_result",
    "frontier_of",
    "optimize",
    "plan",
    "profile",
    "quantise",
    "recover",
    "sweep",
    "sweep_all",
    "verify",
    "verify_related",
]
