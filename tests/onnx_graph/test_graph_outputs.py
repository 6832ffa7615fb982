"""By which values of a graph a result is judged: its outputs, or what these are chosen from."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx_texts import graph, made_of, noise, opened, require_equal, told
from torch import Tensor

from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph.comparing import comparable
from convrewrite.onnx_graph.outputs import judged_values

DETECTOR = """
(float[1, 4, 6, 6] x) => (int64[K, 3] chosen, float[1, 2, 36] scores) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    b = Sigmoid(a)
    c = Constant<value_ints = [1, 36, 4]>()
    boxes = Reshape(b, c)
    d = Conv(x, v)
    e = Constant<value_ints = [1, 2, 36]>()
    f = Reshape(d, e)
    scores = Sigmoid(f)
    most = Constant<value_ints = [5]>()
    iou = Constant<value_floats = [0.5]>()
    least = Constant<value_floats = [0.4]>()
    chosen = NonMaxSuppression(boxes, scores, most, iou, least)
}
"""

WEIGHTS = {"w": (4, 4, 3, 3), "v": (2, 4, 1, 1)}

INSIDE = """
(float[1, 4, 6, 6] x) => (int64[K, 3] chosen) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    b = Sigmoid(a)
    c = Constant<value_ints = [1, 36, 4]>()
    boxes = Reshape(b, c)
    d = Conv(x, v)
    e = Constant<value_ints = [1, 2, 36]>()
    f = Reshape(d, e)
    scores = Sigmoid(f)
    trips = Constant<value_int = 1>()
    going = Constant<value = bool {1}>()
    found = Loop<body = body (int64 step, bool before) => (bool after, int64[J, 3] picked) {
        after = Identity(before)
        most = Constant<value_ints = [5]>()
        iou = Constant<value_floats = [0.5]>()
        least = Constant<value_floats = [0.4]>()
        picked = NonMaxSuppression(boxes, scores, most, iou, least)
    }>(trips, going)
    axis = Constant<value_ints = [0]>()
    chosen = Squeeze(found, axis)
}
"""


def test_detections_are_judged_by_what_they_are_chosen_from(tmp_path: Path) -> None:
    module = made_of(graph(DETECTOR, WEIGHTS), tmp_path)
    translation = told(module)
    assert translation.judged.names == ("boxes", "scores")
    assert translation.judged.note is not None
    assert "how many entries chosen has depends on the numbers" in translation.judged.note
    assert "boxes, scores" in translation.judged.note
    assert translation.notes[0] == translation.judged.note
    assert "NonMaxSuppression" not in translation.opaque, "what comes behind the choice is not run"
    assert list(module(noise(1, 4, 6, 6))) == ["boxes", "scores"]


@pytest.mark.parametrize("scale", [torch.tensor(2.0), torch.ones(4, 1, 1)], ids=["number", "channels"])
def test_two_files_with_an_input_that_is_the_same_for_all_examples_are_compared(scale: Tensor, tmp_path: Path) -> None:
    shape = ", ".join(map(str, scale.shape))
    text = DETECTOR.replace("] x)", f"] x, float[{shape}] scale)").replace(
        "b = Sigmoid(a)", "s = Mul(a, scale) b = Sigmoid(s)"
    )
    onnx.save(graph(text.replace("float[]", "float"), WEIGHTS), tmp_path / "a.onnx")
    first, second = OnnxModel(tmp_path / "a.onnx"), OnnxModel(tmp_path / "a.onnx")
    found = comparable((first, second), (noise(1, 4, 6, 6), scale))
    assert found is not None and found[0].output_names == ("boxes", "scores")
    assert comparable((first, second), (noise(1, 4, 6, 6), torch.ones(5, 1, 1))) is None, "onnxruntime does not run it"


def test_a_choice_inside_of_a_loop_is_found(tmp_path: Path) -> None:
    translation = told(made_of(graph(INSIDE, WEIGHTS), tmp_path))
    assert translation.judged.names == ("boxes", "scores")
    assert "Loop" not in translation.opaque


FINDS = {
    "NonZero": ("int64[4, K]", "p = Greater(a, t) chosen = NonZero(p)", "a"),
    "Compress": (
        "float[K]", "m = Constant<value_ints = [-1]>() h = Reshape(a, m) p = Greater(h, t) chosen = Compress(h, p)", "h",
    ),
    "Unique": ("float[K]", "q = Floor(a) chosen = Unique(q)", "q"),
}  # fmt: skip


@pytest.mark.parametrize("finds", FINDS)
def test_an_output_as_long_as_the_numbers_say(finds: str, tmp_path: Path) -> None:
    """A mask is made of real numbers, which are what is judged."""
    kind, body, source = FINDS[finds]
    text = f"(float[1, 2, 6, 6] x) => ({kind} chosen) {{ a = Conv(x, w) t = Constant<value_float = 0.3>() {body} }}"
    module = made_of(graph(text, {"w": (3, 2, 3, 3)}), tmp_path)
    assert told(module).judged.names == (source,)
    assert not told(module).opaque


FILTERED = """
(float[1, 4, 6, 6] x) => (float[K, 4] kept) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w)
    b = Constant<value_ints = [36, 4]>()
    boxes = Reshape(a, b)
    d = Conv(x, v)
    e = Constant<value_ints = [36]>()
    scores = Reshape(d, e)
    t = Constant<value_float = LEVEL>()
    mask = Greater(scores, t)
    i = NonZero(mask)
    j = Transpose<perm = [1, 0]>(i)
    likely = GatherND(boxes, j)
    sure = GatherND(scores, j)
    k = Constant<value_ints = [1, 1, -1]>()
    s = Reshape(sure, k)
    zero = Constant<value_ints = [0]>()
    p = Unsqueeze(likely, zero)
    most = Constant<value_ints = [5]>()
    chosen = NonMaxSuppression(p, s, most)
    two = Constant<value_int = 2>()
    where = Gather<axis = 1>(chosen, two)
    kept = Gather(likely, where)
}
"""


@pytest.mark.parametrize("level", ["0.1", "99.0"], ids=["some", "none"])
def test_what_was_filtered_before_a_choice_is_followed_to_what_always_has_one_size(level: str, tmp_path: Path) -> None:
    """Also where no detection is left of the example: its outputs have one size then, none."""
    module = made_of(graph(FILTERED.replace("LEVEL", level), {"w": (4, 4, 3, 3), "v": (1, 4, 1, 1)}), tmp_path)
    assert set(told(module).judged.names) == {"boxes", "scores"}
    assert {name: tuple(value.shape) for name, value in module(noise(1, 4, 6, 6)).items()} == {
        "boxes": (36, 4), "scores": (36,),
    }  # fmt: skip


def test_an_output_whose_length_happens_to_stay_is_judged_itself(tmp_path: Path) -> None:
    """NonZero of what is nowhere zero has as many entries for every input."""
    text = """
    (float[1, 8] x) => (float[1, 8] y) {
       
        a = Abs(x)
        one = Constant<value_float = 1.0>()
        p = Add(a, one)
        i = NonZero(p)
        z = Transpose<perm = [1, 0]>(i)
        f = GatherND(p, z)
        s = Shape(x)
        y = Reshape(f, s)
    }
    """
    module = made_of(graph(text), tmp_path)
    assert told(module).judged.names == ("y",)
    assert told(module).judged.note is None
    require_equal(module, noise(1, 8, seed=2))


def test_outputs_beside_the_choice_are_judged_themselves(tmp_path: Path) -> None:
    model = graph(DETECTOR.replace("=> (", "=> (float[1, 4, 6, 6] b, "), WEIGHTS)
    assert told(made_of(model, tmp_path)).judged.names == ("b", "boxes", "scores")


def test_constants_and_whole_numbers_are_not_what_is_chosen_from(tmp_path: Path) -> None:
    source = opened(graph(DETECTOR, WEIGHTS), tmp_path)
    values = {
        "boxes": np.zeros((1, 36, 4), np.float32), "scores": np.zeros((1, 2, 36), np.float32),
        "chosen": np.zeros((2, 3), np.int64), "most": np.array([5]), "iou": np.ones(1, np.float32),
        "least": np.ones(1, np.float32),
    }  # fmt: skip
    graph_of = source.file.model.graph
    assert judged_values(graph_of, {"most", "iou", "least"}, [values]).names == ("boxes", "scores")
    assert judged_values(graph_of, {"most", "iou", "least", "boxes"}, [values]).names == ("scores",)
    assert judged_values(graph_of, {"scores", "chosen"}, [values]).names == ()
