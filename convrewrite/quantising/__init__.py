"""int8: an ONNX file quantised statically by onnxruntime's own quantiser, its chains of convolutions scaled evenly before."""

from convrewrite.quantising.choosing import quantise_file
from convrewrite.quantising.even import evened
from convrewrite.quantising.rounding import rounded

__all__ = ["evened", "quantise_file", "rounded"]
