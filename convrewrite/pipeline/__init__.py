"""The way through, from a model to a result in a folder."""

from convrewrite.pipeline.api import RewriteConvolutions, analyze, apply, optimize, plan
from convrewrite.pipeline.comparing import verify
from convrewrite.pipeline.recovery import read_report, recover
from convrewrite.pipeline.relations import relation_of
from convrewrite.pipeline.results import ONNX, PLAN, Result, check_file, check_writable, load, read_plan, save_plan
from convrewrite.pipeline.run import Run
from convrewrite.pipeline.sweeping import Sweep, sweep

__all__ = [
    "ONNX",
    "PLAN",
    "Result",
    "RewriteConvolutions",
    "Run",
    "Sweep",
    "analyze",
    "apply",
    "check_file",
    "check_writable",
    "load",
    "optimize",
    "plan",
    "read_plan",
    "read_report",
    "recover",
    "relation_of",
    "save_plan",
    "sweep",
    "verify",
]
