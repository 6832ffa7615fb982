import logging
import os
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor, nn

from convrewrite.errors import ExportError, TraceError, UsageError
from convrewrite.onnx_files import placing
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.onnx_files.placing import is_weights_of, size_of
from convrewrite.runtime import onnx_export
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity, wrong_for_one

IMAGE = (1, 4, 12, 12)


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, *IMAGE[1:], generator=torch.Generator().manual_seed(batch))


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, image: Tensor, shift: Tensor, unused: Tensor) -> dict[str, object]:
        y = self.conv(image) + shift[:, :, None, None]
        return {"z": y, "count": 3, "nothing": None, "a": (y.mean((2, 3)), shift)}


class BatchOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)).reshape(2, 400)


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(x)
        return values


class BranchesOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, dilation=2, padding=1),
        nn.Conv2d(4, 8, (2, 4), padding="same"),
        nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", stride=2),
        nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
    ],
    ids=["grouped", "dilated", "same", "reflect", "circular", "transposed"],
)
def test_every_geometry_exports_with_parity_at_two_batch_sizes(conv: nn.Module, tmp_path: Path) -> None:
    model = seeded(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
    exported = export(model, (images(1),), tmp_path / "model.onnx")
    assert exported == onnx_export.Exported(tmp_path / "model.onnx", dynamic_batch=True)
    parity = check_parity(model, exported.path, (images(3),))
    assert parity.passed
    assert parity.inputs_checked == 2


def test_names_of_inputs_and_outputs_follow_the_model(tmp_path: Path) -> None:
    model, inputs = TwoInputs(), (images(1), torch.ones(1, 4), torch.ones(1, 2))
    exported = export(model, inputs, tmp_path / "model.onnx")
    runtime = OnnxModel(exported.path)
    assert runtime.input_names == ("input.0", "input.1", "input.2")
    assert runtime.output_names == ("output.z", "output.a.0", "output.a.1")
    assert exported.dynamic_batch
    assert check_parity(model, exported.path, inputs).passed


def test_one_plain_output_keeps_names_and_parameter_names(tmp_path: Path) -> None:
    exported = export(nn.Sequential(nn.Conv2d(4, 2, 3)), (images(2),), str(tmp_path / "model.onnx"), opset=19)
    model = onnx.load(str(exported.path))
    assert [entry.name for entry in model.graph.input] == ["input"]
    assert [entry.name for entry in model.graph.output] == ["output"]
    assert {entry.name for entry in model.graph.initializer} == {"0.weight", "0.bias"}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [19]


class CastsInside(nn.Conv2d):
    def __init__(self) -> None:
        super().__init__(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class NoRepr(nn.Conv2d):
    def __repr__(self) -> str:
        raise KeyError("channels")


def test_a_model_whose_repr_raises_is_exported_with_parity(tmp_path: Path) -> None:
    model = seeded(nn.Sequential(NoRepr(4, 4, 3), nn.ReLU())).eval()
    with pytest.raises(KeyError):
        repr(model)
    exported = export(model, images(), tmp_path / "m.onnx")
    assert exported.dynamic_batch
    assert OnnxModel(exported.path).output_names == ("output",)
    assert check_parity(model, exported.path, (images(3),)).passed


class Clamps(nn.Module):
    """Bounds of two kinds, which torch's exporter alone has no ONNX form for."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.arange(3, device=x.device).clip(max=1.5, min=0).sum()
        return torch.clamp(x, 0, max=0.5) + torch.ops.aten.clamp.default(-x, 0, 0.25) + (x * 2).clamp_(-1, 0.5) + whole


def test_bounds_of_two_kinds_are_exported_with_parity(tmp_path: Path) -> None:
    exported = export(Clamps().eval(), images(), tmp_path / "m.onnx")
    assert exported.dynamic_batch
    assert check_parity(Clamps().eval(), exported.path, (images(3),)).passed


class PairInOneBatch(nn.Module):
    """Both images go through the convolution in one batch, whose halves are taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        first, second = self.conv(torch.cat([left, right])).chunk(2)
        return first * second


def test_chunks_of_a_batch_of_any_size_are_exported_with_parity(tmp_path: Path) -> None:
    model = seeded(PairInOneBatch()).eval()
    exported = export(model, (images(), images()), tmp_path / "model.onnx")
    assert exported == onnx_export.Exported(tmp_path / "model.onnx", dynamic_batch=True)
    for count in (1, 2, 5):
        assert check_parity(model, exported.path, (images(count), images(count + 7)[:count])).passed


class BoundedNorm(nn.Conv2d):
    """Writes its weight before every call, as EEGNet does."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


def test_a_weight_that_the_forward_writes_is_exported_as_it_is_then(tmp_path: Path) -> None:
    model = BoundedNorm(4, 4, 3).eval()
    exported = export(model, images(), tmp_path / "m.onnx")
    assert exported.dynamic_batch
    assert check_parity(model, exported.path, (images(3),)).passed


class FreesMemory(nn.Module):
    """As reversible networks do in their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, _ = (half.contiguous() for half in x.chunk(2, dim=1))
        y = self.conv(x) + first.mean()
        with torch.no_grad():
            first.set_()
            x.data.set_()
        return y


def test_a_model_that_frees_tensors_is_exported_with_parity_and_frees_them_again_afterwards(tmp_path: Path) -> None:
    model = seeded(FreesMemory()).eval()
    exported = export(model, images(), tmp_path / "m.onnx")
    assert exported.dynamic_batch
    assert check_parity(model, exported.path, (images(3),)).passed
    assert torch.ones(3).set_().numel() == 0


def test_a_batch_that_the_model_fixes_is_exported_fixed_with_the_reason(tmp_path: Path) -> None:
    model = BatchOfTwo()
    exported = export(model, (images(2),), tmp_path / "model.onnx")
    assert not exported.dynamic_batch
    assert exported.note is not None
    assert exported.note.startswith("batch size fixed at 2: ")
    assert "\n" not in exported.note
    parity = check_parity(model, exported.path, (images(5)[:2],))
    assert parity.passed
    assert parity.inputs_checked == 1


class Windows(nn.Module):
    """Computes the number of examples from that of windows by a division of real numbers, which torch exports as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        n, c, h, w = y.shape
        windows = y.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        batch = int(windows.shape[0] / (h * w / 4 / 4))
        together = windows.view(batch, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, h, w, -1)
        return torch.roll(together, (1, 1), (1, 2)).view(n, h * w, c)


def test_a_graph_that_is_right_for_the_batch_of_the_example_alone_is_exported_fixed(tmp_path: Path) -> None:
    model = seeded(Windows()).eval()
    exported = export(model, images(3), tmp_path / "m.onnx")
    assert exported.note == "batch size fixed at 3: the exported graph does not run for one example"
    assert not exported.dynamic_batch and check_parity(model, exported.path, (images(3),)).passed


class OfSeveral(nn.Module):
    """Takes no single example, or answers it with NaN."""

    def __init__(self, of_one: str) -> None:
        super().__init__()
        self.of_one = of_one

    def forward(self, x: Tensor) -> Tensor:
        if self.of_one == "raises" and x.shape[0] < 2:
            raise ValueError("several")
        return x / (x.shape[0] - 1) * 0


def test_a_graph_that_computes_something_else_for_one_example_is_wrong(tmp_path: Path) -> None:
    export(nn.ReLU(), images(3), tmp_path / "m.onnx")
    assert wrong_for_one(nn.ReLU(), tmp_path / "m.onnx", (images(3),)) is None
    why = wrong_for_one(nn.Sigmoid(), tmp_path / "m.onnx", (images(3),))
    assert why == "the exported graph computes another output for one example"
    for of_one in ("raises", "nan"):
        assert wrong_for_one(OfSeveral(of_one), tmp_path / "m.onnx", (images(3),)) is None, (
            "nothing to hold the file to"
        )


def test_inputs_without_a_common_batch_are_exported_fixed(tmp_path: Path) -> None:
    model = TwoInputs()
    exported = export(model, (images(3), torch.ones(1, 4), torch.ones(1, 2)), tmp_path / "model.onnx")
    assert not exported.dynamic_batch
    assert exported.note is not None
    assert "3x4x12x12, 1x4, 1x2" in exported.note


def test_eval_semantics_and_untouched_training_flags(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exported = export(model, (images(4),), tmp_path / "model.onnx")
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert check_parity(model, exported.path, (images(4),)).passed


@pytest.mark.parametrize(
    ("model", "dtype", "words"),
    [
        (Unsupported(), torch.float32, "linalg_svd"),
        (
            BranchesOnData(),
            torch.float32,
            r"no ONNX form: \w+: in forward, line \d+ of .*test_onnx_export.py \(.*x\.sum\(\)",
        ),
        (CastsInside(), torch.float32, r"onnxruntime.*bfloat16: let its forward do without torch\.autocast"),
        (nn.Conv2d(4, 4, 3), torch.float64, r"onnxruntime.*float64.*model\.float\(\)"),
        (nn.Conv2d(4, 4, 3), torch.bfloat16, r"model\.float\(\)"),
    ],
    ids=["operator", "control-flow", "cast-inside", "float64", "bfloat16"],
)
def test_what_has_no_usable_onnx_form(
    model: nn.Module, dtype: torch.dtype, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        export(model.to(dtype), (images(2).to(dtype),), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_run_is_a_trace_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="Conv2d: the model does not run on input 1x4x12x12"):
        export(nn.Conv2d(7, 1, 1), (images(),), tmp_path / "model.onnx")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="folder does not exist"):
        export(nn.Conv2d(4, 1, 1), (images(),), tmp_path / "missing" / "model.onnx")


def test_nothing_is_printed_and_logging_and_warnings_are_restored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level, list(warnings.filters)
    export(nn.Conv2d(4, 1, 1), (images(),), tmp_path / "model.onnx")
    assert (logger.level, list(warnings.filters)) == before
    assert capfd.readouterr() == ("", "")


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").touch(0o600)
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    exported = export(nn.Conv2d(4, 2, 3), (images(),), tmp_path / "link.onnx")
    assert exported.path == tmp_path / "link.onnx" and exported.path.is_symlink()
    assert OnnxModel(tmp_path / "real.onnx").input_names == ("input",)
    assert (tmp_path / "real.onnx").stat().st_mode & 0o777 == 0o600


def test_a_file_is_onnx_whatever_its_suffix(tmp_path: Path) -> None:
    """For this one onnx would write text."""
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    export(model, x, tmp_path / "m.json", metadata={"made": "here"})
    assert OnnxModel(tmp_path / "m.json").metadata["made"] == "here"
    assert check_parity(model, tmp_path / "m.json", (x,)).passed


def test_weights_beyond_the_limit_stand_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", onnx_export.GRAPH_ALLOWANCE + 100)
    model = nn.Conv2d(4, 64, 3)
    exported = export(model, (images(),), tmp_path / "model.onnx")
    (weights,) = set(tmp_path.iterdir()) - {exported.path}
    assert is_weights_of(weights.name, "model.onnx")
    assert size_of(exported.path) == exported.path.stat().st_size + weights.stat().st_size > 64 * 4 * 9 * 4
    assert exported.note == "weights stand in a second file, model.onnx.*.data, as one holds at most 2 GB"
    assert check_parity(model, exported.path, (images(),)).passed


def test_a_file_and_its_weights_are_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", onnx_export.GRAPH_ALLOWANCE + 100)
    old, new, path = seeded(nn.Conv2d(4, 64, 3)), nn.Conv2d(4, 64, 3), tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes(b"of someone else")
    export(old, (images(),), path)
    before, replace, stood = {file.name for file in tmp_path.iterdir()}, os.replace, []

    def watched(source: Path, target: Path, refused: str = "") -> None:
        stood.append(check_parity(old, path, (images(),)).passed)
        if target.name == refused:
            raise PermissionError(1, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(placing, "os", SimpleNamespace(replace=partial(watched, refused="model.onnx")))
    with pytest.raises(UsageError, match="cannot be written"):
        export(new, (images(),), path)
    assert {file.name for file in tmp_path.iterdir()} == before
    monkeypatch.setattr(placing, "os", SimpleNamespace(replace=watched))
    export(new, (images(),), path)
    assert stood == [True] * 4  # before the weights and before the file, twice: the earlier pair is whole
    assert check_parity(new, path, (images(),)).passed
    assert len(list(tmp_path.iterdir())) == len(before), "the earlier weights are gone"
    assert (tmp_path / "model.onnx.data").read_bytes() == b"of someone else"


def test_metadata_other_than_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata: expected texts by texts"):
        export(nn.Conv2d(3, 2, 3), images(1), tmp_path / "net.onnx", metadata={"epochs": 3})  # type: ignore[dict-item]


def test_a_disk_without_room_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(draft: SimpleNamespace, *_others: object) -> None:
        draft.path.with_name(f"{draft.path.name}.room").symlink_to("/dev/full")
        raise AssertionError("Artifact of type=precompile already registered")

    monkeypatch.setattr(onnx_export, "_torch_export", fails)
    with pytest.raises(UsageError, match=rf"{tmp_path}.*: cannot be written \(No space left on device\)"):
        export(nn.Conv2d(4, 4, 3), (images(),), tmp_path / "model.onnx")
