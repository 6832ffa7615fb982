"""Opset and free axes of the ONNX file: as asked, tried, or refused."""

from pathlib import Path

import onnx
import pytest
import torch
from commands import images
from torch import Tensor, nn

import convrewrite
from convrewrite.axes import axes_named, doubled
from convrewrite.errors import ExportError, UsageError
from convrewrite.onnx_files import OnnxModel, opset_of
from convrewrite.runtime import onnx_export
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_free_axes, check_parity

X = images(1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2)).eval()


class Flattening(nn.Module):
    """Holds on to the size of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2 * 14 * 14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


class KeepsItsGrid(nn.Module):
    """Makes what it needs for a size when that is another than the last one, as heads of detectors do with their anchors."""

    grid: tuple[torch.Size, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid[0] != x.shape:
            self.grid = (x.shape, torch.ones_like(x[0, 0]).cumsum(-1))
        return x * self.grid[1]


@pytest.mark.parametrize("axes", [None, ("width",)])
def test_a_size_that_a_model_has_just_seen_is_not_held_to(axes: tuple[str, ...] | None, tmp_path: Path) -> None:
    model = KeepsItsGrid().eval()
    model(x := images(2))
    exported = export(model, x, tmp_path / "m.onnx", free_axes=axes)
    assert exported.dynamic_batch == (axes is None)
    assert model.grid is not None and model.grid[0] == x.shape


def test_axes_go_by_their_names_and_sizes() -> None:
    image, other, vector, scalar = (
        torch.zeros(2, 3, 8, 16),
        torch.zeros(2, 3, 4, 16),
        torch.zeros(2, 5),
        torch.tensor(1.0),
    )
    assert axes_named((image,), ("batch", "height", "width")) == ({0: "batch", 2: "height", 3: "width"},)
    assert axes_named((image, other, vector), ("height", "width")) == (
        {2: "height", 3: "width"}, {2: "height_1", 3: "width"}, {},
    )  # fmt: skip
    assert axes_named((torch.zeros(2, 3, 9),), ("width",)) == ({2: "width"},)
    with pytest.raises(
        UsageError, match="expected an input with an axis for height, found 2x5, a scalar; leave height out"
    ):
        axes_named((vector, scalar), ("height",))


def test_inputs_are_doubled_along_one_axis_by_their_mirror_image() -> None:
    x, vector = torch.arange(12.0).reshape(1, 1, 3, 4), torch.ones(1, 2)
    wide, same = doubled((x, vector), "width")
    assert wide[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    assert same is vector
    assert [tuple(tensor.shape) for tensor in doubled((x, vector), "batch")] == [(2, 1, 3, 4), (2, 2)]
    assert tuple(doubled((x,), "height")[0].shape) == (1, 1, 6, 4)


def test_the_opset_is_as_asked_or_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export(network(), X, tmp_path / "a.onnx", opset=21)
    assert opset_of(onnx.load(str(exported.path))) == 21
    assert exported.note == "the ONNX file has opset 21"
    for opset in (0, 17, onnx.defs.onnx_opset_version() + 1):
        with pytest.raises(
            UsageError, match=rf"(?m)--opset: expected a whole number from 18, .* to \d+, .* found {opset}$"
        ):
            convrewrite.Settings(opset=opset)
    monkeypatch.setattr(onnx_export, "opset_of", lambda _model: 18)
    with pytest.raises(
        ExportError, match=r"expected a file with opset 20, found that torch's exporter gives 18; ask for that"
    ):
        export(network(), X, tmp_path / "b.onnx", opset=20)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(
    ("axes", "shape"), [((), (1, 3, 16, 16)), (("batch", "height", "width"), ("batch", 3, "height", "width"))]
)
def test_the_file_takes_any_size_along_the_axes_that_were_asked_for(
    axes: tuple[str, ...], shape: tuple[object, ...], tmp_path: Path
) -> None:
    model = network()
    exported = export(model, X, tmp_path / "a.onnx", free_axes=axes)
    runtime = OnnxModel(exported.path)
    assert runtime.input_shapes == (shape,)
    assert exported.dynamic_batch == ("batch" in axes)
    assert exported.note is not None and all(name in exported.note for name in axes)
    sizes = [24 if isinstance(size, str) else size for size in shape]
    x = torch.randn(*sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(runtime(x)["output"], model(x), rtol=1e-4, atol=1e-5)
    beyond = [name for name in axes if name != "batch"]
    parity = check_parity(model, exported.path, (X,), free=beyond)
    assert parity.passed
    assert parity.inputs_checked == (2 if "batch" in axes else 1) + len(beyond)


def test_a_model_or_a_graph_that_holds_on_to_a_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.onnx"
    with pytest.raises(ExportError, match=r"no ONNX form that takes any height: .*; name fewer axes"):
        export(Flattening(), X, path, free_axes=("height",))
    with pytest.raises(
        UsageError, match="--free-axes: expected none, or each once of batch, height, width, found 'depth'"
    ):
        export(network(), X, path, free_axes=("depth",))
    original = onnx_export._torch_export
    monkeypatch.setattr(onnx_export, "_torch_export", lambda draft, inputs, _free: original(draft, inputs, None))
    with pytest.raises(ExportError, match="the exported graph holds on to the width of the example; leave it out"):
        export(network(), X, path, free_axes=("width",))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_at_another_size_is_refused(tmp_path: Path) -> None:
    path = export(network(1), X, tmp_path / "a.onnx", free_axes=("width",)).path
    with pytest.raises(
        ExportError, match=r"--free-axes: at another width: output 'output': expected onnxruntime within"
    ):
        check_free_axes(network(0), path, (X,), ("width",))
    with pytest.raises(
        ExportError, match=r"at another height: the ONNX file: input 'input': expected shape \(1, 3, 16, width\), found"
    ):
        check_free_axes(network(1), path, (X,), ("height",))
    check_free_axes(network(1), path, (X,), ("width",))
    with pytest.raises(
        ExportError, match=r"does not run itself at another width, on inputs of 1x3x16x32: .*leave width out"
    ):
        check_free_axes(Flattening(), path, (X,), ("width",))


class Rest(nn.Module):
    """A convolution of all that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, first: Tensor, *rest: Tensor, **_ignored: object) -> Tensor:
        return self.conv(sum(rest, first))


@pytest.mark.parametrize("axes", [None, ("batch", "height")])
def test_inputs_that_are_taken_as_a_tuple_are_free_alike(axes: tuple[str, ...] | None, tmp_path: Path) -> None:
    model, inputs = Rest().eval(), tuple(torch.randn(2, 3, 8, 8) for _ in range(3))
    exported = export(model, inputs, tmp_path / "model.onnx", free_axes=axes)
    assert exported.dynamic_batch
    assert check_parity(model, exported.path, tuple(torch.randn(5, 3, 8, 8) for _ in range(3))).passed


class Branches(nn.Module):
    """Computes something else where an axis is longer than a limit."""

    def __init__(self, axis: int, limit: int) -> None:
        super().__init__()
        self.axis, self.limit = axis, limit

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[self.axis] > self.limit else x


@pytest.mark.parametrize(
    ("branches", "axis", "why"),
    [
        (Branches(0, 16), "batch", "is right only where the batch is at most 16"),
        (Branches(0, 3), "batch", "is right only where the batch is at least 4"),
        (Branches(0, 1), "batch", "computes another output for one example"),
        (Branches(-1, 40), "width", "is right only where the width is at most 40"),
    ],
    ids=["more", "less", "one", "width"],
)
def test_a_file_does_not_claim_sizes_at_which_its_model_takes_another_branch(
    branches: nn.Module, axis: str, why: str, tmp_path: Path
) -> None:
    x = images(4)
    with pytest.raises(ExportError, match=f"--free-axes: .*{why}; leave that axis out"):
        export(branches, x, tmp_path / "a.onnx", free_axes=(axis,))


def test_where_no_axes_were_asked_for_such_a_file_has_a_fixed_batch(tmp_path: Path) -> None:
    exported = export(Branches(0, 16), images(4), tmp_path / "a.onnx")
    assert not exported.dynamic_batch
    assert exported.note == "batch size fixed at 4: the exported graph is right only where the batch is at most 16"


def test_a_single_number_as_first_input_has_no_axis_to_free(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def forward(self, factor: Tensor, x: Tensor) -> Tensor:
            return x * factor

    inputs = (torch.tensor(2.0), images(1))
    assert export(Scaled(), inputs, tmp_path / "a.onnx", free_axes=("batch",)).dynamic_batch
    note = export(Scaled(), inputs, tmp_path / "a.onnx").note
    assert note is not None and note.startswith("batch size fixed at 1: the inputs' shapes a scalar, 1x3x16x16 have no")


def test_a_view_of_every_second_pixel_leaves_the_batch_free(tmp_path: Path) -> None:
    exported = export(network(), torch.randn(2, 3, 32, 32)[:, :, ::2, ::2], tmp_path / "a.onnx")
    assert (exported.dynamic_batch, exported.note) == (True, None)
