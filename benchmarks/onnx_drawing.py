"""Small ONNX graphs by hand: nodes one after the other, weights drawn from a seed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

OPSET, IR = 17, 8
"""Versions of operators and of the file where a graph asks for no others; both are old enough for any runtime in use."""

Sizes = Sequence[int | str | None]
"""Sizes of axes: a number, the name of a free one, or None."""


class Drawing:
    """A graph as it is drawn. Every node returns the name of its output, for the next one to take.

    Args:
        opset: version of the standard operators.
        constants: weights are given by Constant nodes, not initialisers.
        as_inputs: initialisers are inputs of the graph as well, as files of IR version 3 have to list them.
        dtype: of weights.
        prefix: begins the names of nodes and values.
    """

    def __init__(
        self,
        opset: int = OPSET,
        *,
        constants: bool = False,
        as_inputs: bool = False,
        dtype: type[np.floating[Any]] = np.float32,
        prefix: str = "",
        seed: int = 0,
    ) -> None:
        self.opset, self.constants, self.as_inputs, self.dtype, self.prefix = opset, constants, as_inputs, dtype, prefix
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self._count = 0

    def name(self, stem: str) -> str:
        self._count += 1
        return f"{self.prefix}{stem}_{self._count}"

    def node(self, op_type: str, *inputs: str, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its first output."""
        name = self.name(op_type)
        made = list(outputs) or [f"{name}_out"]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0]

    def weight(self, stem: str, array: NDArray[Any]) -> str:
        """A constant, as an initialiser or from a Constant node."""
        name = self.name(stem)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        if self.constants:
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}_constant", value=tensor))
        else:
            self.initialisers.append(tensor)
        return name

    def whole(self, *numbers: int) -> str:
        """Whole numbers: shapes, axes."""
        return self.weight("numbers", np.array(numbers, np.int64))

    def drawn(self, stem: str, shape: Sequence[int], *, fan: int = 1) -> str:
        """Normal weights that keep the scale of what comes in from ``fan`` numbers."""
        return self.weight(stem, (self.random.normal(size=tuple(shape)) * np.sqrt(2 / fan)).astype(self.dtype))

    def conv(
        self,
        x: str,
        channels: tuple[int, int],
        kernel: Sequence[int],
        *,
        bias: bool = True,
        groups: int = 1,
        **attributes: Any,
    ) -> str:
        """A Conv from so many channels to so many, padded to keep the size unless attributes say how."""
        before, after = channels
        shape = (after, before // groups, *kernel)
        weights = [self.drawn("kernel", shape, fan=int(np.prod(shape[1:])))]
        if bias:
            weights.append(self.weight("bias", self.random.normal(0, 0.1, after).astype(self.dtype)))
        if "pads" not in attributes and "auto_pad" not in attributes:
            attributes["pads"] = [size // 2 for size in kernel] * 2
        return self.node("Conv", x, *weights, group=groups, kernel_shape=list(kernel), **attributes)

    def batch_norm(self, x: str, channels: int) -> str:
        """A BatchNormalization that does something, as after training."""
        draw = self.random
        values = (
            draw.uniform(0.5, 1.5, channels),
            *draw.normal(0, 0.1, (2, channels)),
            draw.uniform(0.5, 1.5, channels),
        )
        names = [self.weight(stem, value.astype(self.dtype)) for stem, value in zip(STATISTICS, values, strict=True)]
        return self.node("BatchNormalization", x, *names, epsilon=1e-5)

    def dense(self, x: str, inputs: int, outputs: int) -> str:
        """MatMul and Add, as converters write a dense layer."""
        product = self.node("MatMul", x, self.drawn("matrix", (inputs, outputs), fan=inputs))
        return self.node("Add", product, self.weight("offset", self.random.normal(0, 0.1, outputs).astype(self.dtype)))

    def graph(self, name: str, inputs: Mapping[str, Sizes], outputs: Mapping[str, Sizes | None]) -> onnx.GraphProto:
        """The graph between these inputs and outputs; an output of None has any rank."""
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        given = [helper.make_tensor_value_info(key, element, list(sizes)) for key, sizes in inputs.items()]
        if self.as_inputs:
            given += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in self.initialisers]
        results = [helper.make_tensor_value_info(key, element, sizes) for key, sizes in outputs.items()]
        return helper.make_graph(self.nodes, name, given, results, self.initialisers)

    def model(
        self,
        name: str,
        inputs: Mapping[str, Sizes],
        outputs: Mapping[str, Sizes | None],
        *,
        ir: int = IR,
        functions: Sequence[onnx.FunctionProto] = (),
    ) -> onnx.ModelProto:
        """The whole file."""
        domains = {"": self.opset, **{function.domain: 1 for function in functions}}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        graph = self.graph(name, inputs, outputs)
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=ir, functions=list(functions), producer_name="handmade"
        )


STATISTICS = ("gamma", "beta", "mean", "variance")
"""Stems of the inputs of a BatchNormalization, in their order; the mean comes after scale and offset."""
