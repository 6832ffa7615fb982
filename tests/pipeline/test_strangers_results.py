"""A result folder that comes from anyone: what is in it is tried before it is used, and leads nowhere else."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from clocks import FalseTimer
from commands import images, small_network

import convrewrite
from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files import model as onnx_model
from convrewrite.pipeline import quantising
from convrewrite.results.further import files_of, kept

SETTINGS = convrewrite.Settings(timer=FalseTimer())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = convrewrite.optimize(
        small_network(), images(1), ["separable"], images(16), timer=FalseTimer(), refine=False, fast=True
    )
    return result.save(tmp_path_factory.mktemp("stranger") / "out")


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_its_onnx_file_is_tried_in_a_process_of_its_own_before_it_is_opened(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may loop for ever, or crash onnxruntime."""

    def refuse(path: Path, *_limits: object, **_more: object) -> None:
        raise ModelLoadError(f"{path.name} tried")

    monkeypatch.setattr(onnx_model, "require_well_behaved", refuse)
    with pytest.raises(ModelLoadError, match=r"model\.onnx tried"):
        convrewrite.export_result(out, small_network(), images(1), images(16), to="half")
    with pytest.raises(ModelLoadError, match=r"model\.onnx tried"):
        convrewrite.quantise(out, small_network(), images(1), images(16), settings=SETTINGS)


def test_a_link_in_place_of_its_int8_file_is_replaced_and_not_followed(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(four: Any, _macs: object) -> tuple[()]:
        (four.baseline.folder / "model.int8.onnx").write_text("int8")
        return ()

    monkeypatch.setattr(quantising._Four, "rows", rows)
    monkeypatch.setattr(quantising, "require_tried", lambda *_: None)
    (out.parent / "mine").write_text("mine")
    (out / "model.int8.onnx").symlink_to("../mine")
    convrewrite.quantise(out, small_network(), images(1), images(16), settings=SETTINGS)
    assert (out.parent / "mine").read_text() == "mine"
    assert not (out / "model.int8.onnx").is_symlink()
    assert (out / "model.int8.onnx").read_text() == "int8"


def test_a_recovery_copies_no_device(out: Path, tmp_path: Path) -> None:
    (out / "model.int8.onnx").symlink_to("/dev/zero")
    (out / "model.onnx.12345678.data").symlink_to("/dev/zero")
    (out / "model.mlpackage").mkdir()
    (out / "model.mlpackage" / "endless").symlink_to("/dev/zero")
    onnx, further = files_of(out)
    assert [path.name for path in (*onnx, *further)] == ["model.onnx", "model.mlpackage"]
    kept([*onnx, *further], tmp_path)
    assert (tmp_path / "kept" / "model.mlpackage" / "endless").is_symlink()
