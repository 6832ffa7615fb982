"""What operators are made of: modules that the pipeline knows, with gradients, without sizes of an example; or nothing."""

import operator
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_nodes import call, checked, make, one_node, view_of
from torch import Tensor, nn

from convrewrite.graph.tracing import trace
from convrewrite.modules import Operator
from convrewrite.onnx_graph.file import NodeView
from convrewrite.onnx_graph.operators import OPERATORS, Computed

IMAGE = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)


def made(
    op: str, opset: int, *inputs: Any, constants: tuple[int, ...] = (), outputs: int = 1, **attributes: Any
) -> Any:
    model, values = one_node(op, opset, inputs, attributes, outputs)
    node = model.graph.node[0]
    return make(view_of(node, opset, values, constants), op)


def test_the_pipeline_knows_what_it_looks_for() -> None:
    assert type(made("Relu", 13, IMAGE)) is nn.ReLU
    assert made("Add", 13, IMAGE, IMAGE) is operator.add
    assert made("Sum", 13, IMAGE, IMAGE) is operator.add
    assert type(made("Identity", 13, IMAGE)) is nn.Identity
    assert type(made("Dropout", 13, IMAGE, np.array(0.5, np.float32), constants=(1,))) is nn.Identity
    pool = made("MaxPool", 12, IMAGE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    assert type(pool) is nn.MaxPool2d
    assert type(made("AveragePool", 12, IMAGE, kernel_shape=[2, 2])) is nn.AvgPool2d
    assert isinstance(made("Add", 13, IMAGE, IMAGE, constants=(1,)), Operator)
    assert isinstance(made("Sum", 13, IMAGE, IMAGE, IMAGE), Operator)


OPAQUE = {
    "the places of maxima": ("MaxPool", 12, [IMAGE], {"kernel_shape": [2, 2]}, 2),
    "padding as wide as the window": ("MaxPool", 12, [IMAGE], {"kernel_shape": [2, 2], "pads": [2, 2, 0, 0]}, 1),
    "an unknown way to pad": ("AveragePool", 12, [IMAGE], {"kernel_shape": [2, 2], "auto_pad": "ODD"}, 1),
    "a window of other dimensions": ("MaxPool", 12, [IMAGE], {"kernel_shape": [2]}, 1),
    "strides of other dimensions": ("MaxPool", 12, [IMAGE], {"kernel_shape": [2, 2], "strides": [2]}, 1),
    "no window": ("MaxPool", 12, [IMAGE], {}, 1),
    "training": ("Dropout", 13, [IMAGE, np.array(0.5, np.float32), np.array(True)], {}, 1),
    "no order": ("TopK", 11, [IMAGE, np.array([1])], {"sorted": 0}, 2),
    "text": ("Cast", 13, [IMAGE], {"to": 8}, 1),
    "numbers of four bits": ("Cast", 21, [IMAGE], {"to": 22}, 1),
    "a crop": ("Resize", 13, [IMAGE, None, np.ones(4, np.float32)],
               {"coordinate_transformation_mode": "tf_crop_and_resize"}, 1),
    "an unknown mode": ("Resize", 13, [IMAGE, None, np.ones(4, np.float32)], {"mode": "odd"}, 1),
    "an unknown padding": ("Pad", 13, [IMAGE, np.zeros(8, np.int64)], {"mode": "odd"}, 1),
    "edges cut off": ("Pad", 13, [IMAGE, np.array([0, 0, -1, 0, 0, 0, 0, 0])], {"mode": "edge"}, 1),
    "another step": ("RNN", 14, [IMAGE[0], IMAGE[:1, 0], IMAGE[:1, 0]], {"activations": ["Affine"], "hidden_size": 6}, 1),
    "computed weights": ("LSTM", 14, [IMAGE[0], IMAGE[:1, 0], IMAGE[:1, 0]], {"hidden_size": 3}, 1),
    "more than is computed": ("Sigmoid", 13, [IMAGE], {}, 2),
    "attention to neighbours alone": ("Attention", 25, [IMAGE, IMAGE, IMAGE], {"left_window_size": 0}, 1),
    "attention that goes on": ("Attention", 23, [IMAGE, IMAGE, IMAGE, None, IMAGE, IMAGE], {}, 1),
    "another norm": ("LpNormalization", 22, [IMAGE], {"p": 3}, 1),
    "a fused function with parameters": ("com.microsoft::FusedGemm", 17, [IMAGE[0, 0], IMAGE[0, 0]], {"activation": "Elu"}, 1),
    "a file that is too old": ("Relu", 6, [IMAGE], {}, 1),
    "no tensor": ("Equal", 19, [np.array(["a"], object), np.array(["b"], object)], {}, 1),
}  # fmt: skip


@pytest.mark.parametrize("what", OPAQUE)
def test_what_is_not_expressible_is_left(what: str) -> None:
    op, opset, inputs, attributes, outputs = OPAQUE[what]
    known = range(1, len(inputs)) if op != "LSTM" else ()
    model, values = one_node(
        op, opset, [i if i is None or i.dtype != object else IMAGE for i in inputs], attributes, outputs
    )
    node = model.graph.node[0]
    values = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
    assert make(view_of(node, opset, values, known), op) is None


ODD = (None, "odd", -1, 2.5, [], [0, -7], ["odd"], torch.zeros(2), "")
ATTRIBUTES = sorted({name for schema in helper.onnx.defs.get_all_schemas() for name in schema.attributes})


@pytest.mark.parametrize("key", sorted(OPERATORS))
def test_no_attribute_makes_a_maker_raise(key: str) -> None:
    for value in ODD:
        for opset in (7, 11, 13, 18, 22):
            given = dict.fromkeys(ATTRIBUTES, value)
            view = NodeView(key.rpartition(":")[2], opset, given, (None, torch.ones(2), None), (True,) * 3, (4, 1, 2))
            thing = OPERATORS[key](view)
            assert thing is None or callable(thing)


def test_a_shape_that_is_computed_follows_its_input() -> None:
    """Shape, Gather, Unsqueeze, Concat, Reshape, as exporters write it: the batch of the example stays nowhere."""
    shape = made("Shape", 13, IMAGE)
    gather = made("Gather", 13, np.array([2, 4]), np.array(0), constants=(1,))
    unsqueeze = made("Unsqueeze", 13, np.array(2), np.array([0]), constants=(1,))
    concat = made("Concat", 13, np.array([2]), np.array([-1]), constants=(1,), axis=0)
    reshape = made("Reshape", 13, IMAGE, np.array([2, -1]))
    for batch in (1, 3):
        x = torch.rand(batch, 4, 6, 6)
        wanted = concat(unsqueeze(gather(shape(x))))
        assert wanted.dtype == torch.int64 and wanted.tolist() == [batch, -1]
        assert torch.equal(reshape(x, wanted), x.flatten(1))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [0, 0, 1, 1], "strides": [2, 2], "ceil_mode": 1}),
        ("Softmax", {"axis": 1}), ("Flatten", {}), ("Transpose", {"perm": [0, 2, 3, 1]}), ("ReduceMean", {"axes": [2, 3]}),
    ],
)  # fmt: skip
def test_what_is_made_for_one_size_serves_another(op: str, attributes: dict[str, Any]) -> None:
    thing = made(op, 11, IMAGE, **attributes)
    larger = np.random.default_rng(1).standard_normal((3, 4, 9, 8)).astype(np.float32)
    model, values = one_node(op, 11, [larger], attributes)
    view = view_of(model.graph.node[0], 11, values)
    again = checked(op, 11, [larger], attributes)
    found, wanted = (call(one, view, model.graph.node[0], values)[0] for one in (thing, again))
    assert torch.equal(found, wanted)


def real(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape)


SMOOTH: list[tuple[str, int, list[Any], dict[str, Any], tuple[int, ...]]] = [
    *((op, 22, [real(2, 3)], {}, ()) for op in (
        "Relu", "Sigmoid", "Tanh", "Exp", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Softplus",
        "Softsign", "Gelu", "Erf", "Abs", "Softmax", "LogSoftmax", "ThresholdedRelu", "ReduceMean", "ReduceMax", "ReduceL2",
        "ReduceLogSumExp", "ReduceProd", "Transpose", "Flatten", "Identity", "LpNormalization",
    )),
    *((op, 13, [real(2, 3), real(2, 3)], {}, ()) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Concat")),
    ("Pow", 13, [real(2, 3), np.array(2)], {}, (1,)),
    ("Clip", 13, [real(2, 3), np.array(-0.5), np.array(0.5)], {}, (1, 2)),
    ("PRelu", 13, [real(2, 3), real(3)], {}, (1,)),
    ("MatMul", 13, [real(2, 3), real(3, 2)], {}, ()),
    ("Gemm", 13, [real(2, 3), real(3, 2), real(2)], {"alpha": 0.5}, ()),
    ("Einsum", 13, [real(2, 3), real(3, 2)], {"equation": "ij,jk->ik"}, ()),
    ("AveragePool", 13, [real(1, 1, 4, 5)], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}, ()),
    ("MaxPool", 13, [real(1, 1, 4, 5)], {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0]}, ()),
    ("GlobalAveragePool", 13, [real(1, 2, 3, 3)], {}, ()),
    ("LpPool", 13, [real(1, 1, 4, 4)], {"kernel_shape": [2, 2]}, ()),
    ("InstanceNormalization", 13, [real(2, 2, 3), real(2), real(2)], {}, (1, 2)),
    ("LayerNormalization", 17, [real(2, 3), real(3), real(3)], {}, (1, 2)),
    ("GroupNormalization", 21, [real(2, 4, 3), real(4), real(4)], {"num_groups": 2}, (1, 2)),
    ("LRN", 13, [real(1, 4, 2, 2)], {"size": 3}, ()),
    *(("Pad", 13, [real(1, 1, 3, 3), np.array([0, 0, 1, 2, 0, 0, 0, 1])], {"mode": mode}, (1,))
      for mode in ("constant", "reflect", "edge")),
    *(("Resize", 18, [real(1, 1, 4, 3), None, np.array([1, 1, factor, 2.0])], {"mode": mode, "antialias": 1}, (2,))
      for mode in ("linear", "cubic") for factor in (0.5, 2.0)),
    ("Resize", 13, [real(1, 1, 3, 3), None, np.array([1, 1, 2.0, 2.0])], {"mode": "nearest"}, (2,)),
    ("Slice", 13, [real(4, 3), np.array([3]), np.array([-9]), np.array([0]), np.array([-2])], {}, (1, 2, 3, 4)),
    ("Gather", 13, [real(3, 3), np.array([0, -1])], {}, (1,)),
    ("GatherND", 13, [real(3, 3), np.array([[0, 1]])], {}, (1,)),
    ("ScatterND", 13, [real(3, 3), np.array([[1]]), real(1, 3)], {}, (1,)),
    ("Where", 13, [real(2, 3) > 0, real(2, 3), real(2, 3)], {}, (0,)),
    ("Attention", 23, [real(1, 2, 3, 2), real(1, 1, 3, 2), real(1, 1, 3, 2)], {"is_causal": 1}, ()),
    ("DepthToSpace", 13, [real(1, 4, 2, 2)], {"blocksize": 2}, ()),
    ("Reshape", 13, [real(2, 3), np.array([3, 2])], {}, (1,)),
    ("LSTM", 14, [real(3, 1, 2), real(2, 12, 2), real(2, 12, 3), real(2, 24)],
     {"hidden_size": 3, "direction": "bidirectional"}, (1, 2, 3)),
    ("GRU", 14, [real(3, 1, 2), real(1, 9, 2), real(1, 9, 3)], {"hidden_size": 3}, (1, 2)),
]  # fmt: skip


@pytest.mark.parametrize("node", SMOOTH, ids=[f"{node[0]}-{i}" for i, node in enumerate(SMOOTH)])
def test_gradients_are_those_of_the_function(node: tuple[str, int, list[Any], dict[str, Any], tuple[int, ...]]) -> None:
    op, opset, inputs, attributes, constants = node
    thing = made(op, opset, *inputs, constants=constants, **attributes)
    given = [torch.from_numpy(x).requires_grad_() for i, x in enumerate(inputs) if x is not None and i not in constants]
    assert torch.autograd.gradcheck(thing, given)


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [("LpNormalization", 22, {"p": 2}), ("LpPool", 22, {"kernel_shape": [2, 2]}), ("GlobalLpPool", 22, {}),
     ("ReduceL2", 11, {"axes": [1]}), ("InstanceNormalization", 22, {}), ("LRN", 13, {"size": 3})],
)  # fmt: skip
def test_where_a_rectifier_left_nothing_gradients_are_numbers(op: str, opset: int, attributes: dict[str, Any]) -> None:
    more = [np.ones(4), np.ones(4)] if op == "InstanceNormalization" else []
    thing = made(op, opset, IMAGE, *more, constants=(1, 2), **attributes)
    x = torch.zeros(1, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    thing(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


class Chain(nn.Module):
    """Made things one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = made("Relu", 13, IMAGE)
        self.clip = made("Clip", 13, IMAGE, np.array(0.0, np.float32), np.array(6.0, np.float32), constants=(1, 2))
        self.scale = made("Mul", 13, IMAGE, np.array([2.0], np.float32), constants=(1,))

    def forward(self, x: Tensor) -> Tensor:
        """Both branches joined."""
        return self.scale(operator.add(self.relu(x), self.clip(x)))


def test_a_graph_with_operators_is_followed_whole_each_being_one_node() -> None:
    model = Chain()
    graph = trace(model).whole
    assert graph is not None
    assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == ["relu", "clip", "scale"]
    x = torch.rand(3, 4, 5, 5) * 9
    assert torch.equal(graph(x), 2 * (x + x.clamp(0, 6)))
    assert [name for name, _ in model.named_buffers()] == ["scale.constant_1"]


def test_a_module_says_what_it_computes() -> None:
    assert repr(made("Softmax", 13, IMAGE, axis=2)) == "Computed(softmax, axis=2)"
    assert isinstance(made("Softmax", 13, IMAGE), Computed)
