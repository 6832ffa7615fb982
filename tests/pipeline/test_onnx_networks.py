"""The whole way for ONNX graphs, from a path or from memory: what is rewritten, and that all else stays as it came."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from clocks import FalseTimer
from commands import call, images, listing, small_network
from onnx import helper
from onnx_texts import CLASSIFIER, CLASSIFIER_SHAPES, classifier, drawn, graph, noise

import convrewrite
from convrewrite import Settings
from convrewrite.calibration import read_calibration
from convrewrite.errors import CalibrationError, ModelLoadError, PlanError, UsageError, VerificationError
from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph import read_network
from convrewrite.pipeline.prepare import prepare
from convrewrite.results.folder import FILES, Result
from convrewrite.version import tool_version

SAVED = set(FILES) - {"model.pt", "weights.safetensors"}
"""The files of a result whose model came as ONNX."""


def settings(**asked: Any) -> Settings:
    return Settings(timer=FalseTimer(), **asked)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model = classifier()
    model.producer_name, model.doc_string, model.model_version = "a tool", "what it is", 7
    model.metadata_props.add(key="classes", value="ten")
    onnx.save(model, str(folder / "model.onnx"))
    return folder


@pytest.fixture(scope="module")
def result(place: Path) -> Result:
    return convrewrite.optimize(place / "model.onnx", calibration=images(), settings=settings(seed=3))


@pytest.fixture(scope="module")
def out(place: Path, result: Result) -> Path:
    return result.save(place / "out")


def run(path: Path, *inputs: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    found = session.run(None, feed)
    return dict(zip([entry.name for entry in session.get_outputs()], found, strict=True))


def nodes_of(model: onnx.ModelProto, but: Sequence[str] = ()) -> list[bytes]:
    """Every node that is no convolution and no BatchNorm, byte by byte, in order."""
    skipped = ("Conv", "ConvTranspose", "BatchNormalization", "Add", "Sum", *but)
    return [node.SerializeToString() for node in model.graph.node if node.op_type not in skipped]


def rewritten_sites(result: Result) -> list[str]:
    return [site.name for site in result.report.sites if site.action == "rewritten"]


def reason_of(result: Result, part: str) -> str:
    [site] = [site for site in result.report.sites if part in site.name]
    assert site.action == "kept"
    return str(site.reason)


def test_the_convolutions_are_rewritten_and_reported(result: Result) -> None:
    assert [site.name for site in result.report.sites] == ["stem", "first", "second"]
    assert rewritten_sites(result) == ["first", "second"]
    assert result.refused is None
    assert result.report.input_shapes == ((1, 3, 16, 16),)
    assert result.report.model.endswith("model.onnx")
    assert result.report.calibration.fitted_on == 64


def test_the_folder_has_the_graph_and_no_module(place: Path, out: Path) -> None:
    assert listing(out) == SAVED
    assert listing(place) == {"model.onnx", "out", *(f"out/{name}" for name in SAVED)}


def test_all_else_of_the_graph_stays_as_it_came(place: Path, out: Path) -> None:
    before, after = onnx.load(str(place / "model.onnx")), onnx.load(str(out / "model.onnx"))
    assert nodes_of(after) == nodes_of(before)
    old, new = ({tensor.name: tensor for tensor in model.graph.initializer} for model in (before, after))
    gone = {"first_weight", "second_weight", "second_bias", "gamma", "beta", "mean", "variance"}
    assert old.keys() - new.keys() == gone
    assert all(new[name].SerializeToString() == old[name].SerializeToString() for name in old.keys() & new.keys())
    for field in ("input", "output"):
        assert list(getattr(after.graph, field)) == list(getattr(before.graph, field))
    for field in ("ir_version", "opset_import", "producer_name", "doc_string", "model_version", "functions"):
        assert getattr(after, field) == getattr(before, field)
    assert after.graph.name == before.graph.name
    [stem] = [node for node in after.graph.node if "stem_weight" in node.input]
    assert stem == before.graph.node[0]


def test_metadata_is_kept_and_says_where_the_file_comes_from(out: Path) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(str(out / "model.onnx")).metadata_props}
    assert metadata.pop("classes") == "ten"
    assert metadata
    assert all(key.startswith("convrewrite") for key in metadata)


def test_the_file_computes_what_the_module_does(result: Result, out: Path) -> None:
    for count in (1, 5):
        x = images(count, seed=9)
        with torch.no_grad():
            expected = result.model(x)["logits"]
        [found] = run(out / "model.onnx", x).values()
        assert np.abs(found - expected.numpy()).max() < 2e-5 * float(expected.abs().max())


def test_the_file_approximates_the_original(place: Path, out: Path, result: Result) -> None:
    x = images(40, seed=5)
    [before], [after] = (list(run(path, x).values()) for path in (place / "model.onnx", out / "model.onnx"))
    error = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert 1e-4 < error < 0.2
    assert result.report.totals.macs.after < 0.6 * result.report.totals.macs.before


def test_the_original_is_not_touched(place: Path, out: Path) -> None:
    model = onnx.load(str(place / "model.onnx"))
    model.ClearField("metadata_props")
    model.producer_name, model.doc_string, model.model_version = "", "", 0
    model.ClearField("model_version")
    assert model.graph == classifier().graph


def test_a_model_from_memory_gives_the_same(result: Result) -> None:
    given = classifier()
    other = convrewrite.optimize(given, calibration=images(), settings=settings(seed=3))
    assert given == classifier()
    assert other.report.model == "agraph"
    ours, theirs = result.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow
def test_a_module_of_torch_exported_gives_a_result_as_good(tmp_path: Path) -> None:
    network = small_network()
    convrewrite.export(network, images(2), tmp_path / "model.onnx")
    of_graph = convrewrite.optimize(tmp_path / "model.onnx", calibration=images(), settings=settings())
    of_module = convrewrite.optimize(network, images(1), calibration=images(), settings=settings(measure=False))
    assert len(rewritten_sites(of_graph)) == len(rewritten_sites(of_module)) == 2
    [first], [second] = of_graph.report.fidelity, of_module.report.fidelity
    assert first.relative_error == pytest.approx(second.relative_error, rel=0.5)
    x = images(3, seed=4)
    of_graph.save(tmp_path / "out")
    [logits] = run(tmp_path / "out" / "model.onnx", x).values()
    assert logits.shape == (3, 10)


def test_a_result_that_is_not_measured_has_its_graph_too(tmp_path: Path) -> None:
    result = convrewrite.optimize(classifier(), calibration=images(), settings=settings(measure=False))
    result.save(tmp_path / "out")
    assert listing(tmp_path / "out") == SAVED
    with torch.no_grad():
        expected = result.model(images(2))["logits"]
    [found] = run(tmp_path / "out" / "model.onnx", images(2)).values()
    assert np.allclose(found, expected.numpy(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_plan_and_apply_are_optimize_in_two_steps(place: Path, tmp_path: Path) -> None:
    asked = settings(budget={"macs": 0.6}, fast=True)
    plan = convrewrite.plan(place / "model.onnx", calibration=images(), settings=asked)
    assert {site.name for site in plan.sites} == {"stem", "first", "second"}
    again = convrewrite.Plan.from_json(plan.to_json(), "here")
    result = convrewrite.apply(classifier(), None, again, images(), settings=settings())
    assert result.report.totals.macs.after <= 0.6 * result.report.totals.macs.before
    assert listing(result.save(tmp_path / "out")) == SAVED
    twice = convrewrite.apply(place / "model.onnx", None, plan, images(), settings=settings())
    ours, theirs = result.model.state_dict(), twice.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    other = graph(CLASSIFIER, dict(reversed(CLASSIFIER_SHAPES.items())))
    with pytest.raises(PlanError):
        convrewrite.apply(other, None, plan, images(), settings=settings())


def test_latency_is_asked_of_the_graphs(place: Path) -> None:
    timer = FalseTimer(ratio=0.5, file_seconds=1e-9 * 995648)
    asked = Settings(timer=timer, budget={"latency": 0.6}, fast=True)
    result = convrewrite.optimize(place / "model.onnx", rules=["balanced"], calibration=images(), settings=asked)
    assert result.refused is None
    assert timer.asked, "options were timed"
    assert {pair[0] for pair in timer.compared} == {place / "model.onnx"}, "the file itself is the baseline"
    assert result.report.totals.macs.after < result.report.totals.macs.before


def test_analyze_lists_every_site_with_the_reason(place: Path) -> None:
    for source in (place / "model.onnx", str(place / "model.onnx"), classifier()):
        rows = convrewrite.analyze(source, rules=["separable"])
        assert [(row.name, row.kind, row.macs) for row in rows] == [
            ("stem", "standard", 110592), ("first", "standard", 294912), ("second", "standard", 589824),
        ]  # fmt: skip
        assert [row.applies["separable"] for row in rows][1:] == ["yes", "yes"]


def test_verify_takes_the_files(place: Path, out: Path) -> None:
    found = convrewrite.verify(place / "model.onnx", out / "model.onnx", images(20, seed=2))
    assert 0 < found.fidelity.worst_error < 0.2


def test_verify_takes_models_from_memory(place: Path, out: Path) -> None:
    """Of such a one it is not known whether the other was made from it."""
    first, second = (OnnxModel((folder / "model.onnx").read_bytes()) for folder in (place, out))
    found = convrewrite.verify(first, second, images(4, seed=2))
    assert 0 < found.fidelity.worst_error < 0.2
    assert found.notes == (f"ONNX model is a rewritten model (convrewrite {tool_version()}): it approximates its original, "
        "fidelity is what counts",)  # fmt: skip


@pytest.mark.parametrize(("source", "words"), [
    (3, "expected a module, a path or an onnx.ModelProto, found int"),
    (small_network(), "example input: expected one"),
])  # fmt: skip
def test_what_is_no_model_is_told(source: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        convrewrite.optimize(source, calibration="weights", settings=settings())


def test_files_that_are_not_there_or_no_models_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no such file"):
        convrewrite.optimize(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelLoadError, match="export it again"):
        convrewrite.analyze(tmp_path / "text.onnx")
    with pytest.raises(convrewrite.ConvRewriteError, match="ModelProto agraph: the model has no convolution"):
        convrewrite.analyze(graph("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }"))


def test_loading_a_result_without_a_module_says_where_it_is(out: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        convrewrite.load(out, small_network())


BRANCHES = """
(float[N, 3, 16, 16] image) => (float[N, 16, 16, 16] map) {
    a = Conv<pads = [1, 1, 1, 1]>(image, stem_weight)
    mean = ReduceMean<keepdims = 0>(a)
    bright = Greater(mean, zero)
    b = If(bright) <
        then_branch = yes () => (float[N, 16, 16, 16] p) { p = Conv<pads = [1, 1, 1, 1]>(a, inner_weight) },
        else_branch = no () => (float[N, 16, 16, 16] q) { q = Neg(a) }
    >
    c = Relu(b)
    d = Conv<pads = [1, 1, 1, 1]>(c, first_weight)
    e = own.Block(d, block_weight)
    f = DequantizeLinear(whole_weight, scale)
    g = Conv(e, f)
    map = Conv<pads = [1, 1, 1, 1]>(g, last_weight)
}
"""


def test_convolutions_that_stay_are_listed_with_the_reason(tmp_path: Path) -> None:
    weights: dict[str, Any] = {f"{name}_weight": (16, 16, 3, 3) for name in ("inner", "first", "block", "last")}
    weights |= {"stem_weight": (16, 3, 3, 3), "zero": np.array(0, np.float32), "scale": np.array(0.02, np.float32)}
    weights["whole_weight"] = (drawn((16, 16, 1, 1)) * 50).astype(np.int8)
    model = graph(BRANCHES, weights)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="in_block", pads=[1, 1, 1, 1])]
    model.functions.append(
        helper.make_function("own", "Block", ["x", "w"], ["y"], nodes, [helper.make_opsetid("", 17)])
    )
    result = convrewrite.optimize(model, calibration=images(), settings=settings())
    assert {site.name for site in result.report.sites if site.action == "rewritten"} == {"first", "last"}
    assert len(result.report.sites) == 6
    reasons = " | ".join(str(site.reason) for site in result.report.sites if site.action == "kept")
    for words in ("it is the stem", "inside of the If", "inline the functions", "quantised already"):
        assert words in reasons
    assert result.report.totals.macs.before == 16 * 16 * (16 * 3 * 9 + 4 * 16 * 16 * 9 + 16 * 16)
    assert not [note for note in result.report.notes if note.startswith("a run of the result")]
    result.save(tmp_path / "out")
    after = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert nodes_of(after) == nodes_of(model)
    assert after.functions == model.functions
    names = {tensor.name for tensor in after.graph.initializer}
    assert {"stem_weight", "inner_weight", "block_weight", "whole_weight"} <= names
    assert not {"first_weight", "last_weight"} & names


DETECTOR = """
(float[1, 3, 16, 16] image) => (int64[K, 3] chosen, float[1, 2, 64] scores) {
    a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(image, stem_weight)
    b = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(b, first_weight)
    d = Relu(c)
    e = Conv(d, box_weight)
    f = Sigmoid(e)
    sizes = Constant<value_ints = [1, 64, 4]>()
    boxes = Reshape(f, sizes)
    h = Conv(d, score_weight)
    rows = Constant<value_ints = [1, 2, 64]>()
    i = Reshape(h, rows)
    scores = Sigmoid(i)
    most = Constant<value_ints = [3]>()
    iou = Constant<value_floats = [0.5]>()
    least = Constant<value_floats = [0.2]>()
    chosen = NonMaxSuppression(boxes, scores, most, iou, least)
}
"""


def test_a_detector_is_judged_by_boxes_and_scores_and_still_chooses(tmp_path: Path) -> None:
    shapes = {
        "stem_weight": (16, 3, 3, 3), "first_weight": (16, 16, 3, 3), "box_weight": (4, 16, 1, 1),
        "score_weight": (2, 16, 1, 1),
    }  # fmt: skip
    onnx.save(graph(DETECTOR, shapes), str(tmp_path / "given.onnx"))
    result = convrewrite.optimize(tmp_path / "given.onnx", calibration=images(40), settings=settings())
    assert rewritten_sites(result) == ["first"]
    assert {row.name for row in result.report.fidelity} == {"boxes", "scores"}
    assert any("detections are chosen" in note for note in result.report.notes)
    assert any("the graph takes 1 example at a time" in note for note in result.report.notes)
    result.save(tmp_path / "out")
    found = run(tmp_path / "out" / "model.onnx", images(1))
    assert list(found) == ["chosen", "scores"]
    assert found["chosen"].shape[1] == 3
    paths = tmp_path / "given.onnx", tmp_path / "out" / "model.onnx"
    compared = convrewrite.verify(*paths, images(1, seed=3))
    assert {output.name for output in compared.fidelity.outputs} == {"boxes", "scores"}
    assert 0 < compared.fidelity.worst_error < 1
    chosen_from, approximates = compared.notes
    assert "boxes, scores" in chosen_from
    assert f"made from {paths[0]}" in approximates
    ran = call("verify", *paths)
    assert ran.code == 0
    said = ran.said
    assert all(note in said for note in compared.notes)


def test_weights_in_other_files_go_along(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    path = tmp_path / "given" / "model.onnx"
    onnx.save(classifier(), str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = convrewrite.optimize(path, calibration=images(), settings=settings())
    result.save(tmp_path / "out")
    [beside] = [name for name in listing(tmp_path / "out") if name.endswith(".data")]
    assert listing(tmp_path / "out") == SAVED | {beside}
    assert listing(tmp_path / "given") == {"model.onnx", "weights.bin"}
    path.unlink()
    (tmp_path / "given" / "weights.bin").unlink()
    with torch.no_grad():
        expected = result.model(images(2))["logits"]
    [found] = run(tmp_path / "out" / "model.onnx", images(2)).values()
    assert np.allclose(found, expected.numpy(), rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    shapes = {name: drawn(shape, seed, np.float16) for seed, (name, shape) in enumerate(CLASSIFIER_SHAPES.items())}
    model = graph(CLASSIFIER.replace("float[", "float16["), shapes)
    result = convrewrite.optimize(model, calibration=images(), settings=settings())
    assert rewritten_sites(result) == ["first", "second"]
    result.save(tmp_path / "out")
    after = onnx.load(str(tmp_path / "out" / "model.onnx"))
    assert {tensor.data_type for tensor in after.graph.initializer} == {onnx.TensorProto.FLOAT16}
    [found] = run(tmp_path / "out" / "model.onnx", images(2).half()).values()
    assert found.dtype == np.float16
    assert np.isfinite(found).all()


SHARED = """
(float[N, 3, 16, 16] image) => (float[N, 32] y) {
    a = Conv<pads = [1, 1, 1, 1]>(image, stem)
    b = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(b, kernel)
    d = Relu(c)
    e = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(d, kernel)
    f = Relu(e)
    g = GlobalAveragePool(f)
    y = Flatten(g)
}
"""


def test_parameters_are_those_of_the_file_where_nodes_shared_a_kernel(tmp_path: Path) -> None:
    model = graph(SHARED, {"stem": (32, 3, 3, 3), "kernel": (32, 32, 3, 3), "unused": (7,)})
    result = convrewrite.optimize(model, calibration=images(), settings=settings())
    assert len(rewritten_sites(result)) == 2
    after = onnx.load(str(result.save(tmp_path / "out") / "model.onnx"))
    numbers = sum(int(np.prod(one.dims)) for one in after.graph.initializer if one.data_type == onnx.TensorProto.FLOAT)
    assert result.report.totals.parameters.after == numbers
    network, before = read_network(model), 32 * 3 * 3 * 3 + 2 * 32 * 32 * 3 * 3 + 7
    assert prepare(network.module, network.inputs, ()).totals.parameters == before  # of which budgets are parts
    assert result.report.totals.parameters.before == before
    assert not [note for note in result.report.notes if note.startswith("the original has")]


def test_a_calibration_may_hold_inputs_that_stay_as_in_the_example() -> None:
    text = CLASSIFIER.replace("] image)", "] image, float[3, 1, 1] shift)").replace("(image,", "(moved,")
    model = graph(text.replace("{\n", "{\n moved = Add(image, shift)\n", 1), CLASSIFIER_SHAPES)
    data, shift = read_calibration(images(40), (images(1),)), torch.zeros(3, 1, 1)
    both = replace(
        data, fit=tuple((*batch, shift) for batch in data.fit), held_out=tuple((*b, shift) for b in data.held_out)
    )
    found, expected = (
        convrewrite.optimize(model, {"shift": shift}, calibration=given, settings=settings(measure=False))
        for given in (both, data)
    )
    assert "calibration inputs of shift were left out" in " ".join(found.report.notes)
    assert "were left out" not in " ".join(expected.report.notes)
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    wrong = replace(data, fit=tuple((*batch, shift, shift) for batch in data.fit))
    with pytest.raises(CalibrationError, match=r"expected 1 tensors .* \(image\), found 1 and 3"):
        convrewrite.optimize(model, {"shift": shift}, calibration=wrong, settings=settings(measure=False))


def test_a_graph_of_one_example_is_fitted_on_many(tmp_path: Path) -> None:
    rows = "s = Constant<value_ints = [1, 32]>() i = Reshape(h, s)"
    text = CLASSIFIER.replace("[N,", "[1,").replace("i = Flatten(h)", rows)
    result = convrewrite.optimize(graph(text, CLASSIFIER_SHAPES), calibration=images(40), settings=settings())
    assert rewritten_sites(result) == ["first", "second"]
    assert (result.report.calibration.fitted_on, result.report.calibration.held_out) == (32, 8)
    result.save(tmp_path / "out")
    [found] = run(tmp_path / "out" / "model.onnx", images(1)).values()
    assert found.shape == (1, 10)


def test_a_graph_that_draws_random_numbers_is_refused() -> None:
    text = CLASSIFIER.replace("g = Relu(f)", "r = RandomNormalLike(f) s = Add(f, r) g = Relu(s)")
    with pytest.raises((ModelLoadError, VerificationError), match="other values at every call"):
        convrewrite.optimize(graph(text, CLASSIFIER_SHAPES), noise(1, 3, 16, 16), settings=settings())
