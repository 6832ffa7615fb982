"""An ONNX graph as it came: what every stage of this wing reads, and none changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class OnnxFile:
    """A model as it was read; weights in other files are left there.

    ``folder`` is where these lie; ``path`` the file itself, None for a model from memory; ``source`` names it in messages.
    """

    model: onnx.ModelProto
    folder: Path
    source: str
    path: Path | None = None

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        versions = [entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")]
        return max(versions, default=1)

    def array(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        """The numbers of a tensor; those in another file are mapped, not read. Half precision stays as it is."""
        return np.asarray(ir.serde.deserialize_tensor(tensor, self.folder).numpy())


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as the makers of operators see it.

    Attributes:
        op_type: the operator, of the standard domain or of ``com.microsoft``.
        opset: the version of the standard operators in the file.
        attributes: those that are given, as int, float, str, Tensor, or lists of these; graphs are left out.
        constants: for every input its value where that is constant (half precision as float32), otherwise None.
        present: for every input whether there is one: optional ones may be left out.
        ranks: for every input the number of its axes in the example run; None where it is no tensor or left out.
        outputs: for every output whether the graph uses it.
        stands: whether it must not be folded into the node before it.
    """

    op_type: str
    opset: int
    attributes: Mapping[str, Any]
    constants: tuple[Tensor | None, ...]
    present: tuple[bool, ...]
    ranks: tuple[int | None, ...]
    outputs: tuple[bool, ...] = (True,)
    stands: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """What takes the place of a convolution.

    Attributes:
        node: the position of the ``Conv`` or ``ConvTranspose`` in the nodes of the main graph.
        module: what it was rewritten to: a Sequential of convolutions, or a SumOfBranches of such Sequentials.
        batch_norm: the position of the BatchNormalization that is folded into it and removed, or None.
        pads: zeros that the original adds around its input besides the module's own padding, in ONNX's order (all begins,
            then all ends); empty where there are none.
        auto_pad: SAME_UPPER or SAME_LOWER, where the zeros depend on the size of the input; empty otherwise.
        weight_type: ONNX's number of the type that the original's weight had in a run, for weights that the file does not store
            as they are; 0 for others.
    """

    node: int
    module: nn.Module
    batch_norm: int | None = None
    pads: tuple[int, ...] = ()
    auto_pad: str = ""
    weight_type: int = 0
