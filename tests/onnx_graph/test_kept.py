import re
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_surgery_cases import file_of, model_of, numbers, run, tensor, value

from convrewrite.conv import ConvSpec, Cost
from convrewrite.onnx_graph import kept as kept_module
from convrewrite.onnx_graph import scopes, small_constants
from convrewrite.onnx_graph.kept import KeptConv, kept_convolutions

W = numbers(8, 4, 3, 3)
BYTES = np.ones((8, 4, 3, 3), np.int8)
SPEC = ConvSpec(4, 8, (3, 3), bias=False)
SIZES = {"x": (1, 4, 9, 10)}
COST = Cost(8 * 4 * 9, 7 * 8 * 8 * 4 * 9)


def branch(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = (), out: str = "m") -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [value(out)], list(weights))


def in_both_branches(inner: onnx.GraphProto) -> onnx.NodeProto:
    other = branch(helper.make_node("Identity", ["x"], ["m"]))
    return helper.make_node("If", ["yes"], ["y"], "choice", then_branch=inner, else_branch=other)


YES = tensor("yes", np.array(True))


def only(model: onnx.ModelProto, **sizes: tuple[int, ...]) -> KeptConv:
    (found,) = kept_convolutions(file_of(model), SIZES | sizes)
    assert re.fullmatch("[A-Za-z0-9_]+", found.name)
    return found


def test_what_can_become_a_site_is_not_kept() -> None:
    nodes = [
        helper.make_node("Identity", ["w"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"]),
        helper.make_node("ConvTranspose", ["y", "w"], ["z"]),
    ]
    assert kept_convolutions(file_of(model_of(nodes, [tensor("w", W)], None, [value("z")])), SIZES) == ()


def test_the_branch_of_an_if_sees_the_graph_around_it() -> None:
    inner = branch(
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["m"], "my/conv", pads=[0, 0, 0, 0]),
    )
    found = only(model_of([in_both_branches(inner)], [tensor("w", W), YES]))
    assert (found.name, found.op_type, found.spec, found.input_sizes) == ("choice_my_conv", "Conv", SPEC, ((9, 10),))
    assert found.cost == COST
    assert found.reason == (
        "inside of the If choice, which stays as it is; export the model without it, or make its condition a constant and "
        "simplify the model first"
    )


def test_the_example_run_tells_what_cannot_be_inferred() -> None:
    inner = branch(helper.make_node("Conv", ["r", "w"], ["m"]))
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), in_both_branches(inner)]
    given = [value("x", ["n", 4, 9, 10]), value("shape", [4], TensorProto.INT64)]
    model = model_of(nodes, [tensor("w", W), YES], given)
    assert only(model).input_sizes == ()
    assert only(model).cost is None
    assert only(model, r=(1, 4, 9, 10)).cost == COST


def test_pads_that_are_computed_from_constants_are_followed() -> None:
    """As torch's older exporter writes F.pad: filled up with zeros, and turned around."""
    inner = branch(
        helper.make_node("Constant", [], ["given"], value=tensor("", np.array([1, 2, 3, 4], np.int64))),
        helper.make_node("ConstantOfShape", ["four"], ["zeros"], value=tensor("", np.array([0], np.int64))),
        helper.make_node("Concat", ["given", "zeros"], ["all"], axis=0),
        helper.make_node("Reshape", ["all", "pairs"], ["rows"]),
        helper.make_node("Slice", ["rows", "end", "start", "axis", "end"], ["reversed"]),
        helper.make_node("Transpose", ["reversed"], ["columns"], perm=[1, 0]),
        helper.make_node("Reshape", ["columns", "flat"], ["pads"]),
        helper.make_node("Pad", ["x", "pads"], ["padded"]),
        helper.make_node("Constant", [], ["k"], value=tensor("", numbers(1, 4, 1, 1))),
        helper.make_node("Conv", ["padded", "k"], ["m"], "conv"),
    )
    integers = {"four": [4], "pairs": [-1, 2], "end": [-1], "start": [-9223372036854775807], "axis": [0], "flat": [-1]}
    model = model_of([in_both_branches(inner)], [YES, *(tensor(n, np.array(v, np.int64)) for n, v in integers.items())])
    x = numbers(1, 4, 9, 10)
    found = only(model)
    assert run(model, x=x)[0].shape == (1, 1, 9 + 3 + 4, 10 + 1 + 2)
    assert found.input_sizes == ((16, 13),) and found.cost == Cost(4, 16 * 13 * 4)


def test_constants_that_would_be_large_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
        made.append(model.graph.node[0].output[0])
        return ReferenceEvaluator(model)

    monkeypatch.setattr(small_constants, "ReferenceEvaluator", evaluator)
    shape, row = tensor("shape", np.array([2**26], np.int64)), tensor("row", np.zeros(100, np.int64))
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("Constant", [], ["w"], value=tensor("", W)),
        helper.make_node("Reshape", ["shape", "shape"], ["never"]),
        helper.make_node("Concat", ["row", "row"], ["rows"], axis=0),
        helper.make_node("Identity", ["shape"], ["same"]),
    ]
    found = small_constants.folded(nodes, {"shape": shape, "row": row}, [helper.make_opsetid("", 17)])
    assert {name: numpy_helper.to_array(one).tolist() for name, one in found.items()} == {"same": [2**26]}
    assert made == ["never", "rows", "same"]


def test_branches_in_branches_have_their_own_weights() -> None:
    innermost = branch(helper.make_node("Conv", ["x", "w"], ["m"], "conv"), weights=(tensor("w", W),))
    outer = branch(helper.make_node("If", ["yes"], ["m"], "inner", then_branch=innermost, else_branch=innermost))
    first, second = kept_convolutions(file_of(model_of([in_both_branches(outer)], [YES])), SIZES)
    assert (first.name, second.name) == ("choice_inner_conv", "choice_inner_conv_2")
    assert first.cost == second.cost == COST
    assert first.reason.startswith("inside of the If inner, ")


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_bodies_begin_with_what_they_are_given(op_type: str) -> None:
    weights = [tensor("w", numbers(4, 4, 3, 3)), tensor("times", np.array(2, np.int64)), YES]
    conv = helper.make_node("Conv", ["state", "w"], ["next"], "conv", pads=[1, 1, 1, 1])
    state, following = value("state", ["a", "b", "c", "d"]), value("next")
    if op_type == "Loop":
        nodes = [conv, helper.make_node("Identity", ["go"], ["on"])]
        entries = [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), state]
        body = helper.make_graph(nodes, "body", entries, [value("on", [], TensorProto.BOOL), following])
        node = helper.make_node("Loop", ["times", "yes", "x"], ["y"], "again", body=body)
    else:
        body = helper.make_graph([conv], "body", [state], [following])
        node = helper.make_node("Scan", ["stack"], ["y"], "again", body=body, num_scan_inputs=1, scan_input_axes=[3])
    model = model_of([node], weights, [value("x", [1, 4, 9, 10]), value("stack", [1, 4, 9, 5, 10])])
    found = only(model, stack=(1, 4, 9, 5, 10))
    assert found.cost == Cost(4 * 4 * 9, 9 * 10 * 4 * 4 * 9)
    assert (
        found.reason == f"inside of the {op_type} again, which stays as it is; export the model with the loop unrolled"
    )


def functions() -> tuple[onnx.FunctionProto, ...]:
    """Block calls Layer, whose stride is an attribute."""
    conv = helper.make_node("Conv", ["a", "k"], ["b"], "conv")
    conv.attribute.add(name="strides", ref_attr_name="step", type=onnx.AttributeProto.INTS)
    conv.attribute.add(name="dilations", ref_attr_name="spread", type=onnx.AttributeProto.INTS)
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    layer = helper.make_function("own", "Layer", ["a", "k"], ["b"], [conv], opset, ["step", "spread"])
    call = helper.make_node("Layer", ["p", "k"], ["q"], "layer", domain="own", step=[2, 2])
    nodes = [helper.make_node("Relu", ["a"], ["p"]), call]
    return layer, helper.make_function("own", "Block", ["a", "k"], ["q"], nodes, opset)


def calling(*names: str) -> onnx.ModelProto:
    values = ["x", *(f"v{number}" for number in range(len(names) - 1)), "y"]
    nodes = [
        helper.make_node("Block", [values[number], "w"], [values[number + 1]], name, domain="own")
        for number, name in enumerate(names)
    ]
    domains = [helper.make_opsetid("own", 1)]
    return model_of(nodes, [tensor("w", numbers(4, 4, 3, 3))], domains=domains, functions=functions(), ir_version=8)


def test_a_function_is_there_once_for_each_call() -> None:
    first, second = kept_convolutions(file_of(calling("one", "two")), SIZES)
    assert (first.name, second.name) == ("one_layer_conv", "two_layer_conv")
    assert first.spec == second.spec == ConvSpec(4, 4, (3, 3), (2, 2), bias=False)
    assert (first.input_sizes, second.input_sizes) == (((9, 10),), ((4, 4),))
    assert first.reason.startswith(
        "inside of the function Layer (called by layer), which stays as it is; inline the functions"
    )
    x = numbers(1, 4, 9, 10)
    assert run(calling("one", "two"), x=x)[0].shape == (1, 4, 1, 1)


def test_what_a_call_leaves_out_a_function_has_a_default_for() -> None:
    model = calling("one")
    model.functions[0].attribute_proto.add().CopyFrom(helper.make_attribute("spread", [2, 1]))
    (found,) = kept_convolutions(file_of(model), SIZES)
    assert found.spec is not None and (found.spec.stride, found.spec.dilation) == ((2, 2), (2, 1))


def test_a_function_sees_small_constants_that_it_is_given() -> None:
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    nodes = [helper.make_node("Reshape", ["a", "to"], ["b"]), helper.make_node("Conv", ["b", "k"], ["c"], "conv")]
    made = helper.make_function("own", "Turn", ["a", "k", "to"], ["c"], nodes, opset)
    node = helper.make_node("Turn", ["x", "w", "shape"], ["y"], "turn", domain="own")
    weights = [tensor("w", W), tensor("shape", np.array([1, 4, 10, 9], np.int64))]
    assert only(model_of([node], weights, domains=opset[1:], functions=[made])).input_sizes == ((10, 9),)


def test_functions_that_call_each_other_without_end_are_left() -> None:
    model = calling("one")
    model.functions[0].node.add(op_type="Block", domain="own", input=["b", "k"], output=["again"], name="back")
    found = kept_convolutions(file_of(model), SIZES)
    assert 1 < len(found) <= 64
    assert len({one.name for one in found}) == len(found)


def test_functions_that_multiply_are_followed_up_to_a_limit() -> None:
    """Ten calls in each of nine layers: a thousand million convolutions."""
    opset = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    bodies = [[helper.make_node("Conv", ["a", "k"], ["b"], "conv")]]
    for layer in range(9):
        call = [helper.make_node(f"F{layer}", ["a", "k"], ["b"], f"n{i}", domain="own") for i in range(10)]
        for number, node in enumerate(call[:-1]):
            node.output[0] = f"v{number}"
        bodies.append(call)
    made = [helper.make_function("own", f"F{n}", ["a", "k"], ["b"], body, opset) for n, body in enumerate(bodies)]
    node = helper.make_node("F9", ["x", "w"], ["y"], domain="own")
    model = model_of([node], [tensor("w", W)], domains=opset[1:], functions=made)
    found = kept_convolutions(file_of(model), SIZES)
    assert 1000 < len(found) < scopes.MOST_CALLS
    assert {one.cost for one in found} == {COST}


@pytest.mark.parametrize(
    ("op_type", "domain"), [("QLinearConv", ""), ("QLinearConv", "com.microsoft"), ("ConvInteger", "")]
)
def test_operators_on_whole_numbers(op_type: str, domain: str) -> None:
    integers = [tensor("w", BYTES), tensor("s", np.array(1, np.float32)), tensor("z", np.array(0, np.int8))]
    scaled = ["s", "z"]
    inputs = ["x", "w"] if op_type == "ConvInteger" else ["x", *scaled, "w", *scaled, *scaled]
    more: dict[str, Any] = {"channels_last": 1} if domain else {}
    node = helper.make_node(op_type, inputs, ["y"], "quick", domain=domain, **more)
    shape = (1, 9, 10, 4) if domain else (1, 4, 9, 10)
    found = only(model_of([node], integers, [value("x", shape, TensorProto.INT8)]), x=shape)
    assert (found.spec, found.cost) == (SPEC, COST)
    assert found.reason.startswith("quantised already, ") and found.reason.endswith("then quantise the result")


def test_quantised_ones_inside_of_a_branch_are_quantised_first_of_all() -> None:
    inner = branch(helper.make_node("ConvInteger", ["bytes", "w"], ["m"], "conv"))
    model = model_of([in_both_branches(inner)], [tensor("w", BYTES), tensor("bytes", BYTES[:, :, :, :]), YES])
    assert only(model).reason == kept_module.QUANTISED


def test_float_convolutions_between_whole_numbers() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"]),
        helper.make_node("Identity", ["f"], ["g"]),
        helper.make_node("Conv", ["x", "g"], ["y"], "conv"),
    ]
    found = only(model_of(nodes, [tensor("w", BYTES), tensor("s", np.array(1, np.float32))]))
    assert (found.spec, found.cost) == (SPEC, COST)
    assert found.reason.startswith("quantised already, ")


@pytest.mark.parametrize("op_type", ["FusedConv", "NhwcFusedConv"])
def test_what_onnxruntime_fused(op_type: str) -> None:
    node = helper.make_node(op_type, ["x", "w"], ["y"], domain="com.microsoft", activation="Relu")
    shape = (1, 4, 9, 10) if op_type == "FusedConv" else (1, 9, 10, 4)
    found = only(model_of([node], [tensor("w", W)], [value("x", shape)]), x=shape)
    assert (found.name, found.spec, found.cost) == ("y", SPEC, COST)
    assert "as it was before onnxruntime optimised it" in found.reason


def test_a_layout_that_is_not_known_has_no_geometry() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft.nchwc")
    found = only(model_of([node], [tensor("w", W)]))
    assert (found.spec, found.input_sizes, found.cost) == (None, (), None)


def test_weights_computed_from_the_input() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["w", "mean"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["y"], "conv"),
        helper.make_node("Conv", ["x", "w"], ["z"], "plain"),
    ]
    model = model_of(nodes, [tensor("w", W)], None, [value("y"), value("z")])
    found = only(model)
    assert (found.name, found.spec, found.cost, found.reason) == ("conv", SPEC, COST, kept_module.COMPUTED)


def test_what_no_input_changes() -> None:
    nodes = [
        helper.make_node("Conv", ["learned", "w"], ["m"], "conv"),
        helper.make_node("Add", ["x", "m"], ["y"]),
        helper.make_node("Conv", ["y", "w"], ["z"], "plain"),
    ]
    weights = [tensor("w", W), tensor("learned", np.ones((1, 4, 9, 10), np.float32))]
    model = model_of(nodes, weights, None, [value("z")])
    found = only(model, learned=(1, 4, 9, 10))
    assert (found.name, found.reason) == ("conv", kept_module.CONSTANT)


def test_weights_computed_inside_of_a_branch_from_the_input() -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0)
    inner = branch(mean, helper.make_node("Mul", ["w", "mean"], ["m"]))
    nodes = [
        helper.make_node("If", ["yes"], ["v"], then_branch=inner, else_branch=inner),
        helper.make_node("Conv", ["x", "v"], ["y"], "conv"),
    ]
    found = only(model_of(nodes, [tensor("w", W), YES]))
    assert (found.spec, found.reason) == (SPEC, kept_module.COMPUTED)


def test_whoever_knows_the_sites_learns_of_all_others() -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], [name], name) for name in ("a", "b", "c")]
    file = file_of(model_of(nodes, [tensor("w", W)], None, [value(name) for name in ("a", "b", "c")]))
    found = kept_convolutions(file, SIZES, sites=[0, 2])
    assert [(one.name, one.reason) for one in found] == [("b", kept_module.OPAQUE)]
    assert kept_convolutions(file, SIZES, sites=range(3)) == ()
    found = kept_convolutions(file, SIZES, sites=[0, 2], judged=["a", "c"])
    assert [(one.name, one.reason) for one in found] == [("b", kept_module.BEHIND)]


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_hold_no_numbers_are_told(number: float, dtype: Any) -> None:
    bad = W.astype(dtype)
    bad[1, 2, 0, 0] = number
    model = model_of([helper.make_node("Conv", ["x", "w"], ["y"], "conv")], [tensor("w", bad)])
    (found,) = kept_convolutions(file_of(model), SIZES, sites=())
    assert found.reason == kept_module.BROKEN


def test_what_no_output_depends_on_is_never_run() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], "live"),
        helper.make_node("Conv", ["x", "w"], ["a"], "dead"),
        helper.make_node("DequantizeLinear", ["bytes", "scale"], ["v"]),
        helper.make_node("Conv", ["x", "v"], ["b"], "dead_quantised"),
    ]
    weights = [tensor("w", W), tensor("bytes", BYTES), tensor("scale", np.array(1, np.float32))]
    found = kept_convolutions(file_of(model_of(nodes, weights)), SIZES, sites=[0])
    assert [(one.name, one.spec, one.input_sizes, one.cost) for one in found] == [
        ("dead", SPEC, (), None), ("dead_quantised", SPEC, (), None),
    ]  # fmt: skip
    assert {one.reason for one in found} == {kept_module.UNUSED}


GEOMETRIES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("Conv", (1, 4, 9, 10), (8, 2, 3, 5), {"group": 2, "strides": [2, 1], "pads": [1, 2, 1, 2]}),
    ("Conv", (1, 4, 9, 10), (8, 4, 3, 3), {"pads": [0, 1, 2, 0], "dilations": [1, 2]}),
    ("Conv", (1, 4, 9, 10), (8, 4, 2, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ("Conv", (1, 4, 9, 10), (8, 4, 4, 3), {"auto_pad": "SAME_LOWER"}),
    ("Conv", (1, 4, 9, 10), (8, 4, 4, 3), {"auto_pad": "VALID"}),
    ("Conv", (1, 4, 11), (8, 4, 3), {"pads": [1, 0], "strides": [2]}),
    ("Conv", (1, 4, 5, 6, 7), (8, 4, 3, 2, 3), {"pads": [1, 0, 1, 1, 0, 1], "strides": [1, 2, 1]}),
    ("Conv", (1, 4, 5, 6, 7), (8, 4, 3, 2, 3), {"pads": [0, 0, 1, 2, 1, 1]}),
]


@pytest.mark.parametrize(("op_type", "source", "weight", "attributes"), GEOMETRIES)
def test_multiplications_are_those_of_the_output_that_onnxruntime_gives(
    op_type: str, source: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    axes = ["h", "w", "d"][: len(source) - 2]
    ends = [value("x", source)], [value("y", ["n", "c", *axes])]
    node = helper.make_node(op_type, ["x", "k"], ["y"], **attributes)
    model = model_of([node], [tensor("k", numbers(*weight))], *ends)
    (found,) = kept_convolutions(file_of(model), {"x": source}, sites=())
    output = run(model, x=numbers(*source))[0]
    assert found.cost == Cost(int(np.prod(weight)), output[0, 0].size * int(np.prod(weight)))


@pytest.mark.parametrize(
    ("rows", "examples", "counted"), [(6, 2, 3), (6, 1, 6), (2, 2, 1), (1, 2, 1), (2**40, 1, 4096)]
)
def test_every_row_of_an_example_is_counted(rows: int, examples: int, counted: int) -> None:
    inner = branch(helper.make_node("Conv", ["x", "w"], ["m"]))
    model = model_of([in_both_branches(inner)], [tensor("w", W), YES])
    (found,) = kept_convolutions(file_of(model), {"x": (rows, 4, 9, 10)}, examples=examples)
    assert found.cost == Cost(COST.parameters, counted * COST.macs)


def test_a_stride_beyond_the_kernel_takes_no_padding() -> None:
    node = helper.make_node("Conv", ["x", "k"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    model = model_of([node], [tensor("k", numbers(8, 4, 1, 1))])
    (found,) = kept_convolutions(file_of(model), SIZES, sites=())
    assert found.input_sizes == ((9, 10),) and found.cost == Cost(32, 5 * 5 * 32)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"output_shape": [9, 10]}, kept_module.CUT_UNEVENLY),
        ({"auto_pad": "SAME_UPPER"}, kept_module.CUT_UNEVENLY),
        ({"pads": [0, 0, 1, 1]}, kept_module.CUT_UNEVENLY),
        ({"pads": [1, 0, 1, 0], "auto_pad": "NOTSET"}, kept_module.OPAQUE),
    ],
)
def test_a_transposed_one_that_torch_cannot_cut_says_so(attributes: dict[str, Any], reason: str) -> None:
    node = helper.make_node("ConvTranspose", ["x", "k"], ["y"], **attributes)
    (found,) = kept_convolutions(file_of(model_of([node], [tensor("k", numbers(4, 3, 3, 3))])), SIZES, sites=())
    assert found.reason == reason


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_transposed_one_multiplies_at_each_place_of_its_input(axes: int) -> None:
    source, weight = (1, 4, *(5, 6, 7)[:axes]), (4, 3, *(3, 2, 3)[:axes])
    attributes = {"group": 2, "strides": [2] * axes, "pads": [1, *[0] * (2 * axes - 1)], "output_padding": [1] * axes}
    node = helper.make_node("ConvTranspose", ["x", "k", "b"], ["y"], **attributes)
    weights = [tensor("k", numbers(*weight)), tensor("b", numbers(6))]
    (found,) = kept_convolutions(file_of(model_of([node], weights, [value("x", source)])), {"x": source}, sites=())
    assert found.spec is not None and found.spec.bias and found.spec.groups == 2
    assert (found.spec.in_channels, found.spec.out_channels, found.spec.transposed) == (4, 6, True)
    macs = int(np.prod(source[2:])) * int(np.prod(weight))
    assert found.cost == Cost(int(np.prod(weight)) + 6, macs)


BAD: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({"group": 0}, (8, 4, 3, 3)),
    ({"group": 3}, (8, 4, 3, 3)),
    ({"group": "two"}, (8, 4, 3, 3)),
    ({"strides": [1]}, (8, 4, 3, 3)),
    ({"strides": [0, 1]}, (8, 4, 3, 3)),
    ({"dilations": ["a", "b"]}, (8, 4, 3, 3)),
    ({}, (8, 5, 3, 3)),
    ({}, (8, 4)),
    ({}, (8, 4, 0, 3)),
]


@pytest.mark.parametrize(("attributes", "weight"), BAD)
def test_numbers_that_do_not_fit_have_no_geometry(attributes: dict[str, Any], weight: tuple[int, ...]) -> None:
    node = helper.make_node("Conv", ["x", "k"], ["y"], **attributes)
    model = model_of([node], [tensor("k", np.zeros(weight, np.float32))])
    (found,) = kept_convolutions(file_of(model), SIZES, sites=())
    assert (found.spec, found.input_sizes) == (None, ())


def test_a_kernel_that_does_not_fit_in_has_no_size() -> None:
    model = model_of([helper.make_node("Conv", ["x", "k"], ["y"])], [tensor("k", numbers(8, 4, 3, 11))])
    (found,) = kept_convolutions(file_of(model), SIZES, sites=())
    assert found.spec is not None and found.input_sizes == () and found.cost is None


def test_names_are_harmless_and_different() -> None:
    given = ["a.b/c:0", "a_b_c_0", "\n\x1b[31m", "ü", "x" * 500, "x" * 500 + "y"]
    nodes = [helper.make_node("Conv", ["x", "k"], [f"o{number}"], name) for number, name in enumerate(given)]
    found = kept_convolutions(file_of(model_of(nodes, [tensor("k", W)])), SIZES, sites=())
    names = [one.name for one in found]
    assert names[:4] == ["a_b_c_0", "a_b_c_0_2", "31m", "Conv"]
    assert all(re.fullmatch("[A-Za-z0-9_]{1,130}", name) for name in names) and len(set(names)) == len(names)
