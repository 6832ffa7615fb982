"""Runtimes behind one protocol: found, asked, held to torch; and what is said where one is missing, lies, or lacks something."""

import ctypes
import gc
import importlib.metadata
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clocks import FalseTimer
from commands import images, small_network
from onnx import TensorProto, helper
from torch import nn
from unframed import unframed

import convrewrite
from convrewrite.conv import ConvSpec
from convrewrite.errors import ExportError, UsageError, VerificationError
from convrewrite.modules.outputs import named_outputs
from convrewrite.runtime.exporting import TorchExporter
from convrewrite.runtime.latency import compare_programs, time_graphs, time_options
from convrewrite.runtime.option_graphs import OptionGraph, conv_graph, option_program
from convrewrite.runtime.parity import Parity, check_target, require_parity
from convrewrite.runtime.timing import Baseline
from convrewrite.runtime.timing_cache import TimingCache, runtime_of
from convrewrite.signal_stacks import _Stack
from convrewrite.targets import Compiled, OnnxRuntime, Program, Target, discovery, target_of
from convrewrite.targets.kinds.torch_eager import waiting

SPEC = ConvSpec(16, 24, (3, 3), padding=(1, 1), stride=(2, 1))
CHAIN: OptionGraph = ((ConvSpec(16, 16, (3, 3), padding=(1, 1), groups=16, bias=False), ConvSpec(16, 24, (1, 1))),)
HERE = ("onnxruntime", "openvino", "torch", "torch-compile:eager")


@dataclass(frozen=True)
class Lying(OnnxRuntime):
    """Computes something else than it is given."""

    @property
    def name(self) -> str:
        return "liar"

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        run = OnnxRuntime.compile(self, program, inputs, threads)
        return lambda: [1.1 * array for array in run()]


def test_the_runtimes_are_found_by_their_names() -> None:
    assert list(discovery.kinds_of_targets()) == ["onnxruntime", "openvino", "torch-compile", "torch"]
    for name in HERE:
        target = target_of(name)
        assert target.name == name
        assert target.version()[0].isdigit()
        assert target.block() in (8, 16)


def test_another_package_adds_one(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("liar", f"{__name__}:Lying", discovery.ENTRY_POINTS)
    found = {discovery.ENTRY_POINTS: [point]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found.get(group, []))
    assert target_of("liar").name == "liar"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensorrt", "torch-compile, torch, or with an option, as onnxruntime:cuda, found 'tensorrt'"),
        ("onxruntime", r"found 'onxruntime'; did you mean onnxruntime\?"),
        ("torch_compile", r"found 'torch_compile'; did you mean torch-compile\?"),
        ("onnxruntime:cuda", r"expected a provider that the installed onnxruntime has \(cpu\)"),
        ("openvino:NPU", r"expected a device that OpenVINO finds here \(CPU"),
        ("torch:nowhere", "expected a device that the installed torch has, found 'nowhere'"),
        ("torch-compile:nothing", "expected a device or a backend of torch.compile"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        convrewrite.Settings(runtime=text)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without users there is no other one")
def test_nothing_is_compiled_in_a_folder_that_another_user_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch runs what lies there, and everybody knows its place."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("LOGNAME", "somebody")
    assert target_of("torch-compile").version() == torch.__version__
    (tmp_path / "torchinductor_somebody").mkdir(exist_ok=True)  # torch itself may have made it
    assert target_of("torch-compile").version() == torch.__version__
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert target_of("torch-compile:eager").version() == torch.__version__
    with pytest.raises(UsageError, match=r"torch-compile: .*torchinductor_somebody.*another user's; .* in TMPDIR"):
        convrewrite.Settings(runtime="torch-compile")


def test_a_missing_package_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(
        UsageError, match=r"(?m)^--runtime openvino: needs the package openvino, .*; pip install openvino$"
    ):
        target_of("openvino")


@pytest.mark.parametrize("name", HERE)
def test_every_runtime_computes_and_is_timed(name: str) -> None:
    target = target_of(name)
    program, shape = option_program(target, ((SPEC,),), (8, 8), channels=16, dims=2)
    x = torch.ones(shape)
    with target.at_work(1):
        found = target.compile(program, (x,), 1)()
        again = target.compile(program, (x.numpy(),), 1)()
    assert np.array_equal(np.asarray(found[0]), np.asarray(again[0]))
    if target.takes == "module":
        with torch.inference_mode():
            assert torch.equal(torch.as_tensor(found[0]), program.module(x))
    else:
        expected = OnnxRuntime().compile(program, (x,), 1)()[0]
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-6)
    times = time_graphs([((SPEC,),), CHAIN], (8, 8), rounds=2, target=target)
    assert all(0 < seconds < 1 for seconds in times)
    compared = compare_programs(program, program, (x,), target, rounds=2)
    assert compared.runtime == name


def test_times_are_cached_by_the_runtime(tmp_path: Path) -> None:
    cache = TimingCache(tmp_path)
    for name in ("onnxruntime", "openvino"):
        time_options(SPEC, [CHAIN], (8, 8), rounds=1, cache=cache, target=target_of(name), unit=lambda: 1.0)
    assert len(list(tmp_path.iterdir())) == 4


@dataclass(frozen=True)
class WithoutGroups(OnnxRuntime):
    """Cannot run groups."""

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        if b"group" in bytes(program.onnx or b"") and conv_graph(CHAIN, (8, 8)) == program.onnx:
            raise RuntimeError("no groups here")
        return OnnxRuntime.compile(self, program, inputs, threads)


def test_an_option_that_cannot_run_takes_forever_and_an_original_that_cannot_is_an_error() -> None:
    times = time_graphs([((SPEC,),), CHAIN], (8, 8), rounds=1, target=WithoutGroups())
    assert math.isfinite(times[0]) and times[1] == math.inf
    with pytest.raises(VerificationError, match=r"cannot run the model .*: no groups here; choose another runtime"):
        time_graphs([CHAIN], (8, 8), rounds=1, target=WithoutGroups())


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_load_is_an_error_and_not_the_processor() -> None:
    with pytest.raises(
        VerificationError, match=r"onnxruntime:cuda: cannot run .* expected CUDAExecutionProvider to load"
    ):
        time_graphs([((SPEC,),)], (8, 8), rounds=1, target=OnnxRuntime("cuda"))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_operators_that_are_missing_are_named(name: str, tmp_path: Path) -> None:
    node = helper.make_node("Unheard", ["x"], ["y"], domain="of.mine")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("of.mine", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets, ir_version=9
    )
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(VerificationError, match=f"--runtime {name}: cannot run .*: it has no Unheard; choose another"):
        compare_programs(Program(path), Program(path), (torch.ones(1, 2),), target_of(name))
    if name == "openvino":
        body = [helper.make_node("Neg", ["x"], ["y"])]
        model.functions.append(helper.make_function("of.mine", "Unheard", ["x"], ["y"], body, opsets[:1]))
        assert "onnx.inliner.inline_local_functions" in target_of(name).lacks(Program(model.SerializeToString()))[0]


def test_a_result_is_planned_timed_and_held_to_torch_where_it_will_run() -> None:
    timer = FalseTimer()
    result = convrewrite.optimize(
        small_network(), images(2)[:1], calibration=images(), runtime="openvino", timer=timer, refine=False, fast=True
    )
    report = result.report
    assert set(timer.targets) == {"openvino"}
    assert (report.runtime, report.runtime_version) == ("openvino", target_of("openvino").version())
    assert [(row.runtime, row.passed) for row in report.parity] == [("onnxruntime", True), ("openvino", True)]


def test_a_runtime_that_lies_is_refused() -> None:
    program = Program(onnx=unframed(((SPEC,),), (8, 8)))
    x = (torch.randn(1, 16, 8, 8),)
    expected = {"y": torch.as_tensor(OnnxRuntime().compile(program, x, 1)()[0])}
    require_parity(Parity(check_target(expected, program, x, target_of("openvino")), 1))
    with pytest.raises(
        VerificationError, match=r"expected liar within .* the result there does not compute what the model"
    ):
        require_parity(Parity(check_target(expected, program, x, Lying()), 1))
    with pytest.raises(VerificationError, match="expected 2 outputs, found 1"):
        check_target(expected | {"z": x[0]}, program, x, Lying())


def test_openvino_computes_every_branch_of_an_option() -> None:
    import openvino

    depthwise, pointwise = (ConvSpec(32, 32, (3, 3), padding=(1, 1), groups=32), ConvSpec(32, 32, (1, 1)))
    program, _ = option_program(target_of("openvino"), ((depthwise, pointwise),) * 3, (8, 8), channels=32, dims=2)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(program.onnx), "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert sum(kind.startswith("Convolution") for kind in kinds) == 1 + 6


@pytest.mark.parametrize("name", ["openvino", "openvino:CPU", "openvino:cpu"])
def test_openvino_keeps_to_its_threads_on_the_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    compile_model, asked = openvino.Core.compile_model, list[Any]()

    def noting(core: Any, model: Any, device: str, settings: dict[str, Any]) -> Any:
        asked.append(settings)
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", noting)
    target = target_of(name)
    program, shape = option_program(target, ((SPEC,),), (8, 8), channels=16, dims=2)
    target.compile(program, (torch.ones(shape),), 3)
    assert [(found["INFERENCE_NUM_THREADS"], found["NUM_STREAMS"]) for found in asked] == [(3, 1)]


def test_modules_are_compared_as_modules(tmp_path: Path) -> None:
    timer = FalseTimer(ratio=0.7, file_seconds=0.25)
    model = nn.Conv2d(3, 4, 3).eval()
    baseline = Baseline.of(model, (torch.ones(2, 3, 8, 8),), tmp_path, timer, 1, TorchExporter(), target_of("torch"))
    other = nn.Conv2d(3, 4, 1).eval()
    assert (baseline.ratio(other), baseline.seconds()) == (0.7, 0.25)
    [(a, b, (x,))] = timer.compared
    assert (a, b) == (model, other)
    assert len(x) == 1
    fixed = replace(baseline, original=replace(baseline.original, dynamic_batch=False))
    assert (fixed.ratio(other), fixed.seconds()) == (0.7, 0.125), "seconds are those of one of its two examples"
    assert len(timer.compared[1][2][0]) == 2


def test_an_original_that_the_runtime_cannot_run_is_told_at_the_start(tmp_path: Path) -> None:
    class Nothing(OnnxRuntime):
        @property
        def name(self) -> str:
            return "nothing"

        def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
            raise RuntimeError("no")

    target: Target = Nothing("x")
    with pytest.raises(ExportError, match="--runtime nothing: cannot run"):
        Baseline.of(
            nn.Conv2d(3, 4, 3).eval(), (torch.ones(1, 3, 8, 8),), tmp_path, FalseTimer(), 1, TorchExporter(), target
        )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the stack of signal handlers is looked at as Linux has it"
)
def test_openvino_leaves_the_stack_that_signals_are_handled_on(tmp_path: Path) -> None:
    """It puts one of its own there, and frees it when it is unloaded: the next Ctrl-C would crash."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    path, before = tmp_path / "net.onnx", registered()
    convrewrite.export(small_network(), (images(1),), path)
    run = target_of("openvino").compile(Program(path), [images(1)], 1)
    assert registered() == before
    run()
    assert registered() == before
    del run
    gc.collect()
    assert registered() == before


def registered() -> tuple[int | None, int, int]:
    """What signal handlers of this thread run on."""
    stack = _Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.pointer, stack.flags, stack.size


@pytest.mark.parametrize(
    ("device", "asked"), [("cuda:1", ["cuda:1"]), ("xpu", ["xpu"]), ("mps", [None]), ("cpu", []), ("", [])]
)
def test_a_call_waits_for_the_device_that_it_runs_on(
    device: str, asked: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[str | None] = []
    for kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda which=None: waited.append(which))
    waiting(device)()
    assert waited == asked


def test_times_on_another_graphics_card_are_other_times(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, there = runtime_of(OnnxRuntime()), runtime_of(OnnxRuntime("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "a card")
    assert runtime_of(OnnxRuntime()) == plain
    assert runtime_of(OnnxRuntime("cpu")) == f"{there} (a card)"


class InPlace(nn.Module):
    """Works on the signal that it is given where it stands."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5) + 1


@pytest.mark.parametrize("kind", ["torch", "torch-compile:eager"])
def test_every_call_gets_the_inputs_that_were_given(kind: str) -> None:
    x = torch.arange(1.0, 5.0)
    target = target_of(kind)
    with target.at_work(1):
        run = target.compile(Program(module=InPlace()), (x,), 1)
        for _ in range(3):
            assert run()[0].tolist() == [1.5, 2.0, 2.5, 3.0]
    assert x.tolist() == [1.0, 2.0, 3.0, 4.0]


class Scaled(nn.Module):
    """One of many modules of one class."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_many_modules_of_one_class_stay_compiled_side_by_side() -> None:
    ran: list[int] = []

    def counting(graph: Any, _inputs: object) -> Any:
        return lambda *args: (ran.append(1), graph(*args))[1]

    torch._dynamo.register_backend(name="counting", compiler_fn=counting)
    target = target_of("torch-compile:counting")
    with target.at_work(1):
        runs = [target.compile(Program(module=Scaled(factor)), (torch.ones(2),), 1) for factor in range(12)]
        ran.clear()
        assert [run()[0].tolist() for run in runs] == [[factor, factor] for factor in range(12)]
    assert len(ran) == 12


@dataclass
class Heads:
    scores: torch.Tensor
    others: dict[str, torch.Tensor]


class TwoHeads(nn.Module):
    def forward(self, x: torch.Tensor) -> Heads:
        return Heads(x + 1, {"phases": torch.complex(x, -x).conj()})


@pytest.mark.parametrize("kind", ["torch", "torch-compile:eager"])
def test_modules_give_the_tensors_in_dataclasses(kind: str) -> None:
    """As outputs are named, so that these are compared with them."""
    x, target = torch.randn(1, 4), target_of(kind)
    with target.at_work(1):
        found = target.compile(Program(module=TwoHeads()), (x,), 1)()
    expected = named_outputs(TwoHeads()(x)).values()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
