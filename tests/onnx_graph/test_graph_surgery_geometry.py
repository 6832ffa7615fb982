from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx_surgery_cases import (
    Array,
    assert_same,
    chain_of,
    conv_of,
    file_of,
    halves_of,
    model_of,
    numbers,
    run,
    tensor,
    turned,
    value,
    written,
)  # fmt: skip
from torch import nn
from torch.nn import functional

from convrewrite.errors import ExportError
from convrewrite.layers import SumOfBranches
from convrewrite.onnx_graph.emission import placed_pads
from convrewrite.onnx_graph.file import Replacement
from convrewrite.onnx_graph.surgery import rewritten, write_rewritten

W, B = numbers(8, 4, 3, 3), numbers(8, seed=1)


def replaced(
    weight: Array,
    bias: Array | None,
    x: Array,
    replacement: nn.Module,
    extra: tuple[int, ...],
    folder: Path,
    **attributes: Any,
) -> tuple[list[Array], list[Array], onnx.ModelProto]:
    """Outputs of a model of one convolution, those after its replacement, and the model afterwards."""
    op = attributes.pop("op", "Conv")
    nodes = [helper.make_node(op, ["x", "w", *([] if bias is None else ["b"])], ["y"], "conv", **attributes)]
    weights = [tensor("w", weight), *([] if bias is None else [tensor("b", bias)])]
    axes = ["l", "k", "j"][: x.ndim - 2]
    ends = [value("x", ["n", x.shape[1], *axes])], [value("y", ["n", "c", *(f"o{axis}" for axis in axes)])]
    model = model_of(nodes, weights, *ends)
    after, path = written(file_of(model), [Replacement(0, replacement, pads=extra)], folder)
    return run(model, x=x), run(path, x=x), after


IMAGE = numbers(2, 4, 11, 12, seed=2)


@pytest.mark.parametrize("made", [chain_of, halves_of])
@pytest.mark.parametrize(
    ("attributes", "geometry", "pads"),
    [
        ({"pads": [2, 1, 2, 1]}, {"padding": (2, 1)}, ()),
        ({"strides": [2, 1], "dilations": [1, 2]}, {"stride": (2, 1), "dilation": (1, 2)}, ()),
        ({"pads": [0, 1, 1, 0], "strides": [2, 2]}, {"stride": 2}, (0, 1, 1, 0)),
        ({"pads": [1, 2, 3, 1]}, {"padding": 1}, (0, 1, 2, 0)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"stride": 2}, (1, 0, 1, 1)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"stride": 2}, (1, 1, 1, 0)),
        ({"pads": [2, 2, 2, 2], "dilations": [2, 2]}, {"padding": "same", "dilation": 2}, ()),
        ({"auto_pad": "VALID"}, {"padding": "valid"}, ()),
    ],
    ids=["symmetric", "strided", "asymmetric", "more", "same upper", "same lower", "same", "valid"],
)
def test_geometries(
    attributes: dict[str, Any], geometry: dict[str, Any], pads: tuple[int, ...], made: Any, tmp_path: Path
) -> None:
    before, result, after = replaced(W, B, IMAGE, made(W, B, **geometry), pads, tmp_path, **attributes)
    assert_same(before, result)
    assert {node.op_type for node in after.graph.node} <= {"Conv", "Add"}  # pads need no nodes of their own


def test_groups(tmp_path: Path) -> None:
    weight, matrix = numbers(8, 2, 3, 3), np.zeros((4, 2), np.float64)
    matrix[:2], matrix[2:] = turned(2), turned(2).T
    split = np.concatenate([np.einsum("oikl,ji->ojkl", weight[g * 4 :][:4], matrix[g * 2 :][:2]) for g in (0, 1)])
    first, second = conv_of(matrix[:, :, None, None], groups=2), conv_of(split, B, groups=2, padding=1)
    before, result, _ = replaced(
        weight, B, IMAGE, nn.Sequential(first, second), (), tmp_path, group=2, pads=[1, 1, 1, 1]
    )
    assert_same(before, result)


def test_pads_of_each_axis_go_where_its_kernel_is(tmp_path: Path) -> None:
    column, row = numbers(4, 4, 3, 1, seed=7), numbers(8, 4, 1, 3, seed=8)
    weight = np.einsum("mikl,omnp->oikp", column[:, :, :, :1], row[:, :, :1])
    chain = nn.Sequential(conv_of(column), conv_of(row, B))
    before, result, after = replaced(weight, B, IMAGE, chain, (1, 2, 0, 3), tmp_path, pads=[1, 2, 0, 3])
    assert_same(before, result)
    found = [
        list(attribute.ints) for node in after.graph.node for attribute in node.attribute if attribute.name == "pads"
    ]
    assert found == [[1, 0, 0, 0], [0, 2, 0, 3]]


def test_pads_stay_first_where_a_bias_or_a_stride_is_between() -> None:
    plain, biased = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1)
    strided, last = nn.Conv2d(2, 2, 1, stride=(2, 1), bias=False), nn.Conv2d(2, 2, 3)
    pads = (1, 2, 3, 4)
    assert placed_pads([plain, last], pads) == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert placed_pads([biased, last], pads) == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert placed_pads([strided, last], pads) == [[1, 0, 3, 0], [0, 2, 0, 4]]
    assert placed_pads([plain, plain], pads) == [[1, 2, 3, 4], [0, 0, 0, 0]]
    assert placed_pads([plain, last], ()) == [[0] * 4, [0] * 4]


@pytest.mark.parametrize("bias", [True, False])
def test_pads_before_a_bias_in_the_middle_are_exact(bias: bool, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 1, bias=bias), nn.Conv2d(4, 8, 3))
    _, result, _ = replaced(W, B, IMAGE, module, (2, 0, 1, 1), tmp_path)
    with torch.no_grad():
        want = module(functional.pad(torch.from_numpy(IMAGE), (0, 1, 2, 1)))
    assert_same([want.numpy()], result)


def test_negative_pads_cut(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    _, result, after = replaced(W, B, IMAGE, nn.Sequential(conv), (-1, 0, 0, -2), tmp_path)
    with torch.no_grad():
        want = conv(torch.from_numpy(IMAGE)[:, :, 1:, :-2])
    assert_same([want.numpy()], result)
    assert [node.op_type for node in after.graph.node] == ["Pad", "Conv"]


def test_one_dimension(tmp_path: Path) -> None:
    x, weight = numbers(2, 4, 15, seed=2), numbers(8, 4, 5)
    first, second = nn.Conv1d(4, 4, 1, bias=False), nn.Conv1d(4, 8, 5, padding=2, stride=2)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(turned(4))[:, :, None])
        second.weight.copy_(torch.from_numpy(np.einsum("oik,ji->ojk", weight.astype(np.float64), turned(4))))
        assert second.bias is not None
        second.bias.copy_(torch.from_numpy(B))
    before, result, _ = replaced(weight, B, x, nn.Sequential(first, second), (0, 1), tmp_path, pads=[2, 3], strides=[2])
    assert_same(before, result)


def test_three_dimensions(tmp_path: Path) -> None:
    conv = nn.Conv3d(4, 8, (3, 2, 1), padding=(1, 0, 0), stride=(1, 2, 1))
    weight, bias = conv.weight.detach().numpy(), conv.bias
    assert bias is not None
    before, result, _ = replaced(
        weight, bias.detach().numpy(), numbers(1, 4, 5, 6, 7), conv, (0, 1, 0, 0, 0, 2), tmp_path,
        pads=[1, 1, 0, 1, 0, 2], strides=[1, 2, 1],
    )  # fmt: skip
    assert_same(before, result)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed(kind: Any, groups: int, tmp_path: Path) -> None:
    conv = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups, dilation=1)
    axes = len(conv.kernel_size)
    pointwise = (nn.Conv1d if axes == 1 else nn.Conv2d)(4, 4, 1, bias=False)
    module = nn.Sequential(pointwise, kind(4, 6, 3, 2, 1, 1, groups))
    with torch.no_grad():
        pointwise.weight.copy_(torch.eye(4).reshape(4, 4, *[1] * axes) * 2)
        module[1].weight.copy_(conv.weight / 2)
        module[1].bias.copy_(conv.bias)
    before, result, after = replaced(
        conv.weight.detach().numpy(), conv.bias.detach().numpy(), numbers(2, 4, *[6, 7][:axes]), module, (), tmp_path,
        op="ConvTranspose", strides=[2] * axes, pads=[1] * (2 * axes), output_padding=[1] * axes, group=groups,
    )  # fmt: skip
    assert_same(before, result)
    assert [node.op_type for node in after.graph.node] == ["Conv", "ConvTranspose"]


@pytest.mark.parametrize(("pads", "given"), [([1, 1, 0, 0], [0, 0]), ([2, 1, 1, 0], [0, 0]), ([1, 0, 0, 0], [0, 1])])
def test_a_transposed_one_that_cuts_more_before_than_after(pads: list[int], given: list[int], tmp_path: Path) -> None:
    """torch has it as an output padding beyond the stride, which onnxruntime opens and does not run."""
    strides, extra = (1, 2), (1, given[1] + pads[1] - pads[3])
    conv = nn.ConvTranspose2d(4, 6, 3, strides, (pads[0], pads[1]), extra, dilation=2)
    assert conv.bias is not None
    pointwise = nn.Conv2d(4, 4, 1, bias=False)
    with torch.no_grad():
        pointwise.weight.copy_(torch.eye(4).reshape(4, 4, 1, 1))
    before, result, after = replaced(
        conv.weight.detach().numpy(), conv.bias.detach().numpy(), numbers(2, 4, 6, 7), nn.Sequential(pointwise, conv), (),
        tmp_path, op="ConvTranspose", strides=list(strides), pads=pads, output_padding=given, dilations=[2, 2],
    )  # fmt: skip
    assert_same(before, result)
    assert [node.op_type for node in after.graph.node] == ["Conv", "ConvTranspose"]


def test_zeros_around_the_input_of_a_transposed_one_need_a_pad(tmp_path: Path) -> None:
    conv = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1)
    _, result, after = replaced(W, B, IMAGE, conv, (1, 0, 2, 1), tmp_path)
    with torch.no_grad():
        want = conv(functional.pad(torch.from_numpy(IMAGE), (0, 1, 1, 2)))
    assert_same([want.numpy()], result)
    assert [node.op_type for node in after.graph.node] == ["Pad", "ConvTranspose"]


@pytest.mark.parametrize("opset", [1, 2, 10, 11, 17, 20])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes_are_a_pad_of_their_own(mode: Any, opset: int, tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode=mode)
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[3, 3])]
    model = model_of(nodes, [tensor("w", W)], [value("x", ["n", 4, 11, 12])], opset=opset)
    replacement = [Replacement(0, nn.Sequential(conv), pads=(1, 0, 0, 0))]
    if mode == "circular" and opset < 19:
        with pytest.raises(ExportError, match=f"expected operators of version 19, .* found {opset}"):
            rewritten(file_of(model), replacement)
        return
    after, _ = rewritten(file_of(model), replacement)
    onnx.checker.check_model(after)
    assert [node.op_type for node in after.graph.node] == ["Pad", "Pad", "Conv"]
    if opset < 7:
        return  # onnxruntime has no Pad of these versions
    with torch.no_grad():
        want = conv(functional.pad(torch.from_numpy(IMAGE), (0, 0, 1, 0)))
    write_rewritten(file_of(model), replacement, tmp_path / "result.onnx")
    assert_same([want.numpy()], run(tmp_path / "result.onnx", x=IMAGE))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernels_that_keep_the_size(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 8, (2, 4), padding="same", dilation=(1, 3))
    _, result, _ = replaced(W, B, IMAGE, SumOfBranches([nn.Sequential(conv), nn.Sequential(conv)]), (), tmp_path)
    with torch.no_grad():
        assert_same([(2 * conv(torch.from_numpy(IMAGE))).numpy()], result)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(torch.relu(self.norm(self.stem(x)))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_what_torch_exports_takes_any_batch_afterwards(dynamo: bool, tmp_path: Path) -> None:
    network = Network().eval()
    source = tmp_path / "source.onnx"
    axes: dict[str, Any] = {"dynamic_shapes": ({0: "n"},)} if dynamo else {"dynamic_axes": {"input": {0: "n"}}}
    torch.onnx.export(
        network, (torch.randn(2, 4, 6, 6),), str(source), input_names=["input"], dynamo=dynamo, verbose=False, **axes
    )
    model = onnx.load(str(source), load_external_data=False)
    file = file_of(model, tmp_path, source)
    replacements = []
    for number, node in enumerate(model.graph.node):
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        arrays = {t.name: file.array(t) for t in model.graph.initializer}
        weight = torch.from_numpy(np.array(arrays[node.input[1]]))
        conv: Any = nn.Conv2d(4, 8, 3, padding=1) if node.op_type == "Conv" else nn.ConvTranspose2d(8, 4, 2, stride=2)
        with torch.no_grad():
            conv.weight.copy_(weight)
            conv.bias.zero_() if len(node.input) < 3 else conv.bias.copy_(
                torch.from_numpy(np.array(arrays[node.input[2]]))
            )
        replacements.append(Replacement(number, nn.Sequential(conv)))
    assert len(replacements) == 2
    _, path = written(file, replacements, tmp_path)
    for batch in (1, 3):
        x = numbers(batch, 4, 6, 6)
        assert_same(run(source, input=x), run(path, input=x))
