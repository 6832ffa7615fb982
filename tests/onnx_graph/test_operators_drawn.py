"""What moves windows, pads, cuts, reshapes or resizes computes what onnxruntime does, whatever its attributes."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx_nodes import assert_same, call, make, one_node, runtime_outputs, view_of

QUICK = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def image(draw: st.DrawFn, dims: int, largest: int = 7) -> Any:
    sizes = [draw(st.integers(1, 2)), draw(st.integers(1, 3)), *(draw(st.integers(3, largest)) for _ in range(dims))]
    return np.random.default_rng(0).standard_normal(sizes).astype(np.float32)


def several(draw: st.DrawFn, count: int, low: int, high: int) -> list[int]:
    return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))


def same_as_runtime(
    op: str, opset: int, inputs: list[Any], attributes: dict[str, Any], constants: tuple[int, ...] = ()
) -> Any:  # fmt: skip
    """What is made, None too; a node that onnxruntime refuses is none of a network's."""
    model, values = one_node(op, opset, inputs, attributes)
    wanted = runtime_outputs(model, values)
    assume(wanted is not None)
    view = view_of(model.graph.node[0], opset, values, constants)
    made = make(view)
    if made is not None:
        assert_same(call(made, view, model.graph.node[0], values)[0], wanted[0])
    return made


@st.composite
def pools(draw: st.DrawFn) -> tuple[str, int, list[Any], dict[str, Any]]:
    op = draw(st.sampled_from(["MaxPool", "AveragePool", "LpPool"]))
    opset = draw(
        st.sampled_from({"MaxPool": [8, 10, 12, 22], "AveragePool": [7, 11, 19, 22], "LpPool": [7, 18, 22]}[op])
    )
    dims = draw(st.integers(1, 3))
    kernel = several(draw, dims, 1, 4)
    dilated, ceils = (8 if op == "MaxPool" else 17), (17 if op == "LpPool" else 8)
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": several(draw, dims, 1, 4)}
    attributes["auto_pad"] = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if attributes["auto_pad"] == "NOTSET":
        pads = [draw(st.integers(0, size - 1)) for size in kernel * 2]
        attributes["pads"] = pads[:dims] * 2 if draw(st.booleans()) else pads
    if opset > ceils:
        attributes["ceil_mode"] = draw(st.integers(0, 1))
    if opset > dilated:
        attributes["dilations"] = several(draw, dims, 1, 2)
    if op == "AveragePool":
        attributes["count_include_pad"] = draw(st.integers(0, 1))
    if op == "LpPool":
        attributes["p"] = draw(st.integers(1, 3))
    x = image(draw, dims)
    reaches = [(k - 1) * d + 1 for k, d in zip(kernel, attributes.get("dilations", [1] * dims), strict=True)]
    assume(all(reach <= size for reach, size in zip(reaches, x.shape[2:], strict=True)))
    return op, opset, [x], attributes


@given(pools())
@QUICK
def test_pooling(node: tuple[str, int, list[Any], dict[str, Any]]) -> None:
    attributes = node[3]
    made = same_as_runtime(*node)
    fits = all(s <= k for s, k in zip(attributes["strides"], attributes["kernel_shape"], strict=True))
    plain = set(attributes.get("dilations", [1])) == {1} and fits
    assert made is not None or (attributes["auto_pad"].startswith("SAME") and not plain)


@given(st.data())
@QUICK
def test_padding(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    opset = 21 if mode == "wrap" else data.draw(st.sampled_from([7, 11, 18]))
    x = image(data.draw, data.draw(st.integers(0, 2)), 4)
    low, rank = -1 if mode == "constant" else 0, x.ndim
    least = [size - 1 if mode == "reflect" else size for size in x.shape]
    pads = [data.draw(st.integers(low, least[i % rank])) for i in range(2 * rank)]
    assume(all(x.shape[i] + pads[i] + pads[i + rank] > 0 for i in range(rank)))
    if opset < 11:
        assert same_as_runtime("Pad", opset, [x], {"mode": mode, "pads": pads, "value": 1.5}) is not None
        return
    inputs = [x, np.array(pads), np.array(2.5, np.float32)]
    if opset >= 18:
        axes = data.draw(st.permutations(range(rank)))[: data.draw(st.integers(1, rank))]
        inputs[1] = np.array([pads[axis] for axis in axes] + [pads[axis + rank] for axis in axes])
        inputs.append(np.array(axes))
    assert (
        same_as_runtime("Pad", opset, inputs, {"mode": mode}, data.draw(st.sampled_from([(), (1, 2, 3)]))) is not None
    )


EDGES = [2**31 - 1, -(2**31), 2**63 - 1, -(2**63)]


@given(st.data())
@QUICK
def test_slicing(data: st.DataObject) -> None:
    x = image(data.draw, data.draw(st.integers(0, 2)))
    axes = data.draw(st.permutations(range(x.ndim)))[: data.draw(st.integers(1, x.ndim))]
    place = st.integers(-8, 8) | st.sampled_from(EDGES)
    starts, ends = ([data.draw(place) for _ in axes] for _ in range(2))
    if data.draw(st.booleans()):
        made = same_as_runtime("Slice", 7, [x], {"starts": starts, "ends": ends, "axes": axes})
    else:
        steps = [data.draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes]
        negative = [axis - x.ndim if data.draw(st.booleans()) else axis for axis in axes]
        inputs = [x, *map(np.array, (starts, ends, negative, steps))]
        made = same_as_runtime("Slice", 13, inputs, {}, data.draw(st.sampled_from([(), (1, 2, 3, 4)])))
    assert made is not None


@given(st.data())
@QUICK
def test_reshaping(data: st.DataObject) -> None:
    x = image(data.draw, 2)
    n, c, h, w = x.shape
    shapes = [[0, -1], [-1], [n, -1, 0], [0, 0, h * w], [0, 0, -1], [w, h, c, n], [-1, w, h], [1, n, 0, -1, 1]]
    shape = data.draw(st.sampled_from(shapes))
    assert same_as_runtime("Reshape", 14, [x, np.array(shape)], {}, data.draw(st.sampled_from([(), (1,)]))) is not None


@st.composite
def resizes(draw: st.DrawFn) -> tuple[str, int, list[Any], dict[str, Any], tuple[int, ...]]:
    opset, mode = draw(st.sampled_from([11, 13, 18, 19])), draw(st.sampled_from(["nearest", "linear", "cubic"]))
    dims = 2 if mode == "cubic" else draw(st.integers(1, 3))
    x = image(draw, dims, 6)
    ways = [
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
        *(["half_pixel_symmetric"] if opset > 18 else []),
    ]
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": draw(st.sampled_from(ways))}
    if mode == "nearest":
        nearest = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attributes["nearest_mode"] = draw(st.sampled_from(nearest))
    else:
        attributes["exclude_outside"] = draw(st.integers(0, 1)) if mode == "cubic" else 0
        attributes |= {"antialias": draw(st.integers(0, 1))} if opset >= 18 else {}
    axes = list(range(x.ndim))
    if opset >= 18 and draw(st.booleans()):
        axes = axes[:1:-1]
        attributes["axes"] = axes
    empty = np.zeros(0, np.float32) if opset < 13 else None
    if draw(st.booleans()):
        sizes = [x.shape[axis] if axis < 2 else draw(st.integers(1, 9)) for axis in axes]
        return "Resize", opset, [x, empty, empty, np.array(sizes)], attributes, draw(st.sampled_from([(), (1, 2, 3)]))
    factors = st.sampled_from([0.4, 0.5, 0.75, 1, 1.3, 2, 2.5, 3, 4])
    scales = np.array([1 if axis < 2 else draw(factors) for axis in axes], np.float32)
    return "Resize", opset, [x, empty, scales], attributes, draw(st.sampled_from([(), (1, 2, 3)]))


@given(resizes())
@settings(QUICK, max_examples=400)
def test_resizing(node: tuple[str, int, list[Any], dict[str, Any], tuple[int, ...]]) -> None:
    attributes = node[3]
    undecided = (
        attributes["coordinate_transformation_mode"] == "half_pixel_symmetric" and attributes["mode"] == "nearest"
    )
    assert (same_as_runtime(*node) is None) == undecided
