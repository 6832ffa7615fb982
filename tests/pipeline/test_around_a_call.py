"""What is around a call, and what it is given: default devices, compiled models, lists of outputs, and things of a wrong kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import natural
from torch import Tensor, nn

import convrewrite
from convrewrite import Result, optimize
from convrewrite.errors import ModelLoadError, TraceError, UsageError
from convrewrite.process import at_work
from convrewrite.rules.schema import Protect, Rule

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.7)
X = natural(24, 3, 10, 10, torch.float32)


COMPILED: list[torch.fx.GraphModule] = []


def backend(graph: torch.fx.GraphModule, _inputs: object) -> Any:
    """Of torch.compile: notes what it is called for."""
    COMPILED.append(graph)
    return graph.forward


class Net(nn.Module):
    def __init__(self, ends: Callable[[Tensor], Any] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.ends = ends

    def forward(self, x: Tensor) -> Any:
        return self.ends(self.body(x).mean((2, 3)))


def rewritten(model: nn.Module, calibration: object = X, **asked: Any) -> Result:
    return optimize(model.eval(), X[:1], [RULE], calibration, **{"measure": False, "fast": True, **asked})


def sites(result: Result) -> list[str]:
    return [row.name for row in result.report.sites if row.action == "rewritten"]


@pytest.mark.parametrize("calibration", [X, "weights"], ids=["inputs", "weights"])
def test_a_default_device_of_the_caller_does_not_reach_inside(calibration: object) -> None:
    model = Net().eval()
    expected = rewritten(model, calibration, fast=False)
    with torch.device("meta"):  # as set_default_device("cuda") is on a machine that has one
        found = rewritten(model, calibration, fast=False)
        recovered = convrewrite.recover(found, model, X, minutes=0.01, measure=False)
        assert torch.get_default_device().type == "meta"
    assert torch.equal(found.model(X), expected.model(X))
    assert next(recovered.model.parameters()).device.type == "cpu"


def test_compiled_models_run_as_they_were_written_meanwhile() -> None:
    model = torch.compile(Net().eval(), backend=backend)
    with torch.no_grad():
        expected = model(X)
    before = len(COMPILED)
    found = rewritten(model)  # type: ignore[arg-type]
    assert len(COMPILED) == before
    assert len(sites(found)) == 2
    assert not any("could not be followed" in note for note in found.report.notes)
    with at_work(0):
        assert torch.equal(Net().eval()(X), expected)
    with torch.no_grad():
        found.model(X)
    assert len(COMPILED) > before  # what is handed back is compiled as it was


@pytest.mark.parametrize("measure", [False, True])
def test_a_list_with_an_output_for_each_example_is_compared_at_the_examples_size(measure: bool) -> None:
    found = rewritten(Net(lambda scores: [{"scores": row} for row in scores]), measure=measure, any_speed=True)
    assert len(sites(found)) == 2
    assert [row.name for row in found.report.fidelity] == ["output.0.scores"]
    assert len(found.model(X[:3])) == 3


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        (lambda scores: scores.to_sparse(), "sparse_coo"),
        (lambda scores: torch.nested.as_nested_tensor(list(scores), layout=torch.jagged), "nested"),
    ],
)
def test_outputs_that_are_not_dense_are_refused(ends: Callable[[Tensor], Any], kind: str) -> None:
    with pytest.raises(TraceError, match=f"expected dense tensors, found a {kind} one as 'output'"):
        rewritten(Net(ends))


def test_what_no_limit_was_set_for_does_not_exceed_one() -> None:
    model = Net()
    with torch.no_grad():
        model.body[2].weight.mul_(1e37)
    reason = next(row.reason for row in rewritten(model).report.sites if row.name == "body.2")
    assert "limit" not in str(reason)
    assert "so large that their squares overflow" in str(reason)


def test_things_of_a_wrong_kind_are_refused_with_what_was_expected(tmp_path: Path) -> None:
    model = Net().eval()
    result = rewritten(model)
    folder = result.save(tmp_path / "out")
    saved = "expected the folder that a result was saved in, as with result.save"
    refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (UsageError, f"{saved}.*found Result", lambda: convrewrite.load(result, model)),  # type: ignore[arg-type]
        (UsageError, f"{saved}.*found Result", lambda: convrewrite.quantise(result, model)),  # type: ignore[arg-type]
        (UsageError, saved, lambda: convrewrite.export_result(result, model, to=["openvino"])),  # type: ignore[arg-type]
        (UsageError, f"{saved}.*found Net", lambda: convrewrite.recover(model, model, X)),  # type: ignore[arg-type]
        (UsageError, "expected the folder to write, found NoneType", lambda: result.save(None)),  # type: ignore[arg-type]
        (UsageError, "the file to write, found NoneType", lambda: convrewrite.export(model, X, None)),  # type: ignore[arg-type]
        (
            UsageError,
            "expected an instance of the original model, found OrderedDict",
            lambda: convrewrite.load(folder, model.state_dict()),  # type: ignore[arg-type]
        ),
        (UsageError, "expected two modules or paths.*found NoneType", lambda: convrewrite.verify(model, None, X)),  # type: ignore[arg-type]
        (UsageError, "paths.*found the class Net", lambda: convrewrite.verify(Net, model, X)),  # type: ignore[arg-type]
        (UsageError, "outputs: expected kinds", lambda: convrewrite.verify(model, model, X, outputs=["x"])),  # type: ignore[arg-type]
        (UsageError, "timeout: expected", lambda: convrewrite.verify(model, model, X, timeout="3")),  # type: ignore[arg-type]
        (UsageError, "timeout: expected", lambda: convrewrite.verify(model, model, X, timeout=-1)),
        (UsageError, "export: expected names", lambda: convrewrite.export_result(folder, model, to=None)),  # type: ignore[arg-type]
        (UsageError, "structures: expected", lambda: convrewrite.load(folder, model, ("x",))),  # type: ignore[arg-type]
        (UsageError, "resource: expected macs", lambda: convrewrite.sweep(model, X, resource=["macs"])),  # type: ignore[arg-type]
        (UsageError, "budgets: expected parts", lambda: convrewrite.sweep(model, X, budgets=[10**400])),
        (ModelLoadError, "expected an ONNX file, found none", lambda: convrewrite.verify(model, "no.onnx", X)),
        (ModelLoadError, "expected an ONNX file, found a folder", lambda: convrewrite.verify(model, folder, X)),
    ]
    for error, text, call in refused:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (X[:0], UsageError, "verify: expected inputs with at least one example, found inputs of 0x3x10x10"),
        (X[:1, :1], TraceError, "Net: the model does not run on input 1x1x10x10"),
        (
            (X, X),
            UsageError,
            r"Net: expected inputs for the parameters that forward takes by position \(x\), found 2 of them",
        ),
    ],
)
def test_inputs_that_verify_cannot_use(inputs: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        convrewrite.verify(Net(), Net(torch.sin), inputs)
