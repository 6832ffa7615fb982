"""What a run leaves: the result as a value, and the folder it is written to and read from."""

from convrewrite.results.folder import ONNX, PLAN, Result, check_file, check_writable, load, read_plan, save_plan

__all__ = ["ONNX", "PLAN", "Result", "check_file", "check_writable", "load", "read_plan", "save_plan"]
