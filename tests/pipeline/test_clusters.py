"""Sweeps handed to Dask: the same results by two workers, here or at an address, and clear words where that cannot be."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from networks import natural, settled
from scripts import Scripts
from torch import Tensor, nn

from convrewrite import Sweep, export, sweep
from convrewrite.cli import main
from convrewrite.errors import ProcessLostError, UsageError
from convrewrite.pipeline import clusters
from convrewrite.rules.schema import Protect, Rule

pytest.importorskip("distributed", reason="dask and distributed are not installed")

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.5)
BUDGETS = (0.75, 0.5, 0.01)
RULES = """schema = 1
[[rule]]
name = "r"
structures = ["channel"]
ratio = 0.5
protect = { stem = false, min_channels = 0, min_mac_share = 0.0 }
"""
PROGRAM = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        return self.features(x).mean((2, 3))

def own():
    torch.manual_seed(0)
    return Own()

def size(model):
    return sum(p.numel() for p in model.parameters())
"""


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return settled(Small())


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    torch.manual_seed(1)
    return natural(24, 3, 8, 8, torch.float32)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers, as others start one."""
    import dask
    from distributed import LocalCluster

    settings = {"distributed.scheduler.allowed-failures": 1, "distributed.scheduler.http.routes": []}
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", memory_limit=0,
            silence_logs="CRITICAL",
        )  # fmt: skip
        with cluster:
            yield cluster.scheduler_address


def parameters_of(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters())


def deadly(_model: nn.Module) -> float:
    os._exit(1)


def wrong(_model: nn.Module) -> float:
    raise ArithmeticError("a metric of the user's own")


def swept(model: nn.Module, inputs: Tensor, **said: Any) -> Sweep:
    return sweep(model, inputs[:1], [RULE], inputs, BUDGETS, measure=False, fast=True, resume=False, **said)


def texts(found: Sweep) -> tuple[str, dict[str, str]]:
    return found.report.model_dump_json(), {name: plan.to_json() for name, plan in found.plans.items()}


def test_two_workers_here_give_the_same_bytes(model: Small, inputs: Tensor) -> None:
    told: list[tuple[str, int, int]] = []
    found = swept(
        model, inputs, metric=parameters_of, cluster="local:2",
        progress=lambda stage, done, total, _text: told.append((stage, done, total)),
    )  # fmt: skip
    assert texts(found) == texts(swept(model, inputs, metric=parameters_of))
    assert len(found.plans) == 2 and found.report.models[0].metric == parameters_of(model)
    assert ("survey", 1, 1) in told and told[-1] == ("points", 3, 3)


def test_a_graph_goes_to_a_scheduler_at_an_address(model: Small, inputs: Tensor, address: str, tmp_path: Path) -> None:
    graph = tmp_path / "small.onnx"
    export(model, inputs[:1], graph)
    said = {"rules": [RULE], "calibration": inputs, "budgets": BUDGETS[1:], "measure": False, "fast": True}
    found = sweep(graph, **said, cluster=address, resume=False)
    assert texts(found) == texts(sweep(graph, **said, resume=False))


def test_the_command_hands_over_models_with_code_of_their_own(
    inputs: Tensor, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    Path("own/own_networks.py").write_text(PROGRAM)
    torch.save(inputs, "inputs.pt")
    Path("r.toml").write_text(RULES)
    given = ["own/own_networks.py:own", "--rule", "r.toml", "--budgets", "0.7,0.5", "--calib", "inputs.pt"]
    given += ["--input", "1x3x8x8", "--metric", "own/own_networks.py:size", "--no-onnx", "--fast", "--no-resume"]
    assert main(["sweep", *given, "--cluster", address, "-o", "there"]) == 0
    assert main(["sweep", *given, "-o", "here"]) == 0
    there, here = (json.loads(Path(f"{name}/sweep.json").read_text()) for name in ("there", "here"))
    for point in (*there["models"][0]["points"], *here["models"][0]["points"]):
        del point["command"]  # which names the folder
    assert there == here and here["metric"] == "size"


def test_what_a_worker_ends_in_is_told(model: Small, inputs: Tensor, address: str) -> None:
    with pytest.raises(ProcessLostError, match="2 workers died of it"):
        swept(model, inputs, metric=deadly, cluster=address)
    found = r"^metric wrong: calling it with the original raised ArithmeticError: a metric of the user's own; mend"
    with pytest.raises(UsageError, match=found):
        swept(model, inputs, metric=wrong, cluster=address)
    with pytest.raises(UsageError, match="latency"):
        swept(model, inputs, resource="latency", cluster=address)


class Unopened:
    """What can be sent, and not be opened there."""

    def __call__(self, _model: nn.Module) -> float:
        return 0.0

    def __reduce__(self) -> Any:
        return wrong, (None,)


def test_what_a_worker_cannot_open_is_told(model: Small, inputs: Tensor, address: str) -> None:
    with pytest.raises(
        ProcessLostError, match=r"^worker tcp://\S+: expected to carry out its task, found ArithmeticError"
    ):
        swept(model, inputs, metric=Unopened(), cluster=address)


def test_a_task_that_cannot_begin_is_told(address: str) -> None:
    with clusters.workers_of(address) as workers:
        task = workers.hand(wrong, None)
        (ended,) = workers.finished([task])
        with pytest.raises(ProcessLostError, match=f"^cluster {address}: .* found that one ended in ArithmeticError"):
            workers.result(ended)


def test_what_cannot_be_sent_is_refused(model: Small, inputs: Tensor, address: str) -> None:
    lock: Any = __import__("threading").Lock()
    with pytest.raises(UsageError, match=r"can be sent to another process, found that .*lock"):
        swept(model, inputs, metric=lambda _: float(lock.locked()), cluster=address)


def test_why_no_worker_can_be_started_here_is_told(
    model: Small, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_options: object) -> None:
        try:
            raise AssertionError("daemonic processes are not allowed to have children")
        except AssertionError as error:
            raise RuntimeError("Nanny failed to start.") from error

    monkeypatch.setattr("distributed.LocalCluster", refused)
    with pytest.raises(UsageError, match="1 workers cannot be started here: daemonic processes are not allowed"):
        swept(model, inputs, cluster="local:1")


@pytest.mark.parametrize("cluster", ["local:0", "local:x", "locally", "host:8786", "", 2])
def test_a_cluster_is_local_or_an_address(model: Small, inputs: Tensor, cluster: Any) -> None:
    with pytest.raises(UsageError, match="expected local, local:N with N up to 1024, or an address"):
        swept(model, inputs, cluster=cluster)


@pytest.mark.parametrize("cluster", ["tcp://127.0.0.1:9", "carrier-pigeon://loft"])
def test_an_address_where_nobody_answers_is_refused(
    model: Small, inputs: Tensor, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "PATIENCE", 0.5)
    with pytest.raises(UsageError, match=r"expected a scheduler that answers within 0\.5 s, found none"):
        swept(model, inputs, cluster=cluster)


def test_a_worker_of_another_version_is_refused(
    model: Small, inputs: Tensor, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "tool_version", lambda: "9.9.9")
    with pytest.raises(UsageError, match=r"expected convrewrite 9\.9\.9 as here, found"):
        swept(model, inputs, cluster=address)


def test_without_dask_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    torch.save(settled(Small()), tmp_path / "small.pt")
    ran = call("sweep", tmp_path / "small.pt", "--input", "1x3x8x8", "--cluster", "local:2", "-o", tmp_path / "out")
    assert ran.code == 2
    assert ran.message.endswith("is not installed; pip install 'convrewrite[cluster]'")


def test_dask_is_imported_only_when_it_is_asked_for(scripts: Scripts, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; import convrewrite.pipeline; assert not {'dask', 'distributed', 'cloudpickle'} & set(sys.modules)"
    )
    ran = scripts.run(program, folder=tmp_path)
    assert ran.code == 0, ran.err
