"""What a run leaves: the result as a value, and the folder it is written to and read from."""

from convrewrite.results.analysis import Analysis, check_page
from convrewrite.results.digests import PLAN, require_described
from convrewrite.results.folder import (
    FILES,
    INT8,
    ONNX,
    WEIGHTS,
    Result,
    add_exports,
    check_addable,
    check_file,
    check_writable,
    save_plan,
)
from convrewrite.results.further import further_files, kept, left_out, onnx_of
from convrewrite.results.reading import load, read_plan

__all__ = [
    "FILES",
    "INT8",
    "ONNX",
    "PLAN",
    "WEIGHTS",
    "Analysis",
    "Result",
    "add_exports",
    "check_addable",
    "check_file",
    "check_page",
    "check_writable",
    "further_files",
    "kept",
    "left_out",
    "load",
    "onnx_of",
    "read_plan",
    "require_described",
    "save_plan",
]
