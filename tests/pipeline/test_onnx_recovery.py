"""Recovery of results whose model came as ONNX: into the graph again, or refused where no gradient passes."""

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from clocks import FalseTimer
from commands import images
from onnx_texts import CLASSIFIER, CLASSIFIER_SHAPES, graph

import convrewrite
from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.onnx_graph import building, read_network
from convrewrite.rules import Rule

RULE = Rule(name="low", structures=("asymmetric",), ratio=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    onnx.save(graph(CLASSIFIER, CLASSIFIER_SHAPES), str(folder / "model.onnx"))
    asked = convrewrite.Settings(timer=FalseTimer())
    convrewrite.optimize(folder / "model.onnx", None, [RULE], "weights", settings=asked).save(folder / "out")
    return folder


def scores(path: Path) -> torch.Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": images(8).numpy()})[0])


def test_the_module_of_a_folder_computes_what_its_graph_does(place: Path) -> None:
    original = read_network(place / "model.onnx").module
    with torch.no_grad():
        found = convrewrite.load(place / "out", original)(images(8))["logits"]
    assert torch.allclose(found, scores(place / "out" / "model.onnx"), rtol=1e-4, atol=1e-4)


def test_a_graph_is_recovered_and_the_new_one_written(place: Path, tmp_path: Path) -> None:
    model = place / "model.onnx"
    found = convrewrite.recover(place / "out", model, images(60), epochs=8, batch=16, rate=0.02, timer=FalseTimer())
    told = found.report.recovered
    assert told is not None and told.after < 0.5 * told.before
    found.save(tmp_path / "new")
    assert not (tmp_path / "new" / "weights.safetensors").exists()
    with torch.no_grad():
        expected = found.model(images(8))["logits"]
    assert torch.allclose(scores(tmp_path / "new" / "model.onnx"), expected, rtol=1e-4, atol=1e-4)
    again = convrewrite.recover(tmp_path / "new", model, images(60), epochs=1, batch=16, measure=False)
    assert again.report.recovered is not None
    assert again.report.recovered.before == pytest.approx(told.after, rel=1e-3)


def test_weights_that_would_not_be_in_the_graph_are_not_trained(place: Path) -> None:
    with pytest.raises(UsageError, match=r"expected to train rewritten sites alone, .*found --all; leave it out"):
        convrewrite.recover(place / "out", place / "model.onnx", images(60), epochs=1, everything=True, measure=False)
    module = read_network(place / "model.onnx").module  # as the command has it
    with pytest.raises(UsageError, match=r"^\S+model\.onnx: expected to train"):
        convrewrite.recover(place / "out", module, images(60), images(1), epochs=1, everything=True, measure=False)


def test_a_graph_that_onnxruntime_runs_a_part_of_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {name: made for name, made in building.OPERATORS.items() if name != "Flatten"}
    monkeypatch.setattr(building, "OPERATORS", without)
    onnx.save(graph(CLASSIFIER, CLASSIFIER_SHAPES), str(tmp_path / "model.onnx"))
    asked = convrewrite.Settings(measure=False)
    result = convrewrite.optimize(tmp_path / "model.onnx", None, [RULE], "weights", settings=asked)
    with pytest.raises(UsageError, match=r"expected a graph that torch computes throughout, .*Flatten"):
        convrewrite.recover(result, tmp_path / "model.onnx", images(60), epochs=1, measure=False)


def test_a_folder_without_its_graph_is_refused(place: Path, tmp_path: Path) -> None:
    original = read_network(place / "model.onnx").module
    for name in ("plan.json", "report.json"):
        (tmp_path / name).write_bytes((place / "out" / name).read_bytes())
    with pytest.raises(ModelLoadError, match=r"model\.onnx: missing"):
        convrewrite.load(tmp_path, original)
    (tmp_path / "model.onnx").write_bytes((place / "model.onnx").read_bytes())
    with pytest.raises(ModelLoadError, match=r"model\.onnx: the folder is not what its report describes"):
        convrewrite.load(tmp_path, original)
    (tmp_path / "report.json").unlink()
    with pytest.raises(ModelLoadError, match="expected numbers of shape"):
        convrewrite.load(tmp_path, original)
