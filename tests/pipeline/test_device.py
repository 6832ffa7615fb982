"""Runs on a device: on a pretended one, beside which nothing may be left behind, and on real ones where there are any."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from device_run import CASES, images, network
from torch import nn

import convrewrite
from convrewrite import places
from convrewrite.errors import UsageError
from convrewrite.results import Result
from convrewrite.settings import Settings
from convrewrite.tuning.processes import PRECISION

TESTS = Path(__file__).parents[1]

REAL = [name for name in places.known_places() if name in ("cuda", "mps")]

Pretended = Callable[..., dict[str, Any]]
"""A run on the pretended device: a case of device_run.py and its words, and what came of it."""

WORKED = ("convolution", "mm", "linalg_cholesky_ex", "linalg_solve_triangular")
"""Operations of forward passes, moments and solves."""


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    """It has imported all that a run needs, and forks for each; its recoveries are in float32 on the processor too."""
    command, environment = [sys.executable, str(TESTS / "device_run.py")], os.environ | {PRECISION: "no"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process


@pytest.fixture
def pretended(process: subprocess.Popen[str]) -> Pretended:
    def run(*words: str) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        print(*words, file=process.stdin, flush=True)
        found: dict[str, Any] | None = json.loads(process.stdout.readline())
        assert found is not None, "the run failed"
        return found

    return run


@pytest.mark.parametrize("case", ["budget", "keep", "synthetic"])
def test_a_run_elsewhere_computes_there_and_gives_the_same(pretended: Pretended, case: str) -> None:
    found = pretended(case, "large")
    assert found["same plan"] and found["apart"] < 1e-5 < found["rewritten"]
    assert found["notes"] == ["computed on meta; exported, timed and verified on the processor"]
    assert all(found["counts"].get(f"aten::{name}", 0) > 0 for name in WORKED)
    assert found["result away"] == [False]


def test_small_sites_are_fitted_on_the_processor(pretended: Pretended) -> None:
    """A device waits for each of their many small steps."""
    found = pretended("budget")
    assert found["same plan"] and found["apart"] < 1e-5 < found["rewritten"]
    assert found["counts"]["aten::convolution"] > 0 and found["counts"]["aten::mm"] > 0
    assert "aten::linalg_solve_triangular" not in found["counts"]


def test_a_device_without_float64_leaves_the_solves_to_the_processor(pretended: Pretended) -> None:
    found = pretended("ratio", "float32", "large")
    assert found["same plan"] and found["apart"] < 1e-3
    assert "aten::linalg_solve_triangular" not in found["counts"]
    assert found["counts"]["aten::convolution"] > 0 and found["counts"]["aten::addmm_"] > 0


def test_a_model_that_lies_elsewhere_stays_there_and_its_result_comes_there(pretended: Pretended) -> None:
    found = pretended("ratio", "there")
    assert found["same plan"] and found["apart"] < 1e-5
    assert found["result away"] == [True] and found["model stays"]


def test_a_model_that_lies_elsewhere_is_looked_at_as_one_at_home(pretended: Pretended) -> None:
    """Its example comes from the processor, as for a run."""
    expected = {"analyze": True, "profile": True, "export": None, "quantise": 4, "verify": False, "itself": True}
    assert pretended("look", "look") == expected | {"model stays": True}


def test_a_model_that_does_not_run_elsewhere_is_worked_on_at_home(pretended: Pretended) -> None:
    found = pretended("weights", "bound")
    (note,) = found["notes"]
    assert note.startswith("the processor took over from meta: Bound: the model does not run on input 1x3x12x12")


def test_a_recovery_elsewhere_trains_there_and_gives_the_same(pretended: Pretended) -> None:
    found = pretended("weights", "recover")
    assert found["apart"] < 1e-5 < found["rewritten"]
    assert found["counts"]["aten::convolution_backward"] > 0
    assert found["result away"] == [False]


def test_a_device_without_room_leaves_the_rest_to_the_processor(pretended: Pretended) -> None:
    found = pretended("ratio", "most=3000000")
    assert found["same plan"] and found["apart"] == 0
    assert found["notes"][1] == "the processor took over from meta: it had no room left"


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "CUDA", "cpu\n", "", 3])
def test_what_is_no_device_is_told(name: Any) -> None:
    with pytest.raises(UsageError, match=r"^device: expected cpu, cuda, cuda:N, mps or auto, found"):
        Settings(device=name)


def test_a_device_that_is_not_here_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"^device cuda:99: expected a device that is here \(.*cpu\), found no such"):
        Settings(device="cuda:99")


def test_the_command_line_refuses_a_missing_device_in_one_line(tmp_path: Path) -> None:
    done = call("optimize", tmp_path / "none.pt", "--device", "cuda:99")
    assert done.code == 2 and done.message.startswith("--device cuda:99: expected a device that is here (")


def test_auto_takes_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.place_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(places, "known_places", lambda: ("mps", "cpu"))
    assert places.place_of("auto") == torch.device("mps", 0)
    monkeypatch.setattr(places, "known_places", lambda: ("cpu",))
    assert places.place_of("auto") == torch.device("cpu")


def test_a_full_device_is_known_by_what_led_to_an_error() -> None:
    first = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    other = ValueError("the model does not run")
    other.__cause__ = first
    assert places.out_of_memory(first) and places.out_of_memory(other)
    assert places.out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not places.out_of_memory(RuntimeError("expected all tensors on one device"))


def optimised(device: str | None, model: nn.Module, case: str) -> Result:
    asked: dict[str, Any] = {"calibration": images(), **CASES[case]}
    return convrewrite.optimize(model, torch.zeros(1, 3, 12, 12), device=device, measure=False, resume=False, **asked)


@pytest.fixture(params=REAL or [None])
def real(request: pytest.FixtureRequest) -> str:
    """The name of a device that is here."""
    if request.param is None:
        pytest.skip("there is no cuda or mps device here")
    name: str = request.param
    return name


@pytest.mark.parametrize("case", CASES)
def test_a_real_device_gives_what_the_processor_gives(real: str, case: str) -> None:
    here, there = optimised(None, network(), case), optimised(real, network(), case)
    x, original = images(), network()
    with torch.no_grad():
        a, b, wanted = here.model(x), there.model(x), original(x)
    assert [site.option for site in here.plan.sites] == [site.option for site in there.plan.sites]
    assert float((a - b).norm()) < 0.1 * float((a - wanted).norm()) + 1e-4 * float(wanted.norm())
    assert any(note.startswith(f"computed on {real}") for note in there.report.notes)


def test_a_model_on_a_real_device_stays_there(real: str, tmp_path: Path) -> None:
    place = places.place_of(real)
    model = network().to(place)
    result = optimised(None, model, "ratio")
    assert {p.device for m in (model, result.model) for p in m.parameters()} == {place}
    result.save(tmp_path / "out")
    again = convrewrite.load(tmp_path / "out", network())
    x = images()
    with torch.no_grad():
        assert torch.allclose(again(x), result.model(x.to(place)).cpu(), atol=1e-3)


def test_a_full_real_device_leaves_the_run_to_the_processor(real: str) -> None:
    if real != "cuda":
        pytest.skip("how much memory a process may take can be said of cuda devices alone")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        result = optimised(real, network(), "ratio")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("the processor took over from cuda" in note for note in result.report.notes)
