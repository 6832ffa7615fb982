"""Plans from strangers: whatever stands in one, it is carried out as the tool would have written it, or refused."""

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call
from networks import settled
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import ModelLoadError, PlanError
from convrewrite.results.reading import read_plan

X = torch.zeros(1, 3, 12, 12)


class Net(nn.Module):
    """A plain convolution with BatchNorm, and functional ones on a parameter and in a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.BatchNorm2d(8)
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.kernels = nn.ParameterList([torch.randn(16, 16, 3, 3) / 12])

    def forward(self, x: Tensor, power: int = 1) -> Tensor:
        x = self.norm(self.inner(self.stem(x).relu())).relu()
        x = torch.conv2d(x, self.weight, padding=1).relu()
        return torch.conv2d(x, self.kernels[0], padding=1) ** power


def network() -> Net:
    torch.manual_seed(0)
    return settled(Net())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plan")
    convrewrite.optimize(network(), X, calibration="weights", measure=False).save(place / "out")
    return place / "out"


@pytest.fixture
def good(folder: Path) -> Any:
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture
def written(folder: Path, tmp_path: Path) -> Callable[[Any], Path]:
    """Writes the folder again with another plan: a value, or the bytes themselves."""
    (tmp_path / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())

    def write(plan: Any) -> Path:
        content = plan if isinstance(plan, bytes) else json.dumps(plan).encode()
        (tmp_path / "plan.json").write_bytes(content)
        return tmp_path

    return write


def convs(plan: Any) -> list[Any]:
    return [conv for lift in plan["lifted"] for conv in lift["convs"]]


def site(plan: Any, name: str) -> Any:
    return next(entry for entry in plan["sites"] if entry["name"] == name)


def inner(plan: Any) -> Any:
    return site(plan, "inner")


def test_the_plan_of_these_tests_is_carried_out(folder: Path, good: Any) -> None:
    assert {conv["name"] for conv in convs(good)} == {"weight", "kernels_0"}
    assert inner(good)["batch_norm"] == "norm"
    convrewrite.load(folder, network())(X)
    again = convrewrite.apply(network(), X, convrewrite.Plan.from_json(json.dumps(good), "p"), "weights", measure=False)
    assert again.plan.site("inner").option is not None


def everywhere(plan: Any, old: str, new: str) -> None:
    """Rename a site wherever the plan calls it by its name."""
    for entry in (*convs(plan), *plan["sites"]):
        if entry["name"] == old:
            entry["name"] = new


def code(marker: Path) -> str:
    return f'weight" if getattr(__import__("os"), "system")("touch {marker}") else "weight'


@pytest.mark.parametrize(
    "entry", ["name", "weight", "bias", "module", "arguments", "batch_norm", "structure", "lowering"]
)
def test_code_in_any_string_of_a_plan_is_refused(
    good: Any, written: Callable[[Any], Path], tmp_path: Path, entry: str
) -> None:
    hidden, first = code(tmp_path / "executed"), inner(good)
    if entry == "name":
        everywhere(good, "weight", hidden)
    elif entry in ("weight", "bias"):
        convs(good)[0][entry] = hidden
    elif entry in ("module", "arguments"):
        good["lifted"][0][entry] = hidden if entry == "module" else ["x", hidden]
    else:
        (first if entry == "batch_norm" else first["option"])[entry] = hidden
    with pytest.raises(PlanError):
        convrewrite.load(written(good), network())(X)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "__class__",
        "training",
        "stem",
        "kernels",
        "norm.weight",
        "weight_conv_conv_conv",
        "other",
        "",
        "_modules",
    ],
)
def test_a_lifted_convolution_has_the_name_that_lifting_gives_it(
    good: Any, written: Callable[[Any], Path], name: str
) -> None:
    everywhere(good, "weight", name)
    with pytest.raises(PlanError, match="expected a"):
        convrewrite.load(written(good), network())


SPEC = {
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "output_padding",
    "kernels",
    "dims",
}


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**18])
@pytest.mark.parametrize("field", sorted(SPEC))
def test_a_geometry_that_is_not_that_of_the_call_is_refused_before_it_is_built(
    good: Any, written: Callable[[Any], Path], field: str, value: int
) -> None:
    spec = convs(good)[0]["spec"]
    if spec[field] in (value, [value, value]):
        value = 7
    spec[field] = [value, value] if isinstance(spec[field], list) else value
    with pytest.raises(PlanError):
        convrewrite.load(written(good), network())


def first_option(plan: Any) -> Any:
    return inner(plan)["option"]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "rank of a billion": (lambda p: first_option(p)["parameters"].update(rank=10**9), "expected a rank from 1 to"),
    "rank of many digits": (lambda p: first_option(p)["parameters"].update(rank=10**300), "expected a rank from 1 to"),
    "rank in words": (lambda p: first_option(p)["parameters"].update(rank="two"), "found 'two'"),
    "rank of a half": (
        lambda p: first_option(p)["parameters"].update(rank=1.5),
        "expected a plan written by this tool",
    ),
    "no rank": (lambda p: first_option(p)["parameters"].pop("rank"), "expected a rank from 1 to"),
    "negative rank": (lambda p: first_option(p)["parameters"].update(rank=-1), "expected a rank from 1 to"),
    "another parameter": (lambda p: first_option(p)["parameters"].update(x=1), "has no variant"),
    "unknown kind": (lambda p: inner(p).update(kind="round"), r"sites\.1\.kind"),
    "another kind": (lambda p: inner(p).update(kind="depthwise"), "the plan says|the plan and the model"),
    "another geometry": (lambda p: inner(p).update(geometry="3->8 1x1"), "the plan says"),
    "no such BatchNorm": (lambda p: inner(p).update(batch_norm="nothing"), "BatchNorm"),
    "a convolution for a BatchNorm": (lambda p: inner(p).update(batch_norm="stem"), "BatchNorm"),
    "a BatchNorm of other channels": (lambda p: inner(p).update(batch_norm="last"), "BatchNorm"),
    "a BatchNorm twice": (lambda p: site(p, "weight").update(batch_norm="norm"), "BatchNorm"),
    "lifted without convolutions": (lambda p: p["lifted"][0].update(convs=[]), "convolutions"),
    "lifted twice": (lambda p: p["lifted"].append(p["lifted"][0]), "twice|functional convolutions"),
    "lifted in no module": (lambda p: p["lifted"][0].update(module="a.b"), "no such module|functional convolutions"),
    "lifted and not": (lambda p: p.update(lifted=[]), "expected a convolution|functional convolutions"),
    "one site twice": (lambda p: p["sites"].append(p["sites"][0]), "two sites are called"),
    "a site without a name": (lambda p: inner(p).pop("name"), r"sites\.1\.name"),
    "a seed of many digits": (lambda p: p.update(seed=10**40), "seed"),
    "no sites at all": (lambda p: p.pop("sites"), "sites"),
    "a name of no text": (lambda p: inner(p).update(name=3), r"sites\.1\.name"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_tool_would_not_have_written_is_an_error_of_the_plan(
    good: Any, written: Callable[[Any], Path], name: str
) -> None:
    change, message = CHANGES[name]
    change(good)
    place = written(good)
    with pytest.raises(PlanError, match=message):
        convrewrite.load(place, network())
    with pytest.raises(PlanError, match=message):
        convrewrite.apply(network(), X, read_plan(place / "plan.json"), "weights", measure=False)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": 1' + b"0" * 10_000 + b"}",
        b"nothing",
        b"\x00" * 64,
    ],
)
def test_what_is_no_plan_is_one_message_and_exit_code_2(written: Callable[[Any], Path], content: bytes) -> None:
    place = written(content)
    with pytest.raises(PlanError, match=r"plan\.json: "):
        convrewrite.load(place, network())
    ran = call("explain", place)
    assert ran.code == 2
    assert ran.err.startswith("convrewrite: ")


def test_every_value_of_a_plan_may_be_of_another_type(good: Any, written: Callable[[Any], Path]) -> None:
    """One value after another becomes something else; each time the plan is refused, or does what it did."""
    loaded, tried = 0, 0
    for path in [path for path in paths(good) if "considered" not in path and "predicted" not in path]:
        for value in (None, "x\x1b", 1e308):
            changed = copy.deepcopy(good)
            put(changed, path, value)
            tried += 1
            with contextlib.suppress(PlanError, ModelLoadError):
                convrewrite.load(written(changed), network())
                loaded += 1
    assert 0 < loaded < tried / 4


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [(*path, key) for key, _ in entries]
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += paths(inner, (*path, key))
    return found


def put(plan: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        plan = plan[key]
    plan[path[-1]] = value
