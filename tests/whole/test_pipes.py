"""Named pipes in the places of files: to open one would never end, nor hear of an interrupt."""

import os
from pathlib import Path

import pytest
import torch
from commands import call

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.onnx_graph import open_onnx
from convrewrite.pipeline.sweeping import Sweep
from convrewrite.results.digests import require_reported
from convrewrite.tuning.checkpoint import load_checkpoint, require_place

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_in_the_place_of_a_checkpoint(pipe: Path) -> None:
    with pytest.raises(UsageError, match="expected a checkpoint of a training, found no regular file; move it away"):
        require_place(pipe)
    with pytest.raises(UsageError, match="found no regular file"):
        load_checkpoint(pipe, "run", {"weight": torch.zeros(1)})


def test_in_the_place_of_a_report(pipe: Path) -> None:
    pipe.rename(pipe.with_name("report.json"))
    require_reported(pipe.parent, ("plan.json",))  # it describes nothing


def test_in_the_place_of_a_sweep(pipe: Path) -> None:
    pipe.rename(pipe.with_name("sweep.json"))
    (pipe.parent / "plans").mkdir()
    (pipe.parent / "plans" / "own.json").write_text("{}")
    with pytest.raises(UsageError, match="expected a new folder or an earlier sweep, found plans"):
        Sweep.check(pipe.parent)


def test_in_the_place_of_a_graph_and_of_labels(pipe: Path) -> None:
    with pytest.raises(ModelLoadError, match="no regular file; expected an ONNX file"):
        open_onnx(str(pipe), trust=False, seconds=5.0)
    ran = call("verify", pipe, pipe)
    assert ran.code != 0 and ran.message
