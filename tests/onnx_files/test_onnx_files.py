"""ONNX files from elsewhere: no library is loaded for them, and nothing outside their folder is read."""

from pathlib import Path

import onnx
import pytest
import torch
from commands import call
from onnx import TensorProto, helper
from safetensors.torch import save_file

import convrewrite
from convrewrite.errors import ModelLoadError, UsageError, VerificationError
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.onnx_graph import ExampleAxis, comparable
from convrewrite.targets import Program
from convrewrite.targets.kinds.onnx_runtime import OnnxRuntime

X = torch.zeros(1, 3, 8, 8)


def file(path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto], domain: str = "") -> Path:
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [image], [result], weights)
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def of_two_inputs() -> OnnxModel:
    x, y, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xyz")
    graph = helper.make_graph([helper.make_node("Sub", ["x", "y"], ["z"])], "g", [x, y], [z])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return OnnxModel(made.SerializeToString())


def test_two_files_of_several_inputs_are_compared() -> None:
    model, inputs = of_two_inputs(), {"y": X + 1, "x": X}
    for given in ((X, X + 1), inputs):
        assert convrewrite.verify(model, model, given).parity.passed
    assert not convrewrite.verify(model, lambda x, y: y - x, inputs).parity.passed
    for wrong, found in (({"x": X}, "found x"), ({"x": X, "z": X}, "found x, z"), ({}, "found none")):
        with pytest.raises(UsageError, match=rf"every input of the file by its name \(x, y\), {found}"):
            convrewrite.verify(model, model, wrong)


ADD = [helper.make_node("Add", ["x", "w"], ["y"])]


def test_weights_beside_the_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(b"\x00\x00\x80\x3f")
    found = OnnxModel(file(tmp_path / "m.onnx", ADD, [external("w.data")]))(X)
    assert torch.equal(found["y"], X + 1)


@pytest.mark.parametrize("kind", ["above", "absolute", "link", "in an attribute", "in a branch", "sparse"])
def test_weights_elsewhere_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret").write_bytes(b"\x00\x00\x80\x3f")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path / "secret")
    tensor = external({"absolute": str(tmp_path / "secret"), "link": "link"}.get(kind, "../secret"))
    nodes, weights = ADD, [tensor]
    if kind == "in an attribute":
        nodes, weights = [helper.make_node("Constant", [], ["w"], value=tensor), *ADD], []
    if kind == "in a branch":
        branch = helper.make_graph(ADD, "b", [], [helper.make_tensor_value_info("y", 1, None)], [tensor])
        flag = helper.make_node("Constant", [], ["flag"], value=helper.make_tensor("f", TensorProto.BOOL, [], [True]))
        nodes, weights = [flag, helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)], []
    path = file(inside / "m.onnx", nodes, weights)
    if kind == "sparse":
        model = onnx.load(str(path), load_external_data=False)
        model.graph.sparse_initializer.add(values=tensor, dims=[1])
        path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelLoadError, match=r"expected weights in the folder of the file, found .* for w; .*--trust"):
        OnnxModel(path)


def with_function(path: Path, function: onnx.FunctionProto) -> Path:
    """A file of one call of a function of its own."""
    file(path, [helper.make_node(function.name, ["x"], ["y"], domain=function.domain)], [], function.domain)
    model = onnx.load(str(path))
    model.functions.append(function)
    path.write_bytes(model.SerializeToString())
    return path


def choosing_by_default(branch: onnx.GraphProto) -> onnx.FunctionProto:
    """A function that runs a graph which stands in no node: it is what an attribute of the function has by default."""
    flag = helper.make_node("Constant", [], ["flag"], value=helper.make_tensor("f", TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["flag"], ["y"])
    for name in ("then_branch", "else_branch"):
        choice.attribute.add(name=name, ref_attr_name="of", type=onnx.AttributeProto.GRAPH)
    made = helper.make_function("own", "Choice", ["x"], ["y"], [flag, choice], [helper.make_opsetid("", 18)])
    made.attribute_proto.add(name="of", type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)
    return made


def test_weights_elsewhere_are_refused_in_functions_too(tmp_path: Path) -> None:
    opsets = [helper.make_opsetid("", 18)]
    branch = helper.make_graph(ADD, "b", [], [helper.make_tensor_value_info("y", 1, None)], [external("../secret")])
    flag = helper.make_node("Constant", [], ["flag"], value=helper.make_tensor("f", TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    constant = helper.make_node("Constant", [], ["w"])
    constant.attribute.add(name="value", ref_attr_name="of", type=onnx.AttributeProto.TENSOR)
    by_default = helper.make_function("own", "Default", ["x"], ["y"], [constant, *ADD], opsets)
    by_default.attribute_proto.add(name="of", type=onnx.AttributeProto.TENSOR).t.CopyFrom(external("../secret"))
    branch_by_default = choosing_by_default(branch)
    whole = helper.make_function("own", "Branch", ["x"], ["y"], [flag, choice], opsets)
    for function in (whole, by_default, branch_by_default):
        path = with_function(tmp_path / "m.onnx", function)
        with pytest.raises(
            ModelLoadError, match=r"expected weights in the folder of the file, found \.\./secret for w"
        ):
            OnnxModel(path)


def test_weights_at_an_address_in_memory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "*").mkdir()
    path = file(tmp_path / "m.onnx", ADD, [external("*/_ORT_MEM_ADDR_/*")])
    with pytest.raises(ModelLoadError, match="expected weights in the folder of the file"):
        OnnxModel(path)


@pytest.mark.parametrize("suffix", [".json", ".textproto", ".onnxtxt", ""])
def test_a_file_is_looked_through_whatever_it_is_called(tmp_path: Path, suffix: str) -> None:
    path = file(tmp_path / "m.onnx", ADD, [external("../secret")]).rename(tmp_path / f"other{suffix}")
    with pytest.raises(ModelLoadError, match="expected weights in the folder of the file"):
        OnnxModel(path)


@pytest.mark.parametrize("suffix", [".json", ".textproto"])
def test_files_are_compared_whatever_they_are_called(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "w.data").write_bytes(b"\x00\x00\x80\x3f")
    path = file(tmp_path / "m.onnx", ADD, [external("w.data")])
    other = tmp_path / f"other{suffix}"
    other.write_bytes(path.read_bytes())
    assert comparable((OnnxModel(other), OnnxModel(path)), (X,)) is None, "no detections"
    assert ExampleAxis.of(OnnxModel(other)).main == "x"
    assert OnnxRuntime().lacks(Program(other)) == ()


@pytest.mark.parametrize("name", ["w\0.data", "a" * 5000, "loop"])
def test_weights_that_can_lie_nowhere_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = file(tmp_path / "m.onnx", ADD, [external(name)])
    ran = call("verify", path, path)
    assert ran.code == 3
    assert "m.onnx: " in ran.message


def test_a_file_larger_than_onnx_can_be_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with path.open("wb") as whole:
        whole.truncate(2**31)
    with pytest.raises(ModelLoadError, match=r"m\.onnx: expected at most 2147483647 bytes, .*found 2147483648"):
        OnnxModel(path)


def test_operators_of_a_library_are_refused_wherever_they_stand(tmp_path: Path) -> None:
    own = helper.make_node("Run", ["x"], ["y"], domain="my.operators")
    paths = [file(tmp_path / "m.onnx", [own], [], "my.operators")]
    branch = helper.make_graph([own], "b", [], [helper.make_tensor_value_info("y", 1, None)])
    flag = helper.make_node("Constant", [], ["flag"], value=helper.make_tensor("f", TensorProto.BOOL, [], [True]))
    choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    paths.append(file(tmp_path / "n.onnx", [flag, choice], [], "my.operators"))
    paths.append(with_function(tmp_path / "f.onnx", choosing_by_default(branch)))
    for path in paths:
        with pytest.raises(
            ModelLoadError, match=r"found Run of my\.operators, which is code from elsewhere; .*--trust"
        ):
            OnnxModel(path)
        with pytest.raises(ModelLoadError, match="found Run"):
            convrewrite.verify(path, path, X)
        ran = call("verify", path, path)
        assert ran.code == 3
        with pytest.raises(VerificationError, match="onnxruntime cannot open it"):
            OnnxModel(path, trust=True)


def test_a_function_of_the_file_itself_is_no_library(tmp_path: Path) -> None:
    path = file(tmp_path / "m.onnx", [helper.make_node("Twice", ["x"], ["y"], domain="own")], [], "own")
    model = onnx.load(str(path))
    body = [helper.make_node("Add", ["a", "a"], ["b"])]
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))
    onnx.save(model, str(path))
    assert torch.equal(OnnxModel(path)(X + 1)["y"], X + 2)


def fixed(path: Path, batch: int | str, *, held: bool = False) -> Path:
    """``x`` and a number in all; with ``held`` that is an input."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])
    shift = helper.make_tensor_value_info("shift", TensorProto.FLOAT, [])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "sum")]
    nodes = [helper.make_node("Add", ["x", "shift"], ["y"]), helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0)]
    stored = [] if held else [helper.make_tensor("shift", TensorProto.FLOAT, [], [1.0])]
    graph = helper.make_graph(nodes, "g", [x, *([shift] if held else [])], outputs if held else outputs[:1], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_many_examples_go_through_a_file_of_few_in_parts(tmp_path: Path) -> None:
    x = torch.randn(6, 3)
    assert torch.equal(OnnxModel(fixed(tmp_path / "two.onnx", 2)).in_parts((x,))["y"], x + 1)
    assert torch.equal(OnnxModel(fixed(tmp_path / "any.onnx", "n")).in_parts((x,))["y"], x + 1)
    with pytest.raises(VerificationError, match=r"expected shape \(4, 3\), found \(6, 3\)"):
        OnnxModel(fixed(tmp_path / "four.onnx", 4)).in_parts((x,))
    model = OnnxModel(fixed(tmp_path / "one.onnx", 2, held=True)).holding({"shift": torch.tensor(1.0)})
    with pytest.raises(VerificationError, match="found that sum is one number for all"):
        model.in_parts((x,))


def test_an_output_without_examples_that_is_the_same_in_all_parts_is_given_once(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y, float[3, 1] anchors, float[6] rows)
        <float[3, 1] a = {1, 2, 3}, int64[1] all = {-1}> { y = Neg(x) anchors = Neg(a) rows = Reshape(x, all) }"""
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "m.onnx"))
    found = OnnxModel(tmp_path / "m.onnx").in_parts((torch.randn(6, 3),))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "y": (6, 3),
        "anchors": (3, 1),
        "rows": (18,),
    }


def test_a_file_holds_what_it_is_given_at_every_run(tmp_path: Path) -> None:
    model = OnnxModel(fixed(tmp_path / "m.onnx", "n", held=True), probe=20.0)
    holding = model.holding({"shift": torch.tensor(2.0), "stranger": torch.zeros(1)})
    x = torch.randn(2, 3)
    assert (model.input_names, holding.input_names) == (("x", "shift"), ("x",))
    assert torch.equal(holding(x)["y"], x + 2)
    assert torch.equal(model(x, torch.tensor(1.0))["y"], x + 1)
    assert [tensor.ndim for tensor in holding.feed((x,))] == [2, 0]


def test_another_format_under_this_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    torch.save({"x": X}, path)
    told = {"zip archive, as torch.save writes; .* called .pt": path.read_bytes()}
    torch.save({"x": X}, path, _use_new_zipfile_serialization=False)
    told["pickle, as older versions of torch.save write; call it .pt"] = path.read_bytes()
    save_file({"x": X}, path)
    told["safetensors file; call it .safetensors"] = path.read_bytes()
    told["model in onnxruntime's own format, .*; give the ONNX file"] = b"\x18\x00\x00\x00ORTM" + bytes(40)
    for words, content in told.items():
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=f"m.onnx: expected an ONNX file, found a {words}"):
            OnnxModel(path)
