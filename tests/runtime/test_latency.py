import json
import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from unframed import chains_of, unframed

from convrewrite.conv import ConvSpec
from convrewrite.errors import UsageError, VerificationError
from convrewrite.folders.lasting import FOLDER_VARIABLE
from convrewrite.onnx_files.sessions import open_session
from convrewrite.runtime import latency
from convrewrite.runtime.latency import (
    compare_onnx,
    compare_torch,
    time_graphs,
    time_options,
)
from convrewrite.runtime.option_graphs import OptionGraph, conv_graph
from convrewrite.runtime.timing import RuntimeTimer
from convrewrite.runtime.timing_cache import TimingCache, timing_key
from convrewrite.targets import (
    Clock,
    Comparison,
    Compiled,
    OnnxRuntime,
    Program,
    TorchEager,
    compare,
    interleaving,
)
from convrewrite.targets.interleaving import interleaved

SPEC = ConvSpec(16, 16, (3, 3), padding=(1, 1))
SEPARABLE: OptionGraph = (
    (ConvSpec(16, 16, (3, 3), padding=(1, 1), groups=16, bias=False), ConvSpec(16, 16, (1, 1))),
)  # fmt: skip


class Timeline:
    """A clock that only moves when one of its jobs runs, so that timings are exact."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def job(self, name: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()
            self.log.append(name)

        return run


def test_compare_interleaves_and_turns_the_order() -> None:
    timeline = Timeline()
    a, b = timeline.job("a", lambda: 2.0), timeline.job("b", lambda: 0.5)
    result = compare(a, b, runtime="torch", threads=1, rounds=4, min_seconds=0.1, clock=timeline.clock)
    assert "".join(timeline.log)[-8:] == "abbaabba"
    assert result == Comparison("torch", 1, 4, 2.0, 0.5, 0.25, 0.25, 0.25)
    assert result.speedup == 4.0


def test_short_callables_are_repeated_until_a_sample_is_long_enough() -> None:
    timeline = Timeline()
    result = compare(
        timeline.job("a", lambda: 1.0), timeline.job("b", lambda: 0.0625), runtime="torch", threads=1, rounds=1,
        min_seconds=1.0, clock=timeline.clock,
    )  # fmt: skip
    assert timeline.log.count("b") >= 2 * 16
    assert (result.seconds_a, result.seconds_b, result.ratio) == (1.0, 0.0625, 0.0625)
    assert (result.ratio_low, result.ratio_high) == (0.0625, 0.0625)


@pytest.mark.parametrize(
    ("seconds", "patience", "rounds"), [(0.5, 4.0, 9), (0.25, 6.0, 12), (0.125, 6.0, 24), (0.5, 1e9, 25)]
)
def test_slow_callables_are_timed_in_fewer_rounds(seconds: float, patience: float, rounds: int) -> None:
    timeline = Timeline()
    a, b = (timeline.job(name, lambda: seconds) for name in "ab")
    result = compare(a, b, runtime="torch", threads=1, min_seconds=0.1, clock=timeline.clock, patience=patience)
    assert (result.rounds, result.ratio) == (rounds, 1.0)


def test_no_run_of_several_is_always_last() -> None:
    timeline = Timeline()
    jobs = [timeline.job(name, lambda: 1.0) for name in "abc"]
    interleaved(jobs, 6, 0.5, timeline.clock)
    rounds = "".join(timeline.log[-18:])
    assert [rounds[i : i + 3] for i in range(0, 18, 3)] == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_the_paired_ratio_is_right_where_the_machine_slows_down() -> None:
    timeline = Timeline()

    def pace() -> float:
        return 1.0 + len(timeline.log) ** 2

    result = compare(
        timeline.job("a", pace), timeline.job("b", lambda: pace() / 2), runtime="torch", threads=1, rounds=40,
        min_seconds=0.0, clock=timeline.clock,
    )  # fmt: skip
    assert result.ratio == pytest.approx(0.5, rel=0.05)
    assert result.ratio_low <= result.ratio <= result.ratio_high


def test_a_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(VerificationError, match="clock stands still"):
        compare(int, int, runtime="torch", threads=1, rounds=2, min_seconds=0.1, clock=lambda: 1.0)
    with pytest.raises(UsageError, match="at least 1 round"):
        compare(int, int, runtime="torch", threads=1, rounds=0, clock=time.perf_counter)


def test_the_clock_is_that_of_the_thread_only_at_one_thread() -> None:
    for target in (OnnxRuntime(), TorchEager(), OnnxRuntime("cpu"), TorchEager("cpu")):
        assert target.clock(1) is time.thread_time
        assert target.clock(2) is time.perf_counter
    assert OnnxRuntime("cuda").clock(1) is time.perf_counter


def test_models_are_compared_in_both_runtimes_and_left_as_they_were(tmp_path: Path) -> None:
    paths = tmp_path / "a.onnx", tmp_path / "b.onnx"
    paths[0].write_bytes(unframed(((SPEC,),), (8, 8)))
    paths[1].write_bytes(unframed(SEPARABLE, (8, 8)))
    inputs = (torch.randn(1, 16, 8, 8),)
    found = compare_onnx(*paths, inputs, rounds=2)
    assert (found.runtime, found.threads, found.rounds) == ("onnxruntime", 1, 2)
    assert found.seconds_a > 0 < found.seconds_b

    model, before = nn.Sequential(SPEC.build(), nn.BatchNorm2d(16)).train(), torch.get_num_threads()
    seen: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_inference_mode_enabled())))
    found = compare_torch(model, model, inputs, threads=1, rounds=2)
    assert found.runtime == "torch"
    assert set(seen) == {(False, True)}
    assert model.training
    assert model.state_dict()["1.num_batches_tracked"] == 0
    assert torch.get_num_threads() == before


def test_a_wrong_number_of_inputs_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(conv_graph(((SPEC,),), (8, 8)))
    with pytest.raises(VerificationError, match=r"cannot run .* on 2 inputs"):
        compare_onnx(path, path, (torch.zeros(1), torch.zeros(1)))


def run_graph(model: bytes, x: Tensor) -> Tensor:
    return torch.from_numpy(open_session(model).run(None, {"x": x.numpy()})[0])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    "branches",
    [
        ((ConvSpec(6, 8, (3, 3), stride=(2, 1), padding=(1, 0)),),),
        ((ConvSpec(6, 8, (3, 5), padding="same", dilation=(2, 1)),),),
        ((ConvSpec(6, 8, (2, 4), padding="same"),),),
        ((ConvSpec(6, 8, (3, 3), padding="valid", groups=2, bias=False),),),
        ((ConvSpec(6, 8, (3, 3), padding=(2, 1), padding_mode="reflect"),),),
        ((ConvSpec(6, 8, (3, 3), padding=(2, 1), padding_mode="replicate", stride=(2, 2)),),),
        ((ConvSpec(6, 8, (2, 4), padding="same", padding_mode="circular"),),),
        ((ConvSpec(6, 8, (3, 4), stride=(2, 3), padding=(1, 0), groups=2, transposed=True, output_padding=(1, 2)),),),
        ((ConvSpec(6, 8, (3, 3), (1, 2), (1, 2), (2, 3), transposed=True, output_padding=(1, 2)),),),
        ((ConvSpec(6, 6, (3, 3), padding=(1, 1), groups=6, bias=False), ConvSpec(6, 8, (1, 1))),
         (ConvSpec(6, 12, (3, 3), padding=(1, 1), groups=6, bias=False), ConvSpec(12, 8, (1, 1), bias=False))),
        ((ConvSpec(6, 4, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
          ConvSpec(4, 8, (1, 3), stride=(1, 2), padding=(0, 1))),),
    ],
    ids=["strided", "same", "same-even", "grouped", "reflect", "replicate", "circular", "transposed", "dilated", "sum", "chain"],
)  # fmt: skip
def test_a_graph_computes_what_torch_computes_with_the_same_weights(branches: OptionGraph) -> None:
    torch.manual_seed(0)
    framed = conv_graph(branches, (9, 11))
    chains, x = chains_of(framed, branches), torch.randn(1, 6, 9, 11)
    with torch.no_grad():
        expected = sum((chain(x) for chain in chains), torch.zeros(()))
    found = run_graph(unframed(branches, (9, 11)), x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        flat = sum((chain(torch.full((1, 6, 9, 11), 0.5)) for chain in chains), torch.zeros(()))
    pixel = run_graph(framed, torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(pixel, flat.relu()[:, :, :1, :1], rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_every_time_and_images_enter_plainly() -> None:
    stem: OptionGraph = ((ConvSpec(3, 8, (3, 3)),),)
    model = conv_graph(stem, (6, 5))
    assert model == conv_graph(stem, (6, 5))
    onnx.checker.check_model(onnx.load_from_string(model))
    assert open_session(model).get_inputs()[0].shape == [1, 3, 6, 5]
    assert open_session(conv_graph((), (6, 5), channels=32)).get_inputs()[0].shape == [1, 1, 1, 1]
    with pytest.raises(UsageError, match="found neither"):
        conv_graph((), (6, 5))


BRANCHES: OptionGraph = (
    (ConvSpec(32, 32, (3, 3), padding=(1, 1), groups=32, bias=False), ConvSpec(32, 32, (1, 1), bias=False)),
) * 3  # fmt: skip
"""A sum of branches that differ in nothing but their weights."""


def test_no_two_kernels_of_a_graph_are_equal() -> None:
    graph = onnx.load_from_string(conv_graph(BRANCHES, (8, 8))).graph
    kernels = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 4]
    kernels = kernels[1:]  # without that of the frame
    assert len(kernels) == 6
    assert len({kernel.tobytes() for kernel in kernels}) == 6


def test_onnxruntime_computes_every_branch_of_a_graph(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(conv_graph(BRANCHES, (8, 8)), options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert found.count("Conv") + found.count("FusedConv") == 1 + 6


@pytest.mark.parametrize("graph", [((replace(SPEC, in_channels=32, out_channels=32),),), ()], ids=["option", "empty"])
def test_a_frame_stays_in_the_blocked_layout(graph: OptionGraph, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(conv_graph(graph, (8, 8), channels=32), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    found = [node.op_type for node in nodes]
    if any(node.domain == "com.microsoft.nchwc" for node in nodes):  # the layout exists on some processors only
        assert "ReorderInput" not in found
        assert found.index("MaxPool") < found.index("ReorderOutput")
    assert found.count("Conv") == 1 + len(graph)


def test_times_are_relative_to_the_first_graph_and_without_the_frame() -> None:
    timeline = Timeline()
    seconds = {16 * 16 * 9: 9.0, 16 * 9 + 16 * 16: 3.0, 0: 1.0}

    class Counted(OnnxRuntime):
        def compile(self, program: Program, inputs: Sequence[object], threads: int) -> Compiled:
            assert isinstance(program.onnx, bytes)
            weights = onnx.load_from_string(program.onnx).graph.initializer
            count = sum(w.dims[0] * w.dims[1] * w.dims[2] * w.dims[3] for w in weights if len(w.dims) == 4) - 16
            return timeline.job("x", lambda: seconds[count] * (1.0 + len(timeline.log) % 3 / 1000))

        def clock(self, threads: int) -> Clock:
            return timeline.clock

    graphs = [((SPEC,),), SEPARABLE, *[SEPARABLE] * interleaving.GRAPHS_PER_ROUND]
    times = time_graphs(graphs, (8, 8), rounds=3, target=Counted())
    assert times == pytest.approx([8.0] + [2.0] * (1 + interleaving.GRAPHS_PER_ROUND), rel=0.01)


@pytest.mark.parametrize("target", [OnnxRuntime(), TorchEager()], ids=["onnxruntime", "torch"])
def test_options_are_timed_in_float32_whatever_the_default_dtype(
    target: OnnxRuntime | TorchEager, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()

    def noted(program: Program, inputs: Sequence[Tensor], *_: object) -> Compiled:
        weights = [] if program.module is None else [*program.module.parameters()]
        seen.update(tensor.dtype for tensor in [*inputs, *weights])
        return lambda: None

    monkeypatch.setattr(latency, "compiled", noted)
    monkeypatch.setattr(latency, "framed_seconds", lambda made, *_, **__: [run() and 1.0 for run in made])
    torch.set_default_dtype(torch.float64)
    try:
        time_graphs([((SPEC,),), SEPARABLE], (4, 4), target=target, in_units=True)
        latency.time_unit(target=target)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen == {torch.float32}


def test_graphs_really_run_and_never_cost_nothing() -> None:
    times = time_graphs([((SPEC,),), SEPARABLE], (8, 8), rounds=2)
    assert len(times) == 2
    assert min(times) > 0
    with pytest.raises(UsageError, match=r"found \[16, 32\]"):
        time_graphs([((SPEC,),), ((replace(SPEC, in_channels=32),),)], (8, 8))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace measuring by fixed times, and list how many graphs each measurement had."""
    calls: list[int] = []

    def fake(graphs: list[OptionGraph], *_: object, **__: object) -> list[float]:
        calls.append(len(graphs))
        return [len(calls) * 1.0 / (1 + sum(len(chain) for chain in graph)) for graph in graphs]

    monkeypatch.setattr(latency, "time_graphs", fake)
    return calls


def test_options_are_measured_once_and_keep_their_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, cache = counted(monkeypatch), TimingCache(tmp_path)
    asked = partial(time_options, unit=lambda: 2.0)
    first = asked(SPEC, [SEPARABLE], (8, 8), cache=cache)
    assert first[0] == 1.0
    assert first[1] == pytest.approx([2 / 3])
    assert asked(SPEC, [SEPARABLE], (8, 8), cache=TimingCache(tmp_path)) == first
    longer: OptionGraph = (SEPARABLE[0], SEPARABLE[0])
    base, times = asked(SPEC, [SEPARABLE, longer], (8, 8), cache=cache)
    assert calls == [2, 2]
    assert base == 1.0
    assert times == pytest.approx([2 / 3, 0.4])
    asked(SPEC, [SEPARABLE], (8, 9), cache=cache)
    asked(SPEC, [SEPARABLE], (8, 8), threads=2, cache=cache)
    assert calls == [2, 2, 2, 2]


def test_options_need_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    assert time_options(SPEC, [SEPARABLE, SEPARABLE], (8, 8), unit=lambda: 1.0)[1] == pytest.approx([1 / 3] * 2)
    assert time_options(SPEC, [], (8, 8), unit=lambda: 1.0) == (1.0, [])
    assert calls == [2, 1]


class Drifting(OnnxRuntime):
    """A runtime whose graphs take a second for each weight of their 3 x 3 kernels, on a machine of changing speed."""

    timeline, slowdown = Timeline(), 1.0

    def clock(self, threads: int) -> Callable[[], float]:
        return self.timeline.clock

    def compile(self, program: Program, inputs: Sequence[object], threads: int) -> Compiled:
        found = onnx.load_from_string(program.onnx) if isinstance(program.onnx, bytes) else onnx.load(str(program.onnx))
        weights = [list(w.dims) for w in found.graph.initializer if list(w.dims)[2:] == [3, 3]]
        count = sum(math.prod(dims) for dims in weights)
        return self.timeline.job("x", lambda: Drifting.slowdown * (count or 1e-3))


def test_a_machine_that_slows_down_between_two_sites_makes_none_of_them_look_slower(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(conv_graph(((SPEC, SPEC),), (8, 8)))
    timer, found = RuntimeTimer(TimingCache(tmp_path / "times"), Drifting()).steady(), []
    for pace, channels in ((1.0, 16), (3.0, 32), (0.5, 64)):
        Drifting.slowdown = pace
        spec = replace(SPEC, in_channels=channels)
        found.append(timer.time_options(spec, [((spec, SPEC),)], (8, 8), 1, 3))
    assert [before for before, _ in found] == pytest.approx([9.0 * 16 * c for c in (16, 32, 64)], rel=1e-3)
    assert [after for _, (after,) in found] == pytest.approx([9.0 * 16 * (c + 16) for c in (16, 32, 64)], rel=1e-3)
    Drifting.slowdown = 2.0
    x = (torch.ones(1, 16, 8, 8),)
    assert timer.time_onnx(model, x, 1) == pytest.approx(2 * 9.0 * 16 * 16, rel=1e-3)
    assert timer.steady().time_onnx(model, x, 1) == pytest.approx(4 * 9.0 * 16 * 16, rel=1e-3)
    assert timer.on(Drifting()).time_options(SPEC, [], (8, 8), 1, 3)[0] == pytest.approx(2 * 9.0 * 16 * 16, rel=1e-3)


def test_a_call_goes_before_each_sample_where_runs_push_each_other_out_of_the_cache() -> None:
    timeline, last = Timeline(), [""]

    def run(name: str) -> Callable[[], None]:
        def seconds() -> float:
            cold, last[0] = last[0] != name, name
            return 1.5 if cold else 1.0

        return timeline.job(name, seconds)

    warm = interleaved([run("a"), run("b")], 4, 0.1, timeline.clock, warm=True)
    assert warm == [[1.0] * 4, [1.0] * 4]
    assert max(interleaved([run("a"), run("b")], 4, 0.1, timeline.clock)[0]) == 1.5


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[1]", b"3", b'{"key": "other", "value": 1.0}', b'{"key": "k", "value": "1"}',
     b'{"key": "k", "value": NaN}', b'{"key": "k", "value": -1.0}', b'{"key": "k"}', b"[" * 100_000],
)  # fmt: skip
def test_broken_files_are_ignored_and_rewritten(content: bytes, tmp_path: Path) -> None:
    cache = TimingCache(tmp_path)
    cache.put({"k": 2.0})
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert cache.get("k") is None
    cache.put({"k": 3.0})
    assert cache.get("k") == 3.0
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_used_leaves_no_cache_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = TimingCache(tmp_path / "file" / "timings")
    cache.put({"k": 1.0})
    assert cache.get("k") is None
    (tmp_path / "taken").mkdir()
    cache = TimingCache(tmp_path / "taken")
    cache._file("k").mkdir()
    cache.put({"k": 1.0})
    assert cache.get("k") is None
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [cache._file("k").name]


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "mine"))
    TimingCache().put({"k": 1.5})
    (file,) = (tmp_path / "mine" / "timings").iterdir()
    assert json.loads(file.read_text()) == {"key": "k", "value": 1.5}


def write_many(folder: Path, value: float) -> None:
    cache = TimingCache(folder)
    for index in range(200):
        cache.put({f"key {index % 5}": value})


def test_concurrent_writers_never_leave_a_torn_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=write_many, args=(tmp_path, 1.0))
    writers = [threading.Thread(target=write_many, args=(tmp_path, value)) for value in (2.0, 3.0)]
    process.start()
    cache, seen = TimingCache(tmp_path), set()
    while not (tmp_path.exists() and any(tmp_path.glob("*.json"))):  # until the process has begun to write
        assert process.exitcode is None
        time.sleep(0.01)
    for writer in writers:
        writer.start()
    while process.is_alive() or any(writer.is_alive() for writer in writers):
        seen |= {cache.get(f"key {index}") for index in range(5)}
        there = [cache.get(f"key {index}") for index in range(5) if cache._file(f"key {index}").exists()]
        assert None not in there
    process.join()
    for writer in writers:
        writer.join()
    assert process.exitcode == 0
    assert seen <= {None, 1.0, 2.0, 3.0}
    assert len(list(tmp_path.iterdir())) == 5


def test_a_key_names_all_a_time_depends_on() -> None:
    graphs: list[OptionGraph] = [((SPEC,),), SEPARABLE]
    key = timing_key(graphs, (8, 8), 1, "runtime 1")
    assert key == timing_key(graphs, (8, 8), 1, "runtime 1")
    others = {
        timing_key(graphs[:1], (8, 8), 1, "runtime 1"), timing_key(graphs, (8, 9), 1, "runtime 1"),
        timing_key(graphs, (8, 8), 2, "runtime 1"), timing_key(graphs, (8, 8), 1, "runtime 2"), key,
    }  # fmt: skip
    assert len(others) == 5
