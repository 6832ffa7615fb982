"""What a run leaves: the result as a value, and the folder it is written to and read from."""

from convrewrite.results.analysis import Analysis, check_page
from convrewrite.results.folder import (
    FILES,
    INT8,
    ONNX,
    PLAN,
    Result,
    add_exports,
    check_addable,
    check_file,
    check_writable,
    load,
    read_plan,
    save_plan,
)

__all__ = [
    "FILES",
    "INT8",
    "ONNX",
    "PLAN",
    "Analysis",
    "Result",
    "add_exports",
    "check_addable",
    "check_file",
    "check_page",
    "check_writable",
    "load",
    "read_plan",
    "save_plan",
]
