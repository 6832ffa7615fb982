"""Example inputs of a graph: as it states them, as far as the caller does not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_texts import graph, made_of, noise, opened, require_equal
from torch import Tensor

from convrewrite.errors import ConvRewriteError, ModelLoadError, UsageError
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.onnx_graph import example_of_graph, noise_for

PAIR = """
(float[N, 3, 8, 8] image, int64[N, 5] index) => (float[N, 3, 8, 8] y, int64[N, 5] z) {
    y = Relu(image)
    z = Identity(index)
}
"""
FREE = "(float[N, 3, H, W] image) => (float[N, 3, H, W] y) { y = Relu(image) }"


def session(text: str, folder: Path, **weights: tuple[int, ...]) -> OnnxModel:
    return opened(graph(text, weights), folder).session


def test_stated_sizes_are_taken_and_a_batch_of_one(tmp_path: Path) -> None:
    (image, index), notes = example_of_graph(session(PAIR, tmp_path))
    assert (image.shape, image.dtype) == ((1, 3, 8, 8), torch.float32)
    assert (index.shape, index.dtype) == ((1, 5), torch.int64)
    assert notes == ()
    assert float(image.std()) > 0.5
    assert not index.any(), "integers may be indices"


def test_the_same_numbers_every_time(tmp_path: Path) -> None:
    graph_of = session(PAIR, tmp_path)
    assert torch.equal(example_of_graph(graph_of)[0][0], example_of_graph(graph_of)[0][0])


def test_a_fixed_batch_is_taken(tmp_path: Path) -> None:
    (image,), _ = example_of_graph(session(FREE.replace("N,", "3,"), tmp_path))
    assert image.shape[0] == 3


@pytest.mark.parametrize(("name", "kind", "dtype"), [
    ("float16", "float16", torch.float16), ("double", "double", torch.float64), ("int32", "int32", torch.int32),
    ("int8", "int8", torch.int8), ("uint8", "uint8", torch.uint8), ("bool", "bool", torch.bool),
])  # fmt: skip
def test_every_type_of_input(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    (made,), _ = example_of_graph(session(f"({kind}[N, 4] x) => ({kind}[N, 4] y) {{ y = Identity(x) }}", tmp_path))
    assert made.dtype == dtype
    if dtype == torch.bool:
        assert bool(made.all())


@pytest.mark.parametrize("kind", ["string[N]", "uint16[N]", "seq(float)"])
def test_text_and_sequences_and_types_without_operations_are_no_inputs(kind: str, tmp_path: Path) -> None:
    text = f"({kind} x, float[N] z) => (float[N] y) {{ y = Identity(z) }}"
    with pytest.raises(
        UsageError, match=rf"input 'x': expected a tensor of .* float16, .* found .*{kind[:3]}.*; export"
    ):
        example_of_graph(session(text, tmp_path))


def test_free_axes_get_a_size_that_is_said(tmp_path: Path) -> None:
    (image,), notes = example_of_graph(session(FREE, tmp_path))
    assert image.shape == (1, 3, 224, 224)
    assert notes == (
        "free axes of inputs got an example size: image as 1x3x224x224; pass --input NAME=SHAPE to change it",
    )


STATE = """
(float[N, 4, 5] x, float[1, N, 4] state) => (float[N, 4, 5] y) {
    turned = Transpose<perm = [1, 2, 0]>(state)
    y = Add(x, turned)
}
"""
"""The state of a recurrent layer has its examples along the second axis."""


def test_axes_of_one_name_get_one_size(tmp_path: Path) -> None:
    (x, state), notes = example_of_graph(session(STATE, tmp_path))
    assert (x.shape, state.shape) == ((1, 4, 5), (1, 1, 4))
    assert notes == ()
    _, state = example_of_graph(session(STATE, tmp_path), {"x": noise(3, 4, 5)})[0]
    assert state.shape == (1, 3, 4)


def test_a_name_of_several_axes_of_an_input_is_none(tmp_path: Path) -> None:
    text = "(float[None, 3, None, None] x, float[2, None] z) => (float[None, 3, None, None] y) { y = Relu(x) }"
    (x, z), _ = example_of_graph(session(text, tmp_path))
    assert (x.shape, z.shape) == ((1, 3, 224, 224), (2, 224))


def test_free_axes_get_a_size_with_which_the_graph_runs(tmp_path: Path) -> None:
    text = "(float[N, M] x) => (float[N, 5] y) { y = MatMul(x, w) }"
    (made,), _ = example_of_graph(session(text, tmp_path, w=(640, 5)))
    assert made.shape == (1, 640)
    with pytest.raises(UsageError, match=r"found none among 224, .*The first failed with"):
        example_of_graph(session(text, tmp_path, w=(641, 5)))


def test_a_stated_size_that_does_not_run_is_told_as_it_is(tmp_path: Path) -> None:
    text = "(float[N, 4] x, float[N, 4] z) => (float[A, B] y) { s = Shape(z) t = Add(s, s) y = Reshape(x, t) }"
    with pytest.raises(ConvRewriteError, match="cannot run it on these inputs") as told:
        example_of_graph(session(text, tmp_path))
    assert isinstance(told.value, ModelLoadError)


def by_name(image: Tensor) -> dict[str, Tensor]:
    return {"image": image}


def test_given_tensors_are_taken_and_the_others_made(tmp_path: Path) -> None:
    given = noise(1, 3, 8, 8)
    (image, index), _ = example_of_graph(session(PAIR, tmp_path), by_name(given))
    assert torch.equal(image, given)
    assert index.shape == (1, 5)


def test_a_tuple_goes_by_position_and_a_tensor_alone_too(tmp_path: Path) -> None:
    pair = (noise(2, 3, 8, 8), torch.ones(2, 5, dtype=torch.int64))
    found, notes = example_of_graph(session(PAIR, tmp_path), pair)
    assert all(torch.equal(a, b) for a, b in zip(found, pair, strict=True))
    assert notes == ()
    alone = noise(2, 3, 5, 7)
    (found_alone,), notes = example_of_graph(session(FREE, tmp_path), alone)
    assert torch.equal(found_alone, alone)
    assert notes == ()


def test_real_numbers_come_in_the_precision_of_the_graph(tmp_path: Path) -> None:
    text = "(float16[N, 4] x) => (float16[N, 4] y) { y = Relu(x) }"
    (made,), _ = example_of_graph(session(text, tmp_path), noise(2, 4))
    assert made.dtype == torch.float16
    (made,), _ = example_of_graph(session(FREE, tmp_path), noise(1, 3, 8, 8, dtype=torch.float64))
    assert made.dtype == torch.float32
    with pytest.raises(ConvRewriteError, match=r"expected tensor\(float\), found torch\.int64"):
        example_of_graph(session(FREE, tmp_path), torch.ones(1, 3, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize(("example", "words"), [
    ({"picture": torch.zeros(1)}, r"names of the graph's inputs \(image, index\), found picture"),
    ({"picture": torch.zeros(1), 3: torch.zeros(1)}, r"found picture, 3"),
    (torch.zeros(1, 3, 8, 8), r"expected 2 tensors \(image, index\), or a dictionary of them by name, found 1 of Tensor"),
    ((torch.zeros(1), torch.zeros(1), torch.zeros(1)), "found 3 of Tensor, Tensor, Tensor"),
    ((torch.zeros(1), 3), "found 2 of Tensor, int"),
])  # fmt: skip
def test_names_and_numbers_of_inputs_that_the_graph_does_not_have(example: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        example_of_graph(session(PAIR, tmp_path), example)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 3, 8), (1, 4, 8, 8)])
def test_a_shape_that_the_graph_does_not_take(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ConvRewriteError, match="input 'image': expected shape"):
        example_of_graph(session(PAIR, tmp_path), by_name(noise(*shape)))


def test_noise_of_given_shapes(tmp_path: Path) -> None:
    made = noise_for(session(PAIR, tmp_path), {"image": (4, 3, 8, 8)}, seed=3)
    assert made.keys() == {"image"}
    assert made["image"].shape == (4, 3, 8, 8)
    assert not torch.equal(made["image"], noise_for(session(PAIR, tmp_path), {"image": (4, 3, 8, 8)})["image"])


def test_a_stated_size_beyond_any_machine_is_refused_before_it_is_made(tmp_path: Path) -> None:
    text = "(float[N, 1000000, 1000000] x) => (float[N, 1000000, 1000000] y) { y = Relu(x) }"
    for call in (example_of_graph, lambda graph_of: noise_for(graph_of, {"x": (1, 10**6, 10**6)})):
        with pytest.raises(
            UsageError, match="input 'x': expected at most 67108864 numbers, found a shape of 1x1000000x1000000"
        ):
            call(session(text, tmp_path))


def test_an_input_of_any_number_of_axes_has_to_be_given(tmp_path: Path) -> None:
    model = graph("(float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) { y = Conv(x, w) }", {"w": (4, 3, 3, 3)})
    model.graph.input[0].type.tensor_type.ClearField("shape")
    session = opened(model, tmp_path).session
    with pytest.raises(UsageError, match=r"input x: .* not even how many axes it has; pass --input x=1x3x224x224"):
        example_of_graph(session)
    given = noise(1, 3, 8, 8)
    assert torch.equal(example_of_graph(session, given)[0][0], given)
    require_equal(made_of(model, tmp_path, given), noise(3, 3, 8, 8))


def test_a_single_number_is_no_input_of_any_number_of_axes(tmp_path: Path) -> None:
    model = graph("(float[N, 4] x, float rate) => (float[N, 4] y) { y = Mul(x, rate) }")
    session = opened(model, tmp_path).session
    assert session.unranked == set()
    assert [tensor.ndim for tensor in example_of_graph(session)[0]] == [2, 0]


def test_an_input_of_no_examples_is_refused(tmp_path: Path) -> None:
    model = graph("(float[0, 3, 8, 8] x) => (float[M, 4, 6, 6] y) { y = Conv(x, w) }", {"w": (4, 3, 3, 3)})
    with pytest.raises(
        UsageError, match=r"'x': expected examples .* the graph states 0; export it with that axis free"
    ):
        example_of_graph(opened(model, tmp_path).session)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"image": np.zeros((1, 3, 8, 8))}, "expected a tensor for image, found ndarray"),
        (5, "expected 1 tensors .image., or a dictionary of them by name, found 1 of int"),
        (torch.zeros(0, 3, 8, 8), "expected at least one example along the first axis of image, found 0x3x8x8"),
    ],
)
def test_what_is_no_example_is_refused(given: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"example input: {why}"):
        example_of_graph(session(FREE, tmp_path), given)


def test_an_example_may_have_a_graph_of_gradients(tmp_path: Path) -> None:
    (image,), _ = example_of_graph(session(FREE, tmp_path), {"image": noise(1, 3, 8, 8).requires_grad_()})
    assert not image.requires_grad
