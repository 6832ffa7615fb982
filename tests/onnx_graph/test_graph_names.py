"""Names of a graph are any text: nothing of it reaches source code, and the user still reads the name."""

import ast
import keyword
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_texts import drawn, made_of, noise, require_equal, told
from torch import fx, nn

from convrewrite.inputs import parameter_names
from convrewrite.names import require_names
from convrewrite.onnx_graph import read_network
from convrewrite.onnx_graph.names import LONGEST, identifier, name_of_node

HOSTILE = (
    "'); open('marker', 'w'); ('", '"""', "a\nimport os\nos.abort()", "\\", "__class__", "__init__",
    "forward", "self",
    "training", "train", "graph", "code", "meta",
    "import", "None", "ä" * 3, "名前", "\x1b[31m", "a.b.c", "a/b:c;d", "0", "-", "", " ", "x" * 5000,
    "\N{FULLWIDTH LATIN SMALL LETTER A}", "\u202ereversed", "_modules", "{0}", "%s", "relu_1",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_an_identifier_is_harmless(text: str) -> None:
    found = identifier(text, "part", ())
    assert found.isidentifier()
    assert found.isascii()
    assert not keyword.iskeyword(found)
    assert not hasattr(fx.GraphModule(nn.Module(), fx.Graph()), found)
    assert not found.startswith("_")
    assert len(found) <= LONGEST + 2
    holder = nn.Module()
    holder.add_module(found, nn.ReLU())
    require_names(holder, "here")


def test_identifiers_keep_what_can_be_read() -> None:
    assert identifier("backbone.layer1.0/conv", "part", ()) == "backbone_layer1_0_conv"
    assert identifier("", "part", ()) == "part"
    assert identifier("7up", "part", ()) == "n_7up"
    assert identifier("train", "part", ()) == "n_train"


def test_identifiers_are_unlike_those_that_are_taken() -> None:
    taken: list[str] = []
    for text in ("a.b", "a/b", "a_b", "a_b_2", "a-b"):
        taken.append(identifier(text, "part", taken))
    assert taken[:3] == ["a_b", "a_b_2", "a_b_3"]
    assert len(set(taken)) == 5
    long = [identifier("x" * 100, "part", ()), identifier("x" * 100, "part", ("x" * LONGEST,))]
    assert len(set(long)) == 2


@pytest.mark.parametrize(("inputs", "name", "expected"), [
    (["x", "layer1.0.conv.weight"], "/Conv", "layer1_0_conv"), (["x", "model/conv/kernel"], "n", "model_conv"),
    (["x", "conv2d_3.w_0"], "", "conv2d_3"), (["x", "347"], "backbone/Conv", "backbone_Conv"), (["x", "347"], "", "conv_5"),
    (["x"], "", "conv_5"), (["x", ".weight"], "own", "own"),
])  # fmt: skip
def test_a_node_is_called_after_its_weight(inputs: list[str], name: str, expected: str) -> None:
    assert name_of_node(helper.make_node("Conv", inputs, ["y"], name=name), 5, ()) == expected


def hostile_graph(first: str, second: str) -> onnx.ModelProto:
    """Two inputs, values, weights, nodes and outputs of such names; the two are the same text with other ends."""

    def named(stem: str) -> str:
        return f"{first}{stem}"

    nodes = [
        helper.make_node("Conv", [named("in"), named("w")], [named("a")], name=named("node")),
        helper.make_node("Conv", [second, named("w")], [named("b")], name=named("node_2")),
        helper.make_node("Add", [named("a"), named("b")], [named("c")], name=named("add")),
        helper.make_node("CumSum", [named("c"), named("axis")], [named("out")], name=second),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 8]) for name in (named("in"), second)]
    result = helper.make_tensor_value_info(named("out"), TensorProto.FLOAT, ["N", 4, 6, 6])
    weights = [
        numpy_helper.from_array(drawn((4, 3, 3, 3)), named("w")),
        helper.make_tensor(named("axis"), TensorProto.INT64, [], [1]),
    ]
    graph = helper.make_graph(nodes, named("graph"), values, [result], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text], ids=range(len(HOSTILE) - 1))
def test_nothing_of_a_graph_reaches_source(text: str, tmp_path: Path) -> None:
    module = made_of(hostile_graph(text, text), tmp_path)
    tree = ast.parse(module.code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert all(name.isascii() and len(name) <= LONGEST + 20 for name in names)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    require_names(module, "here")
    assert parameter_names(module) == (f"{text}in", text), "what the user calls them by"
    assert list(module(*noise(2, 2, 3, 8, 8))) == [f"{text}out"]
    require_equal(module, noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1))


def test_inputs_whose_identifiers_are_alike_stay_apart(tmp_path: Path) -> None:
    module = made_of(hostile_graph("a/", "a.in"), tmp_path)
    assert parameter_names(module) == ("a/in", "a.in")
    a, b = noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    require_equal(module, a, b)
    assert told(module).opened.session.input_names == ("a/in", "a.in")


def test_hostile_names_go_through_the_checks_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(hostile_graph("'); raise SystemExit; ('", "\n"), str(path))
    network = read_network(path, {"\n": torch.ones(1, 3, 8, 8)})
    assert bool((network.inputs[1] == 1).all())
    require_equal(network.module, *network.inputs)
