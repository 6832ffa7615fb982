"""What belongs to the process is given back as it was, whatever threads and modes the caller has."""

import builtins
import contextlib
import io
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from convrewrite import RewriteConvolutions, analyze, export, optimize, verify
from convrewrite.errors import TraceError, UsageError
from convrewrite.process import (
    CALLS,
    at_work,
    exporting,
    followed,
    quiet,
    same_random_numbers,
    torch_threads,
    without_draws,
)
from convrewrite.runtime.onnx_export import NOISY_LOGGERS

DATA = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))
        size = max(1, x.shape[2])
        return self.head(x.sum((2, 3)) / size)


def net(width: int = 16) -> Net:
    torch.manual_seed(0)
    return Net(width).eval()


def process_state() -> dict[str, Any]:
    loggers = [logging.getLogger(name) for name in (*NOISY_LOGGERS, "torch", "")]
    return {
        "builtins": (builtins.max, builtins.min),
        "set_": torch.Tensor.set_,
        "calls": (nn.Module.__call__, nn.Module.__getattr__, _symbolic_trace._Patcher.patch_method),
        "streams": (sys.stdout, sys.stderr),
        "filters": list(warnings.filters),
        "loggers": [(logger.level, list(logger.handlers), logger.disabled) for logger in loggers],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "methods": sorted(vars(torch.Tensor)),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "draws": (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("measure", [False, True])
def test_a_run_changes_nothing_of_the_process(measure: bool) -> None:
    model = net()
    before = process_state()
    optimize(model, DATA[:1], ["asymmetric"], DATA, fast=True, measure=measure)
    assert process_state() == before


def test_a_run_that_fails_changes_nothing_either() -> None:
    class Failing(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(torch.get_num_threads() + 1)
            random.random(), np.random.random(), torch.rand(1)
            logging.getLogger("torch").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
            raise RuntimeError("no")

    before = process_state()
    with pytest.raises(TraceError, match="does not run"):
        analyze(Failing().eval(), DATA[:1])
    after = process_state()
    before.pop("draws"), after.pop("draws")  # of making the model
    assert after == before


@pytest.fixture(scope="module")
def plain_result() -> dict[str, Tensor]:
    return optimize(net(), DATA[:1], ["asymmetric"], DATA, fast=True, measure=False).model.state_dict()


MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_mode_around_it_makes_no_difference(mode: Callable[[], Any], plain_result: dict[str, Tensor]) -> None:
    with mode():
        result = optimize(net(), DATA[:1], ["asymmetric"], DATA, fast=True, measure=False)
        assert analyze(net(), DATA[:1])
    found = result.model.state_dict()
    assert found.keys() == plain_result.keys()
    assert all(torch.equal(found[key], plain_result[key]) for key in found)
    result.model(DATA).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())


@pytest.mark.slow
def test_models_and_inputs_of_inference_mode_give_a_result_that_can_be_trained(plain_result: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model, data = net(), DATA.clone()
    assert model.stem.weight.is_inference() and data.is_inference()
    result = optimize(model, data[:1], ["asymmetric"], data, fast=True)
    found = result.model.state_dict()
    assert all(torch.equal(found[key], plain_result[key]) for key in plain_result)
    result.model(DATA).sum().backward()
    assert all(parameter.grad is not None for parameter in result.model.parameters())
    assert model.stem.weight.is_inference()


@pytest.mark.slow
def test_export_and_verification_are_as_strict_under_autocast_and_take_models_of_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        model, data = net(), DATA[:2].clone()
        made = export(model, data, tmp_path / "net.onnx")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert verify(net(), made.path, DATA[:2]).parity.passed
        again = export(net(), DATA[:2], tmp_path / "again.onnx")
    assert verify(net(), again.path, DATA[:2]).parity.passed


def test_another_default_dtype_makes_no_difference(plain_result: dict[str, Tensor]) -> None:
    model = net()
    torch.set_default_dtype(torch.float64)
    try:
        result = optimize(model, DATA[:1], ["asymmetric"], DATA, fast=True, measure=False)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    found = result.model.state_dict()
    assert {key: value.dtype for key, value in found.items()} == {
        key: value.dtype for key, value in plain_result.items()
    }
    assert all(torch.allclose(found[key], plain_result[key], rtol=1e-3, atol=1e-4) for key in found)


def in_threads(work: Callable[[int], Any], count: int = 4) -> dict[int, Any]:
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.slow
def test_four_threads_give_the_four_results_of_one() -> None:
    def work(index: int) -> list[Tensor]:
        with warnings.catch_warnings():
            result = optimize(models[index], DATA[:1], ["asymmetric"], DATA, fast=True, measure=index == 0)
        return list(result.model.state_dict().values())

    models = [net(8 + 4 * index) for index in range(4)]
    one_by_one = [work(index) for index in range(4)]
    before = process_state()
    found = in_threads(work)
    assert process_state() == before
    for index, expected in enumerate(one_by_one):
        assert isinstance(found[index], list), found[index]
        assert all(torch.equal(a, b) for a, b in zip(found[index], expected, strict=True))


def test_another_thread_runs_its_own_model_meanwhile() -> None:
    """While this thread stands inside of following and exporting, whatever torch has put on ``nn.Module``."""
    model, seen = net(), []

    class Waiting(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.is_inference_mode_enabled():
                seen.append(in_threads(lambda _index: elsewhere(model), 1)[0])
            return super().forward(x)

    def elsewhere(other: nn.Module) -> tuple[Tensor, bool, int]:
        with torch.no_grad():
            output = other(DATA[:2])
        return output, isinstance(other.stem.weight, nn.Parameter), max(1, 2)

    with torch.no_grad():
        expected = model(DATA[:2])
    waiting = Waiting().eval()
    with followed():
        fx.Tracer().trace(waiting)
    with exporting(NOISY_LOGGERS):
        torch.export.export(waiting, (DATA[:2],))
    assert len(seen) >= 2
    for found in seen:
        assert isinstance(found, tuple), found
        assert type(found[0]) is Tensor
        assert torch.allclose(found[0], expected, rtol=1e-5, atol=1e-6)
        assert found[1:] == (True, 2)


def test_the_table_of_operators_is_made_once_and_never_shared() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = ONNXRegistry.from_torchlib
    with exporting(NOISY_LOGGERS):
        first = ONNXRegistry.from_torchlib()
        expected = {name: list(functions) for name, functions in first.functions.items()}
        first.register_op(torch.ops.aten.relu.default, lambda x: x)
        first.functions.pop("aten::add.Tensor")
    with exporting(NOISY_LOGGERS):
        second = ONNXRegistry().from_torchlib()
    assert second is not first
    assert second.opset_version == first.opset_version
    assert second.functions == expected
    assert all(a is b for name in expected for a, b in zip(second.functions[name], expected[name], strict=True))
    assert ONNXRegistry.from_torchlib == before


def test_operators_of_c_are_looked_through_once_for_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export import utils

    if not hasattr(utils, "_materialize_cpp_cia_ops"):
        pytest.skip("this torch does not look through them")
    plain, asked = utils._materialize_cpp_cia_ops, []
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", counted := lambda: asked.append(plain()))
    expected = utils._collect_all_valid_cia_ops()
    for _ in range(2):
        asked.clear()
        with exporting(NOISY_LOGGERS):
            assert [utils._collect_all_valid_cia_ops() for _ in range(2)] == [expected] * 2
            in_threads(lambda _index: utils._materialize_cpp_cia_ops(), 1)
        assert len(asked) == 2, "once in this thread, and as often as another asks"
    assert utils._materialize_cpp_cia_ops is counted


def test_what_another_thread_prints_and_warns_of_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(_index: int) -> None:
        print("another thread")
        warnings.warn("of another thread", stacklevel=1)

    with quiet():
        print("swallowed")
        warnings.warn("swallowed", stacklevel=1)
        found = in_threads(noisy, 1)
    assert isinstance(found[0], UserWarning)  # warnings are errors here
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("another thread\n", "")


def test_a_stream_that_another_thread_puts_back_later_is_no_longer_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    redirected = contextlib.redirect_stdout(io.StringIO())
    with quiet():
        in_threads(lambda _index: redirected.__enter__(), 1)
    in_threads(lambda _index: redirected.__exit__(None, None, None), 1)
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_process_forked_meanwhile_neither_waits_nor_keeps_what_the_thread_changed() -> None:
    inside, leave, before = threading.Event(), threading.Event(), process_state()
    logger = logging.getLogger("of a runtime")

    def work(_index: int) -> None:
        with at_work(0), quiet([logger.name]), exporting(NOISY_LOGGERS), torch_threads(3):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=in_threads, args=(work, 1))
    thread.start()
    inside.wait()
    if (child := os.fork()) == 0:
        signal.alarm(5)  # ends it where it waits
        with contextlib.suppress(BaseException), at_work(1):
            now = process_state()
            os._exit(sum(now[name] != before[name] for name in before if name != "draws") + logger.level)
        os._exit(99)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_thread_works_at_a_time_and_may_come_again() -> None:
    entered: list[int] = []

    def work(index: int) -> None:
        with at_work(0), at_work(1), torch_threads(1):
            entered.append(index)
            assert torch.get_num_threads() == 1
            entered.append(index)

    assert set(in_threads(work).values()) == {None}
    assert entered == [index for index in entered[::2] for _ in range(2)]


@pytest.fixture
def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 16, 3, padding=1), "act": nn.ReLU(), "body": nn.Conv2d(16, 16, 3, padding=1)}
    return fx.symbolic_trace(nn.Sequential(OrderedDict(layers)).eval())


def test_the_pass_says_so_of_a_plain_module_before_the_work() -> None:
    with pytest.raises(
        UsageError, match=r"found Net; give it torch\.fx\.symbolic_trace\(model\), or use convrewrite\.optim"
    ):
        RewriteConvolutions(DATA[:1])(net())  # type: ignore[arg-type]


def test_the_pass_has_the_options_of_optimize(traced: fx.GraphModule) -> None:
    import inspect

    options = [name for name in inspect.signature(optimize).parameters if name != "model"]
    assert list(inspect.signature(RewriteConvolutions).parameters) == options
    steps: list[str] = []
    found = RewriteConvolutions(
        DATA[:1], ["asymmetric"], DATA, keep={"error": 0.5}, fast=True, output_weighting=False, threads=1,
        progress=lambda stage, _done, _total, _text: steps.append(stage),
    )(traced)  # fmt: skip
    assert "fit" in steps
    assert type(found.body) is not nn.Conv2d
    assert type(traced.body) is nn.Conv2d


def test_threads_draw_the_numbers_of_their_own_seeds() -> None:
    def work(seed: int) -> list[float]:
        with same_random_numbers(seed):
            found = []
            for _ in range(50):
                found.append(float(torch.rand(())))
                time.sleep(1e-4)  # another thread's turn
            return found

    assert in_threads(work) == {seed: work(seed) for seed in range(4)}


def test_a_device_that_is_used_later_does_not_begin_with_the_seed_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    model = net()
    for device, name in ((torch.cuda, "manual_seed_all"), (torch.xpu, "manual_seed_all"), (torch.mps, "manual_seed")):
        # torch's compiler refuses a table in which one function has three names
        monkeypatch.setattr(device, name, lambda seed: told.append(seed))
    optimize(model, DATA[:1], ["asymmetric"], DATA, fast=True, measure=False)
    assert told == []


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """The generator of a device that is in use."""
    generator = torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    return generator


def test_devices_in_use_draw_from_the_seed_too_and_get_their_state_back(on_device: torch.Generator) -> None:
    before = on_device.get_state()
    with same_random_numbers(3):
        found = torch.rand(4, generator=on_device)
    assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(on_device.get_state(), before)


def test_what_is_drawn_on_a_device_is_noticed(on_device: torch.Generator) -> None:
    assert without_draws(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="random"):
        without_draws(lambda: torch.rand(1, generator=on_device))


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, partial(torch.rand, 1)], ids=["Python", "numpy", "torch"]
)
def test_what_another_thread_draws_is_not_taken_for_the_call_s(draw: Callable[[], object]) -> None:
    calls = 0

    def call() -> int:
        nonlocal calls
        calls += 1
        if calls < CALLS:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        return calls

    before = random.getstate()
    assert without_draws(call) == CALLS
    assert random.getstate() == before
    with pytest.raises(RuntimeError, match="random"):
        without_draws(draw)
