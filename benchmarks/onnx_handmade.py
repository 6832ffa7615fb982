"""Graphs made by hand, each with one thing that exporters write and torch never would, small enough for a test.

MADE lists them for the benchmark. A builder returns the model; it draws the same weights at every call.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx_corpus import Entry
from onnx_drawing import Drawing, Sizes
from onnx_inputs import Inputs, Maker, garments, noise, one, sounds

SIZE, CHANNELS, WIDE = 32, 16, 32
"""Size of images, and channels of the layers: the least that structures of every family fit into."""

CLASSES = 10
"""Classes that a classifier ends in."""

IMAGE = ("batch", 3, SIZE, SIZE)
LOGITS = ("batch", CLASSES)
"""Sizes of inputs and outputs, the first axis free."""

BOXES = 8
"""Boxes of the detector in height and in width, of which it keeps at most KEPT."""

KEPT = 5


def classified(drawing: Drawing, x: str, channels: int) -> str:
    """The mean of every channel, and a dense layer."""
    return drawing.dense(drawing.node("Flatten", drawing.node("GlobalAveragePool", x)), channels, CLASSES)


def closed(drawing: Drawing, found: str, name: str = "logits") -> str:
    """The output, under the name that the graph gives it."""
    return drawing.node("Identity", found, outputs=[name])


def plain() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, as exporters of torch write them."""
    drawing = Drawing()
    x = "image"
    for before, after, stride in ((3, CHANNELS, 1), (CHANNELS, WIDE, 2), (WIDE, WIDE, 1)):
        x = drawing.conv(x, (before, after), (3, 3), bias=False, strides=[stride, stride])
        x = drawing.node("Relu", drawing.batch_norm(x, after))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("plain", {"image": IMAGE}, {"logits": LOGITS})


def channels_last() -> onnx.ModelProto:
    """From Keras: images (N, H, W, C), and Transposes before and after every Conv."""
    drawing = Drawing(15, prefix="StatefulPartitionedCall/model/")
    x = "image"
    for before, after, stride in ((3, CHANNELS, 1), (CHANNELS, WIDE, 2), (WIDE, WIDE, 1)):
        first = drawing.node("Transpose", x, perm=[0, 3, 1, 2])
        convolved = drawing.conv(
            first, (before, after), (3, 3), auto_pad="SAME_UPPER", strides=[stride, stride], bias=False
        )
        x = drawing.node("Transpose", convolved, perm=[0, 2, 3, 1])
        x = drawing.node("Add", x, drawing.weight("bias", drawing.random.normal(0, 0.1, after).astype(np.float32)))
        x = drawing.node("Relu", x)
    x = drawing.node("ReduceMean", x, axes=[1, 2], keepdims=0)
    closed(drawing, drawing.node("Softmax", drawing.dense(x, WIDE, CLASSES), axis=-1))
    return drawing.model("channels_last", {"image": ("batch", SIZE, SIZE, 3)}, {"logits": LOGITS})


def constant_nodes() -> onnx.ModelProto:
    """From Paddle: weights in Constant nodes, BatchNormalizations and activations in lines of arithmetic, scales reshaped."""
    drawing = Drawing(11, constants=True, prefix="p2o.")
    x = swish(drawing, affine(drawing, drawing.conv("x", (3, CHANNELS), (3, 3), bias=False), CHANNELS))
    x = drawing.conv(x, (CHANNELS, WIDE), (3, 3), bias=False, strides=[2, 2])
    x = excited(drawing, swish(drawing, affine(drawing, x, WIDE)), WIDE)
    x = swish(drawing, affine(drawing, drawing.conv(x, (WIDE, WIDE), (3, 3), bias=False), WIDE))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("constant_nodes", {"x": IMAGE}, {"logits": LOGITS})


def affine(drawing: Drawing, x: str, channels: int) -> str:
    """What is left of a BatchNormalization: a scale and an offset that Reshape spreads over the channels."""
    for op_type, values in (
        ("Mul", drawing.random.uniform(0.5, 1.5, channels)),
        ("Add", drawing.random.normal(0, 0.1, channels)),
    ):
        spread = drawing.node(
            "Reshape", drawing.weight("factors", values.astype(np.float32)), drawing.whole(1, channels, 1, 1)
        )
        x = drawing.node(op_type, x, spread)
    return x


def number(drawing: Drawing, value: float) -> str:
    return drawing.weight("number", np.array(value, np.float32))


def swish(drawing: Drawing, x: str) -> str:
    """The hard swish, x * clip(x + 3, 0, 6) / 6."""
    shifted = drawing.node("Add", x, number(drawing, 3))
    clipped = drawing.node("Clip", shifted, number(drawing, 0), number(drawing, 6))
    return drawing.node("Div", drawing.node("Mul", x, clipped), number(drawing, 6))


def excited(drawing: Drawing, x: str, channels: int) -> str:
    """Squeeze and excitation: every channel is multiplied by a gate made of the means of all."""
    mean = drawing.node("GlobalAveragePool", x)
    squeezed = drawing.node("Relu", drawing.conv(mean, (channels, channels // 4), (1, 1)))
    gates = drawing.node("HardSigmoid", drawing.conv(squeezed, (channels // 4, channels), (1, 1)), alpha=0.2, beta=0.5)
    return drawing.node("Mul", x, gates)


def grouped() -> onnx.ModelProto:
    """Groups, a depthwise layer, dilation, and a shuffle of channels between them."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, WIDE), (3, 3)))
    x = drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (3, 3), groups=2))
    x = drawing.node("Reshape", x, drawing.whole(0, 2, WIDE // 2, SIZE, SIZE))
    x = drawing.node("Reshape", drawing.node("Transpose", x, perm=[0, 2, 1, 3, 4]), drawing.whole(0, WIDE, SIZE, SIZE))
    x = drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (3, 3), groups=WIDE))
    x = drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (3, 3), groups=4, dilations=[2, 2], pads=[2, 2, 2, 2]))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("grouped", {"image": IMAGE}, {"logits": LOGITS})


def transposed() -> onnx.ModelProto:
    """A decoder: ConvTransposes with stride, groups and an output padding, and a Resize."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, WIDE), (3, 3), strides=[4, 4]))
    kernel, bias = (
        drawing.drawn("kernel", (WIDE, CHANNELS, 3, 3), fan=WIDE * 9),
        drawing.drawn("bias", (CHANNELS,), fan=99),
    )
    x = drawing.node("ConvTranspose", x, kernel, bias, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])
    x = drawing.node("Relu", x)
    kernel = drawing.drawn("kernel", (CHANNELS, CHANNELS // 4, 2, 2), fan=16)
    x = drawing.node("Relu", drawing.node("ConvTranspose", x, kernel, strides=[2, 2], group=4))
    x = drawing.conv(x, (CHANNELS, WIDE), (3, 3))
    scales = drawing.weight("scales", np.array([1, 1, 2, 2], np.float32))
    x = drawing.node(
        "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )
    closed(drawing, drawing.conv(x, (WIDE, 1), (3, 3)), "map")
    return drawing.model("transposed", {"image": IMAGE}, {"map": ("batch", 1, 2 * SIZE, 2 * SIZE)})


def one_dimensional() -> onnx.ModelProto:
    """Conv over time, one padded at its beginning only, as causal networks do."""
    drawing = Drawing()
    x = drawing.node("Unsqueeze", "sound", drawing.whole(1))
    x = drawing.node("Relu", drawing.conv(x, (1, CHANNELS), (9,), strides=[4]))
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (5,), pads=[4, 0]))
    x = drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (5,), dilations=[2], pads=[4, 4]))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("one_dimensional", {"sound": ("batch", 256)}, {"logits": LOGITS})


def three_dimensional() -> onnx.ModelProto:
    """Conv over volumes."""
    drawing = Drawing()
    x = drawing.node("Relu", drawing.conv("volume", (1, CHANNELS), (3, 3, 3)))
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3, 3), strides=[2, 2, 2]))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("three_dimensional", {"volume": ("batch", 1, 8, 8, 8)}, {"logits": LOGITS})


def half() -> onnx.ModelProto:
    """All in float16."""
    drawing = Drawing(dtype=np.float16)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3), strides=[2, 2]))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("half", {"image": IMAGE}, {"logits": LOGITS})


def branches() -> onnx.ModelProto:
    """Convs in both bodies of an If, which read what the graph around them made."""
    drawing = Drawing(16)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    mean = drawing.node("ReduceMean", x, keepdims=0)
    bright = drawing.node("Greater", mean, drawing.weight("level", np.array(0.5, np.float32)))
    bodies = [branch(name, x, seed) for seed, name in enumerate(("bright", "dark"), start=1)]
    x = drawing.node("If", bright, then_branch=bodies[0], else_branch=bodies[1])
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3)))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("branches", {"image": IMAGE}, {"logits": LOGITS})


def branch(name: str, outer: str, seed: int) -> onnx.GraphProto:
    inner = Drawing(16, prefix=f"{name}/", seed=seed)
    closed(inner, inner.node("Relu", inner.conv(outer, (CHANNELS, CHANNELS), (3, 3))), f"{name}_found")
    return inner.graph(name, {}, {f"{name}_found": ("batch", CHANNELS, SIZE, SIZE)})


def loop() -> onnx.ModelProto:
    """A Conv in the body of a Loop, which runs twice."""
    inner = Drawing(16, prefix="body/", seed=1)
    closed(inner, inner.node("Relu", inner.conv("state", (CHANNELS, CHANNELS), (3, 3))), "next_state")
    inner.node("Identity", "going", outputs=["still_going"])
    sizes: Sizes = ("batch", CHANNELS, SIZE, SIZE)
    body = inner.graph("body", {"state": sizes}, {"next_state": sizes})
    body.input.insert(0, helper.make_tensor_value_info("step", onnx.TensorProto.INT64, []))
    body.input.insert(1, helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []))
    body.output.insert(0, helper.make_tensor_value_info("still_going", onnx.TensorProto.BOOL, []))
    drawing = Drawing(16)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    steps = drawing.weight("steps", np.array(2, np.int64))
    x = drawing.node("Loop", steps, "", x, body=body)
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3)))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("loop", {"image": IMAGE}, {"logits": LOGITS})


def functions() -> onnx.ModelProto:
    """A function of the file's own, with a Conv, that is called twice."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["convolved"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["convolved"], ["y"]),
    ]
    block = helper.make_function("own", "Block", ["x", "kernel"], ["y"], nodes, [helper.make_opsetid("", 17)])
    drawing = Drawing()
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    for _ in range(2):
        kernel = drawing.drawn("kernel", (CHANNELS, CHANNELS, 3, 3), fan=CHANNELS * 9)
        x = drawing.node("Block", x, kernel, domain="own")
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3)))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("functions", {"image": IMAGE}, {"logits": LOGITS}, functions=[block])


def detector() -> onnx.ModelProto:
    """Boxes and scores, and NonMaxSuppression at the end: how many boxes there are depends on the image."""
    drawing = Drawing(13)
    x = "image"
    for before, after, stride in ((3, CHANNELS, 2), (CHANNELS, WIDE, 2), (WIDE, WIDE, 1)):
        x = drawing.node("Relu", drawing.conv(x, (before, after), (3, 3), strides=[stride, stride]))
    boxes = drawing.node("Sigmoid", drawing.conv(x, (WIDE, 4), (1, 1)))
    boxes = drawing.node("Transpose", drawing.node("Reshape", boxes, drawing.whole(0, 4, BOXES**2)), perm=[0, 2, 1])
    scores = drawing.node("Sigmoid", drawing.conv(x, (WIDE, 3), (3, 3)))
    scores = drawing.node("Reshape", scores, drawing.whole(0, 3, BOXES**2))
    limits = [drawing.weight("limit", np.array([value], np.float32)) for value in (0.5, 0.3)]
    chosen = drawing.node("NonMaxSuppression", boxes, scores, drawing.whole(KEPT), *limits, center_point_box=1)
    where = drawing.node("Gather", chosen, drawing.weight("columns", np.array([0, 2], np.int64)), axis=1)
    drawing.node("GatherND", boxes, where, outputs=["found"])
    closed(drawing, scores, "scores")
    outputs = {"found": (None, 4), "scores": ("batch", 3, BOXES**2)}
    return drawing.model("detector", {"image": IMAGE}, outputs)


def one_example() -> onnx.ModelProto:
    """Made for one image at a time, by its input and by a Reshape to numbers."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3), strides=[2, 2]))
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3), strides=[2, 2]))
    x = drawing.node("Reshape", x, drawing.whole(1, WIDE * BOXES**2))
    closed(drawing, drawing.dense(x, WIDE * BOXES**2, CLASSES))
    return drawing.model("one_example", {"image": (1, 3, SIZE, SIZE)}, {"logits": (1, CLASSES)})


def old() -> onnx.ModelProto:
    """IR version 3, opset 7: initialisers are inputs as well, sizes are attributes."""
    drawing = Drawing(7, as_inputs=True)
    x = drawing.node("Relu", drawing.batch_norm(drawing.conv("image", (3, CHANNELS), (3, 3)), CHANNELS))
    x = drawing.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = drawing.node("Clip", drawing.conv(x, (CHANNELS, WIDE), (3, 3)), min=0.0, max=6.0)
    x = drawing.node("Upsample", x, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")
    x = drawing.node("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4])
    x = drawing.node("Dropout", drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (3, 3))), ratio=0.5)
    x = drawing.node("Flatten", drawing.node("GlobalAveragePool", x))
    matrix, offset = drawing.drawn("matrix", (CLASSES, WIDE), fan=WIDE), drawing.drawn("offset", (CLASSES,), fan=99)
    closed(drawing, drawing.node("Gemm", x, matrix, offset, transB=1))
    return drawing.model("old", {"image": (1, 3, SIZE, SIZE)}, {"logits": (1, CLASSES)}, ir=3)


def same_upper() -> onnx.ModelProto:
    """auto_pad SAME_UPPER at stride 2 of an even size: one zero more after than before. And SAME_LOWER, VALID."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3), auto_pad="SAME_UPPER", strides=[2, 2]))
    x = drawing.node("Relu", drawing.conv(x, (CHANNELS, WIDE), (3, 3), auto_pad="SAME_LOWER", strides=[2, 2]))
    x = drawing.node("MaxPool", x, kernel_shape=[3, 3], strides=[1, 1], auto_pad="SAME_UPPER")
    x = drawing.node("Relu", drawing.conv(x, (WIDE, WIDE), (3, 3), auto_pad="VALID"))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("same_upper", {"image": IMAGE}, {"logits": LOGITS})


def shared_kernel() -> onnx.ModelProto:
    """One kernel of two Convs, and another one that the graph's arithmetic reads as well."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    kernel = drawing.drawn("kernel", (CHANNELS, CHANNELS, 3, 3), fan=CHANNELS * 9)
    for stride in (1, 2):
        x = drawing.node("Relu", drawing.node("Conv", x, kernel, pads=[1, 1, 1, 1], strides=[stride, stride]))
    read = drawing.drawn("kernel", (WIDE, CHANNELS, 3, 3), fan=CHANNELS * 9)
    x = drawing.node("Relu", drawing.node("Conv", x, read, pads=[1, 1, 1, 1]))
    logits = classified(drawing, x, WIDE)
    closed(drawing, drawing.node("Add", logits, drawing.node("ReduceMean", read, keepdims=0)))
    return drawing.model("shared_kernel", {"image": IMAGE}, {"logits": LOGITS})


def moving_kernel() -> onnx.ModelProto:
    """A Conv whose kernel the graph computes from the image, between two that are constant."""
    drawing = Drawing(13)
    x = drawing.node("Relu", drawing.conv("image", (3, CHANNELS), (3, 3)))
    brightness = drawing.node("ReduceMean", x, keepdims=0)
    kernel = drawing.drawn("kernel", (CHANNELS, CHANNELS, 3, 3), fan=CHANNELS * 9)
    x = drawing.node("Conv", x, drawing.node("Mul", kernel, brightness), pads=[1, 1, 1, 1])
    x = drawing.node("Relu", drawing.conv(drawing.node("Relu", x), (CHANNELS, WIDE), (3, 3)))
    closed(drawing, classified(drawing, x, WIDE))
    return drawing.model("moving_kernel", {"image": IMAGE}, {"logits": LOGITS})


def quantised() -> onnx.ModelProto:
    """Convs between QuantizeLinear and DequantizeLinear, kernels in int8, as static quantisation writes them."""
    # Imported here: it takes seconds, and no other graph needs it.
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left: Iterator[dict[str, NDArray[np.float32]]] = iter(
                {"image": picture(1, seed)["image"].numpy()} for seed in range(4)
            )

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(plain(), before)
        quantize_static(before, after, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv", "MatMul"])
        return onnx.load(after)


def picture(count: int, seed: int) -> Inputs:
    return {"image": garments(count, seed, height=SIZE, width=SIZE)}


def picture_of_keras(count: int, seed: int) -> Inputs:
    return {"image": garments(count, seed, height=SIZE, width=SIZE).permute(0, 2, 3, 1).contiguous()}


def half_picture(count: int, seed: int) -> Inputs:
    return {"image": picture(count, seed)["image"].half()}


def written(build: Callable[[], onnx.ModelProto], folder: Path) -> Path:
    """The model in a file of its own."""
    path = folder / "made" / f"{build.__name__}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(build(), path)
    return path


def written_apart(build: Callable[[], onnx.ModelProto], folder: Path) -> Path:
    """The model with its weights in a file beside it."""
    path = folder / "made" / f"{build.__name__}_external" / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("weights.bin").unlink(missing_ok=True)
    onnx.save(build(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def made(build: Callable[[], onnx.ModelProto], inputs: Maker = picture, batch: int = 2) -> Entry:
    return Entry(build.__name__, "by hand", "made", partial(written, build), inputs, batch)


MADE = (
    made(plain),
    Entry("external", "by hand", "made", partial(written_apart, plain), picture, 2),
    made(channels_last, picture_of_keras),
    made(constant_nodes, one("x", partial(garments, height=SIZE, width=SIZE))),
    made(grouped),
    made(transposed),
    made(one_dimensional, one("sound", partial(sounds, samples=256))),
    made(three_dimensional, one("volume", partial(noise, shape=(1, 8, 8, 8)))),
    made(half, half_picture),
    made(branches),
    made(loop),
    made(functions),
    made(detector, batch=1),
    made(one_example, batch=1),
    made(old, batch=1),
    made(same_upper),
    made(shared_kernel),
    made(moving_kernel),
    made(quantised),
)
"""Every builder with inputs for what it makes."""
