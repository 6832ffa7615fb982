"""ONNX files as files: what they may ask for, opened and tried out safely, run, and put in their places."""

from convrewrite.onnx_files.contents import read_model, tensors
from convrewrite.onnx_files.model import ELEMENT_TYPES, OnnxModel, Runner, inputs_of, outputs_of
from convrewrite.onnx_files.opsets import opset_of, require_opset
from convrewrite.onnx_files.placing import is_weights_of, new_name_of_weights, place, size_of
from convrewrite.onnx_files.probing import require_well_behaved
from convrewrite.onnx_files.provenance import Provenance, digest_of, mark_form
from convrewrite.onnx_files.running import PATIENCE, run_within
from convrewrite.onnx_files.sessions import open_session

__all__ = [
    "ELEMENT_TYPES",
    "PATIENCE",
    "OnnxModel",
    "Provenance",
    "Runner",
    "digest_of",
    "inputs_of",
    "is_weights_of",
    "mark_form",
    "new_name_of_weights",
    "open_session",
    "opset_of",
    "outputs_of",
    "place",
    "read_model",
    "require_opset",
    "require_well_behaved",
    "run_within",
    "size_of",
    "tensors",
]
