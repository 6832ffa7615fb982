"""Times from another machine are those of one model, hold for every budget, and replace nothing else."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from clocks import FalseTimer
from commands import INPUT, call, images, small_network
from torch import nn

import convrewrite
from convrewrite.errors import PlanError, UsageError
from convrewrite.runtime.latency import ONNXRUNTIME
from convrewrite.targets import ORIGINAL, Profile, profile_graphs, profiles, read_profile, save_profile

RULES = ["balanced", "separable"]


def settings(**asked: object) -> convrewrite.Settings:
    return convrewrite.Settings(fast=True, timer=FalseTimer(), **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("times") / "t.json"
    found = convrewrite.profile(small_network(), images(2)[:1], RULES, settings=settings())
    assert found is not None
    save_profile(found, path)
    return path


def planned(model: nn.Module, times: Path, **asked: object) -> convrewrite.Plan:
    return convrewrite.plan(model, images(2)[:1], RULES, images(), timings=str(times), fast=True, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [{"budget": {"macs": 0.8}}, {"budget": {"params": 0.8}}, {"keep": 0.5}, {}],
)  # fmt: skip
def test_they_hold_for_every_budget(asked: dict[str, object], times: Path) -> None:
    assert planned(small_network(), times, **asked).sites


def test_they_are_of_no_use_where_nothing_need_be_fast(times: Path) -> None:
    for asked in ({"budget": {"macs": 0.8}}, {"keep": 0.5}):
        with pytest.raises(UsageError, match=r"--any-speed: expected one of them .*; leave one out"):
            planned(small_network(), times, any_speed=True, **asked)
    assert planned(small_network(), times, any_speed=True).sites


def test_times_of_another_model_are_refused_and_those_of_its_file_are_not(times: Path, tmp_path: Path) -> None:
    other = small_network()
    torch.manual_seed(1)
    for module in other.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    planned(other, times)  # other weights take as long
    convrewrite.export(small_network(), images(2)[:1], tmp_path / "m.onnx")
    of_file = convrewrite.profile(tmp_path / "m.onnx", None, RULES, settings=settings())
    assert of_file is not None and of_file.model == read_profile(times).model
    more = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), small_network()).eval()
    with pytest.raises(PlanError, match="expected times of this model at this input size, found those of another"):
        planned(more, times)
    told = json.loads(times.read_text())
    del told["model"]  # as earlier versions wrote it
    (tmp_path / "earlier.json").write_text(json.dumps(told))
    planned(small_network(), tmp_path / "earlier.json")


def test_graphs_tell_their_model(times: Path, tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "m.pt")
    graphs = call("profile", tmp_path / "m.pt", *INPUT, "--rule", "separable", "--graphs", tmp_path / "g", "--fast")
    assert graphs.code == 0, graphs.err
    model = read_profile(times).model
    assert model is not None and json.loads((tmp_path / "g/graphs.json").read_text())["model"] == model


EXPANDED = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (int64[4] s, float[n, 8, 8, 8] x) => (float[n, 8, 8, 8] y) <float[8, 8, 3, 3] w = {WEIGHTS}>
    { a = Conv<pads = [1, 1, 1, 1]>(x, w)  b = Expand(a, s)  y = Identity(b) }
"""


def test_what_all_examples_share_is_not_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers go along, as they may decide what is computed: ones would be another shape here."""
    text = EXPANDED.replace("WEIGHTS", ", ".join(["0.1"] * 576))
    onnx.save(onnx.parser.parse_model(text), str(tmp_path / "m.onnx"))
    shared = torch.tensor([1, 8, 8, 8])
    convrewrite.profile(tmp_path / "m.onnx", {"x": torch.ones(2, 8, 8, 8), "s": shared}, graphs=tmp_path / "g")
    told = json.loads((tmp_path / "g/graphs.json").read_text())
    assert (told["examples"], told["inputs"][0]["values"]) == (2, shared.tolist())
    assert "values" not in told["inputs"][1]
    monkeypatch.setattr(profiles, "whole_seconds", lambda *_, **__: 6.0)
    monkeypatch.setattr(profiles, "framed_seconds", lambda made, *_, **__: [1.0] * len(made))
    assert profile_graphs(tmp_path / "g", ONNXRUNTIME, 1, 1).seconds[ORIGINAL] == 3.0


@pytest.mark.parametrize("seconds", [None, 10**400, 1e300, float("inf")])
def test_an_original_that_has_no_time_is_refused(seconds: float | None, tmp_path: Path) -> None:
    good = json.loads(Profile("onnxruntime", "1", "a processor", 16, 1, {ORIGINAL: 1.0, "a": 1.0}).to_json())
    (tmp_path / "t.json").write_text(json.dumps(good | {"seconds": {ORIGINAL: seconds, "a": 1.0}}))
    with pytest.raises(UsageError, match=r"--timings .*: expected (seconds up to 1e\+09|the seconds of the original)"):
        read_profile(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps(good | {"seconds": {ORIGINAL: 1.0, "a": None}}))
    assert read_profile(tmp_path / "t.json").seconds["a"] == float("inf")


def test_times_replace_nothing_but_times(times: Path, tmp_path: Path) -> None:
    torch.save(small_network(), tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()
    refused = call("profile", tmp_path / "m.pt", *INPUT, "--fast", "-o", tmp_path / "m.pt")
    assert refused.code == 2 and "holds something else than timings, which would be lost" in refused.message
    assert (tmp_path / "m.pt").read_bytes() == before
    found = read_profile(times)
    with pytest.raises(UsageError, match="holds something else than timings"):
        save_profile(found, tmp_path / "m.pt")
    (tmp_path / "t.json").write_bytes(times.read_bytes())
    save_profile(found, tmp_path / "t.json")
