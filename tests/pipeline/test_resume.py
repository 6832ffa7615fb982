"""A run goes on where another one was: with the same bytes, and whatever was put into the cache meanwhile."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from networks import natural, settled, state_bytes
from torch import Tensor, nn

from convrewrite import Plan, Result, optimize, plan
from convrewrite.conv import ConvSpec
from convrewrite.folders.lasting import FOLDER_VARIABLE
from convrewrite.planning import choice
from convrewrite.planning.allocation import FittedPlan
from convrewrite.planning.effort import FAST
from convrewrite.planning.kept_surveys import KeptSurveys
from convrewrite.planning.latency_table import MIN_GAIN, LatencyTable
from convrewrite.rewriting.kept_fits import WITH_EFFECT
from convrewrite.rewriting.site_fit import SiteFit
from convrewrite.rules.schema import Match, Protect, Rule
from convrewrite.settings import Settings
from convrewrite.stored.result_cache import LIMIT_VARIABLE, Entry, ResultCache, RunCache
from convrewrite.structures.families.channel import Channel
from convrewrite.structures.structure import Setting
from convrewrite.tuning import refining

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.5)


class Small(nn.Module):
    """Three sites, a BatchNorm behind one, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm, self.third, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(x + self.norm(self.second(x)))
        return self.head(torch.relu(self.third(x)).mean((2, 3)) * 9)


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    return settled(Small())


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    torch.manual_seed(1)
    return natural(32, 3, 8, 8, torch.float32)


@pytest.fixture(autouse=True, scope="module")
def always_swaps() -> Iterator[None]:
    """Every plan seems to do more harm than its parts promised, so that its neighbours are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "evaluate", lambda _, *fitted: FittedPlan(*fitted, math.inf))
        yield


@pytest.fixture(autouse=True)
def own_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")


def rewritten(model: Small, inputs: Tensor, macs: float = 0.4, **options: Any) -> Result:
    options = {"measure": False, "refine": False} | options
    return optimize(model, inputs[:1], [RULE], inputs, budget={"macs": macs}, **options)


@contextmanager
def gathering() -> Iterator[list[str]]:
    """The names of the sites whose inputs are gathered, once for each time."""
    names: list[str] = []
    usual = SiteFit._with_moments

    def counted(self: SiteFit, *args: Any) -> SiteFit:
        names.append(self.site.name)
        return usual(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteFit, "_with_moments", counted)
        yield names


@pytest.fixture
def gathered() -> Iterator[list[str]]:
    with gathering() as names:
        yield names


def told(result: Result) -> tuple[dict[str, bytes], str]:
    return state_bytes(result.model), result.plan.to_json()


@pytest.fixture(scope="module")
def plain(model: Small, inputs: Tensor) -> dict[float, tuple[dict[str, bytes], str, int]]:
    """What runs give that neither find nor keep anything, and how often they gather."""
    found = {}
    for macs in (0.4, 0.5):
        with gathering() as names:
            found[macs] = (*told(rewritten(model, inputs, macs, resume=False)), len(names))
    return found


def test_a_second_run_gathers_nothing_and_gives_the_same_bytes(
    model: Small, inputs: Tensor, plain: dict[float, tuple[dict[str, bytes], str, int]], gathered: list[str]
) -> None:
    assert (*told(rewritten(model, inputs)), len(gathered)) == plain[0.4]
    gathered.clear()
    assert told(rewritten(model, inputs)) == plain[0.4][:2]
    assert gathered == []
    assert told(rewritten(model, inputs, 0.5)) == plain[0.5][:2]  # another budget costs its own fits alone
    assert 0 < len(gathered) < plain[0.5][2]


def test_a_form_more_begins_nothing_again(model: Small, inputs: Tensor, gathered: list[str]) -> None:
    rewritten(model, inputs)
    gathered.clear()
    rewritten(model, inputs, export=("torch_export",), any_speed=True, timeout=9.0, threads=2)
    assert gathered == []


def test_every_setting_is_known_to_change_fits_or_not() -> None:
    """One that is added is put into one of the two: what it changes must not be taken from runs without it."""
    without = {
        "budget", "keep", "outputs", "fast", "any_speed", "int8", "refine", "threads", "timeout", "measure", "exclude", "only",
        "resume", "runtime", "timings", "export", "half", "opset", "free_axes", "device", "timer",
    }  # fmt: skip
    assert {entry.name for entry in fields(Settings)} == without | WITH_EFFECT
    assert not without & WITH_EFFECT


def test_a_fit_is_kept_whatever_is_fitted_behind_it(model: Small, inputs: Tensor, gathered: list[str]) -> None:
    asked: dict[str, Any] = {"measure": False, "refine": False}
    plain = told(optimize(model, inputs[:1], [RULE], inputs, resume=False, **asked))
    gathered.clear()
    optimize(model, inputs[:1], [RULE], inputs, exclude=("third",), **asked)
    assert gathered == ["first", "second"]
    assert told(optimize(model, inputs[:1], [RULE], inputs, **asked)) == plain
    assert gathered == ["first", "second", "third"]


@pytest.mark.parametrize("stage", ["survey", "fit", "swaps"])
def test_an_interrupted_run_goes_on(
    model: Small, inputs: Tensor, plain: dict[float, tuple[dict[str, bytes], str, int]], gathered: list[str], stage: str
) -> None:
    seen = 0

    def interrupt(found: str, _done: int, _total: int, _text: str) -> None:
        nonlocal seen
        seen += found == stage
        if seen == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewritten(model, inputs, progress=interrupt)
    done = len(gathered)
    assert told(rewritten(model, inputs)) == plain[0.4][:2]
    assert done > 0 and len(gathered) <= plain[0.4][2] + 1  # but for the site at which it was interrupted


def test_a_refinement_is_kept_too(model: Small, inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rewritten(model, inputs, fast=True, refine=True)
    monkeypatch.setattr(refining, "_descend", lambda *_: pytest.fail("it was refined again"))
    again = rewritten(model, inputs, fast=True, refine=True)
    assert told(again) == told(first)
    assert (
        [note for note in again.report.notes if "refined in" in note]
        == [note for note in first.report.notes if "refined in" in note]
        != []
    )


def test_other_weights_inputs_rules_and_seeds_find_nothing(model: Small, inputs: Tensor, gathered: list[str]) -> None:
    rewritten(model, inputs, fast=True)
    first = len(gathered)
    torch.manual_seed(9)
    other = settled(Small())
    for changed in (
        lambda: rewritten(other, inputs, fast=True),
        lambda: rewritten(model, inputs.flip(0), fast=True),
        lambda: rewritten(model, inputs, fast=True, seed=1),
        lambda: optimize(
            model, inputs[:1], [RULE.model_copy(update={"structures": ("asymmetric",)})], inputs, {"macs": 0.4}, measure=False,
            fast=True,
        ),
    ):  # fmt: skip
        gathered.clear()
        changed()
        assert len(gathered) > first / 3


class Split(Channel):
    """A structure of somebody else's, whose code changes from run to run while its name and its ranks stay."""

    name = "split"

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        first, last = super().weights(kernel, spec, setting)
        return self.sign * first, last


def test_behind_a_structure_of_somebody_elses_nothing_is_kept(
    model: Small, inputs: Tensor, gathered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Split, "__module__", "somebody.elses")
    split = RULE.model_copy(update={"name": "s", "structures": ("split",), "match": Match(name="second")})
    channel = RULE.model_copy(update={"match": Match(name="first|third")})
    kept = {
        sign: [
            told(
                optimize(
                    model, inputs[:1], [split, channel], inputs, measure=False, refine=False, fast=True, resume=resume,
                    structures=[Split(sign)],
                )
            )
            for resume in (True, False)
        ]
        for sign in (1.0, 0.0)
    }  # fmt: skip
    assert kept[1.0][0] == kept[1.0][1] and kept[0.0][0] == kept[0.0][1]
    assert kept[1.0] != kept[0.0]
    assert gathered.count("first") == 3 and gathered.count("third") == 4


def test_a_survey_in_which_options_had_to_gain_time_is_not_one_in_which_they_only_must_not_lose_any() -> None:
    asked = [
        KeptSurveys.of(RunCache(), FAST, LatencyTable({}, least_gain=least), ["first"]).asked
        for least in (MIN_GAIN, 0.0, None)
    ]
    assert len(set(map(repr, asked))) == 3


def _shapes(entry: Entry) -> Entry:
    return Entry(entry.facts, {name: tensor[:1] for name, tensor in entry.tensors.items()})


def _more_dimensions(entry: Entry) -> Entry:
    return Entry(entry.facts, {name: tensor[None] for name, tensor in entry.tensors.items()})


def _not_finite(entry: Entry) -> Entry:
    return Entry(entry.facts, {name: tensor * float("nan") for name, tensor in entry.tensors.items()})


def _single(entry: Entry) -> Entry:
    return Entry(entry.facts, {name: tensor.half() for name, tensor in entry.tensors.items()})


def _names(entry: Entry) -> Entry:
    return Entry(entry.facts, {f"{name}x": tensor for name, tensor in entry.tensors.items()})


def _no_facts(entry: Entry) -> Entry:
    return Entry(None, entry.tensors)


def _facts(**others: object) -> Callable[[Entry], Entry]:
    def harm(entry: Entry) -> Entry:
        return Entry(entry.facts | others if isinstance(entry.facts, dict) else "no list", entry.tensors)

    return harm


def _options(**others: object) -> Callable[[Entry], Entry]:
    def harm(entry: Entry) -> Entry:
        if not isinstance(entry.facts, dict) or "options" not in entry.facts:
            return _no_facts(entry)
        return Entry(entry.facts | {"options": [row | others for row in entry.facts["options"]]}, entry.tensors)

    return harm


HARMS: dict[str, Callable[[Entry], Entry]] = {
    "shapes": _shapes,
    "dimensions": _more_dimensions,
    "not finite": _not_finite,
    "half precision": _single,
    "names": _names,
    "no facts": _no_facts,
    "a candidate there is not": _facts(chosen=99),
    "no number": _facts(chosen=True, gains={"x": [2.0]}),
    "a reason that moves the cursor": _facts(chosen=None, reason="\x1b[2J"),
    "another key": _facts(code="import os"),
    "a rank there is not": _options(rank=10**9),
    "a range there is not": _options(range=77),
    "a lowering there is not": _options(lowering="__import__('os')"),
    "a negative effect": _options(effect=-1.0),
    "times that nobody asked for": _options(seconds=1e-9),
}


@pytest.fixture(scope="module")
def short(model: Small, inputs: Tensor) -> dict[str, bytes]:
    return state_bytes(rewritten(model, inputs, fast=True, resume=False).model)


@pytest.fixture(scope="module")
def kept(model: Small, inputs: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short run keeps."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(folder))
        patch.setenv(LIMIT_VARIABLE, "1")
        rewritten(model, inputs, fast=True)
    return folder


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_whole_entries_that_say_what_cannot_be_are_not_believed(
    model: Small,
    inputs: Tensor,
    short: dict[str, bytes],
    kept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Entry], Entry],
) -> None:
    copytree(kept, tmp_path, dirs_exist_ok=True)
    usual, harmed = ResultCache.get, []

    def hostile(self: ResultCache, key: str) -> Entry | None:
        entry = usual(self, key)
        harmed.append(entry)
        return entry and harm(entry)

    monkeypatch.setattr(ResultCache, "get", hostile)
    assert state_bytes(rewritten(model, inputs, fast=True).model) == short
    assert any(harmed)


def test_refined_numbers_that_are_no_better_are_not_believed(
    model: Small, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = told(rewritten(model, inputs, fast=True, refine=True))
    usual = ResultCache.get

    def hostile(self: ResultCache, key: str) -> Entry | None:
        entry = usual(self, key)
        if entry is None or '"refinement"' not in key:
            return entry
        return Entry(entry.facts, {name: tensor * 1.5 for name, tensor in entry.tensors.items()})

    monkeypatch.setattr(ResultCache, "get", hostile)
    assert told(rewritten(model, inputs, fast=True, refine=True)) == wanted


def test_plans_are_the_same_too(model: Small, inputs: Tensor) -> None:
    made: list[Plan] = [
        plan(model, inputs[:1], [RULE], inputs, {"macs": 0.4}, measure=False, resume=resume) for resume in (True, True, False)
    ]  # fmt: skip
    assert made[0] == made[1] == made[2]
