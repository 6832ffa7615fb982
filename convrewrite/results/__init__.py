"""What a run leaves: the result as a value, and the folder it is written to and read from."""

from convrewrite.results.analysis import Analysis, check_page
from convrewrite.results.digests import PLAN, require_described
from convrewrite.results.folder import (
    FILES,
    ONNX,
    WEIGHTS,
    Result,
    add_exports,
    check_addable,
    check_file,
    check_writable,
    save_plan,
)
from convrewrite.results.further import add_int8, files_of, kept, left_out
from convrewrite.results.reading import load, read_plan, read_report

__all__ = [
    "FILES",
    "ONNX",
    "PLAN",
    "WEIGHTS",
    "Analysis",
    "Result",
    "add_exports",
    "add_int8",
    "check_addable",
    "check_file",
    "check_page",
    "check_writable",
    "files_of",
    "kept",
    "left_out",
    "load",
    "read_plan",
    "read_report",
    "require_described",
    "save_plan",
]
