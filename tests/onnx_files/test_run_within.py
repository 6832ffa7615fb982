"""Runs of onnxruntime that are ended: by a signal, and after a time."""

import os
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from convrewrite.errors import ModelLoadError
from convrewrite.onnx_files import open_session, run_within, running

X = {"x": np.ones((2, 3), np.float32)}


def session(operator: str = "Loop") -> ort.InferenceSession:
    """``y`` is what a loop without end makes of ``x``, or another operator."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Neg", ["v"], ["w"])],
        "body",
        [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)],
        [info("still", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)
    nodes = [loop if operator == "Loop" else helper.make_node(operator, ["x"], ["y"])]
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    x, y = info("x", TensorProto.FLOAT, [None, 3]), info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [true])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return open_session(model.SerializeToString())


def test_a_run_gives_what_the_session_gives() -> None:
    [found] = run_within(session("Neg"), None, X, 20.0, "net")
    assert np.array_equal(found, -X["x"])
    with pytest.raises(ValueError, match="Required inputs"):
        run_within(session("Neg"), ["y"], {"z": X["x"]}, 20.0, "net")


def test_runs_one_after_another_share_a_thread_and_runs_side_by_side_do_not() -> None:
    named, one = session("Neg"), {"x": X["x"]}
    before = {thread.ident for thread in threading.enumerate()}
    for _ in range(20):
        run_within(named, None, one, 20.0, "net")
    assert len({thread.ident for thread in threading.enumerate()} - before) <= 1
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda k: run_within(named, None, {"x": k * X["x"]}, 20.0, "net"), range(60)))
    assert all(np.array_equal(value, -k * X["x"]) for k, [value] in enumerate(found))


def test_a_thread_without_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "IDLE", 0.01)
    running._Worker.idle.clear()  # those that wait longer
    run_within(session("Neg"), None, X, 20.0, "net")
    [worker] = running._Worker.idle
    deadline = time.monotonic() + 20
    while worker in running._Worker.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker not in running._Worker.idle


def test_a_child_process_has_threads_of_its_own() -> None:
    named = session("Neg")
    run_within(named, None, X, 20.0, "net")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer versions of Python: the child only ends
        child = os.fork()
    if child == 0:
        os._exit(1 if running._Worker.idle else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_run_that_takes_too_long_is_ended() -> None:
    before = threading.active_count()
    with pytest.raises(ModelLoadError, match=r"net: expected .* within 0\.1 s, found that it does not end .*--timeout"):
        run_within(session(), None, X, 0.1, "net")
    assert threading.active_count() <= before, "it goes on nowhere"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run(number: signal.Signals) -> None:
    before, looped = threading.active_count(), session()
    earlier = signal.signal(number, _raise)
    timer = threading.Timer(0.1, os.kill, [os.getpid(), number])
    timer.start()
    try:
        with pytest.raises(InterruptedError):
            run_within(looped, None, X, 20.0, "net")
    finally:
        signal.signal(number, earlier)
    timer.join()
    assert threading.active_count() <= before, "it goes on nowhere"


def _raise(_number: int, _frame: object) -> None:
    raise InterruptedError
