"""Which versions of ONNX's operators, opsets, a file may be written in: those that torch's exporter and onnxruntime both know."""

import onnx

from convrewrite.errors import UsageError
from convrewrite.onnx_files.sessions import open_session

LOWEST_OPSET = 18
"""The one that torch's exporter is written for. It converts to newer ones; to older ones it mostly cannot."""


def highest_opset() -> int:
    """The newest opset that the installed onnx knows and the installed onnxruntime opens."""
    newest = onnx.defs.onnx_opset_version()
    return next((opset for opset in range(newest, LOWEST_OPSET, -1) if _opens(opset)), LOWEST_OPSET)


def require_opset(opset: int) -> None:
    """Raise UsageError for an opset in which no file can be written here."""
    highest = highest_opset()
    if not LOWEST_OPSET <= opset <= highest:
        raise UsageError(
            f"--opset: expected a whole number from {LOWEST_OPSET}, below which torch's exporter has no operators, to {highest}, "
            f"the newest that onnx and onnxruntime have here, found {opset}"
        )


def opset_of(model: onnx.ModelProto) -> int:
    """The opset of ONNX's own operators in a model."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _opens(opset: int) -> bool:
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "one", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    try:
        open_session(model.SerializeToString())
    except Exception:  # onnxruntime's own exceptions share no public base class
        return False
    return True
