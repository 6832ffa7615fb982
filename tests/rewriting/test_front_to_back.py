"""Site after site, from end to end; and properties over drawn networks."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import (
    Branching,
    Brighter,
    CalledTwice,
    Chain,
    Drawn,
    NineKinds,
    Residual,
    Step,
    TwoNames,
    natural,
    relative,
    settled,
    state_bytes,
)
from torch import Tensor, nn
from works import work_of

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Kind
from convrewrite.errors import UsageError
from convrewrite.fitting.moments import Accumulator
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.rewriting import site_fit, site_inputs, store
from convrewrite.rewriting.front_to_back import Rewritten, rewrite
from convrewrite.rewriting.site_fit import UNREACHED
from convrewrite.rules.options import Candidate, Shortlist, search_spaces, shortlist_of
from convrewrite.rules.schema import Match, Protect, Require, Rule
from convrewrite.settings import Settings
from convrewrite.structures.algebra import compose
from convrewrite.structures.discovery import discover
from convrewrite.structures.structure import Structure

UNPROTECTED = Protect(stem=False, min_channels=0, min_mac_share=0)
WEIGHTS = Calibration((), (), "weights only", "none")


def rule(*names: str, **values: object) -> Rule:
    return Rule(**{"name": "r", "structures": names, "protect": UNPROTECTED, "ratio": 0.5, **values})  # type: ignore[arg-type]


def data(dtype: torch.dtype = torch.float64, count: int = 6, held_out: int = 2) -> Calibration:
    x = natural(4 * (count + held_out), 3, 12, 12, dtype)
    parts = [(part,) for part in x.split(4)]
    return Calibration(tuple(parts[:count]), tuple(parts[count:]), "data", "a test")


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    dtype = next(model.parameters()).dtype
    return find_sites(model, (torch.randn(1, 3, 12, 12).to(dtype),), trace(model))


def shortlists_of(model: nn.Module, *rules: Rule) -> tuple[Shortlist, ...]:
    return tuple(shortlist_of(space) for space in search_spaces(sites_of(model), rules, discover()))


def full_rank_shortlists(model: nn.Module, *names: str) -> tuple[Shortlist, ...]:
    """The first structure that takes a site, at full rank in its first variant: dearer than the original, and exact."""
    found = []
    for space in search_spaces(sites_of(model), [rule(*names)], discover()):
        if not space.rank_ranges:
            found.append(Shortlist(space.site, (), space.reason))
            continue
        rank_range = space.rank_ranges[0]
        found.append(Shortlist(space.site, (rank_range.at(max(rank_range.ranks)),)))
    return tuple(found)


def rewritten(
    model: nn.Module, shortlists: Sequence[Shortlist], calibration: Calibration, **values: object
) -> Rewritten:
    settings = Settings(seed=int(values.pop("seed", 0)))  # type: ignore[call-overload]
    object.__setattr__(settings, "memory", values.pop("memory", 1 << 30))  # less than a user may ask for
    return rewrite(work_of(model, calibration, settings=settings, **values), shortlists)  # type: ignore[arg-type]


def low_rank(model: nn.Module, structure: Structure, rank: int) -> nn.Module:
    """The model with kernels that the structure reproduces exactly at this rank."""
    with torch.no_grad():
        for module in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            kernel = module.weight
            spec = next(site.spec for site in sites_of(model) if model.get_submodule(site.name) is module)
            setting = {**structure.variants(spec)[0], "rank": rank}
            stages = structure.stages(spec, setting)
            factors = [torch.randn(s.kernel_shape(spec.kernel_size), dtype=kernel.dtype) for s in stages]
            composed = compose(factors, stages)
            kernel.copy_(composed * kernel.std() / composed.std())
    return model


# --- exactness


NETWORKS = [Chain, Residual, CalledTwice, TwoNames, Branching, NineKinds]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
@pytest.mark.parametrize("calibration", ["data", "weights only"])
@pytest.mark.parametrize(
    "names", [("channel",), ("separable", "channel"), ("asymmetric", "tucker", "channel")], ids=str
)
@torch.no_grad()
def test_full_rank_gives_the_originals_outputs(
    network: type[nn.Module], calibration: str, names: tuple[str, ...]
) -> None:
    model = settled(network().double())
    before = state_bytes(model)
    with torch.enable_grad():
        found = rewritten(
            model, full_rank_shortlists(model, *names), data(count=2) if calibration == "data" else WEIGHTS
        )
    x = natural(4, 3, 12, 12)
    assert relative(found.model(x.clone()), model(x.clone())) < (1e-4 if calibration == "data" else 1e-10)
    assert state_bytes(model) == before
    assert all((outcome.candidate is None) != (outcome.reason is None) for outcome in found.outcomes)
    assert any(outcome.candidate for outcome in found.outcomes)


@pytest.mark.parametrize("name", ["separable", "asymmetric", "channel", "tucker"])
def test_a_rule_restricted_to_the_true_rank_gives_the_originals_outputs(
    name: str, structures: dict[str, Structure]
) -> None:
    model = settled(low_rank(Chain(12).double().eval(), structures[name], 1))
    only = rule(name, ratio=0.99, require=Require(min_mac_saving=0.01), parameters={name: {"rank": (1,)}})
    shortlists = shortlists_of(model, only)
    assert all(shortlist.candidates for shortlist in shortlists)
    found = rewritten(model, shortlists, data())
    x = natural(4, 3, 12, 12)
    assert relative(found.model(x), model(x)) < 1e-3
    assert all(outcome.error is not None and outcome.error < 1e-3 for outcome in found.outcomes)


# --- what is told


def test_the_told_error_is_that_of_the_held_out_outputs() -> None:
    model = settled(Chain().double())
    calibration = data()
    shortlists = [
        o if o.site.name == "6" else Shortlist(o.site, (), "not now") for o in shortlists_of(model, rule("channel"))
    ]
    found = rewritten(model, shortlists, calibration)
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    for net, key in ((model, "before"), (found.model, "after")):
        handle = net[6].register_forward_hook(lambda _m, _a, y, key=key: seen[key].append(y.detach().clone()))
        for inputs in calibration.held_out:
            net(*inputs)
        handle.remove()
    before, after = torch.cat(seen["before"]), torch.cat(seen["after"])
    spread = (before - before.mean((0, 2, 3), keepdim=True)).square().sum()
    told = found.outcomes[-1].error
    assert told is not None
    # Behind a ReLU the fit may move the bias of what the ReLU cuts off: the told error is that with the best bias.
    assert told**2 <= 1.001 * float((before - after).square().sum() / spread)
    assert told > 0.01


def test_a_site_beyond_its_rules_error_limit_is_kept_with_a_reason() -> None:
    model = settled(Residual().double())
    strict = rule("separable", parameters={"separable": {"rank": (1,)}}, require=Require(max_output_error=1e-6))
    found = rewritten(model, shortlists_of(model, strict), data(count=2))
    for outcome in found.outcomes:
        assert outcome.candidate is None
        assert outcome.reason
    reasons = [str(o.reason) for o in found.outcomes if o.site.kind is not Kind.POINTWISE]
    assert all(r.startswith("every option's output error exceeds the rule's limit; the least is 0.") for r in reasons)
    x = natural(2, 3, 12, 12)
    assert torch.equal(found.model(x), model(x))


def test_a_site_is_kept_when_no_input_to_fit_on_gets_to_it() -> None:
    model, bright = Brighter().double().eval(), natural(4, 3, 12, 12) + 1
    shortlists = search_spaces(find_sites(model, (bright,), trace(model)), [rule("channel")], discover())
    shortlists = [shortlist_of(space) for space in shortlists]
    dark = torch.full_like(bright, -1)
    never = rewritten(model, shortlists, Calibration(((dark,),), ((bright,),), "data", "a test"))
    assert [outcome.reason for outcome in never.outcomes] == [None, UNREACHED]
    assert state_bytes(never.model.second) == state_bytes(model.second)
    seldom = rewritten(model, shortlists, Calibration(((dark,), (bright,)), ((dark,),), "data", "a test"))
    assert all(outcome.candidate is not None and outcome.error for outcome in seldom.outcomes)


def test_at_a_large_site_a_missed_limit_does_not_shut_out_another_rules_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(site_fit, "LARGE", 1)
    model, one = settled(Chain().double()), {"separable": {"rank": (1,)}}
    rules = rule("channel", require=Require(max_output_error=1e-6)), rule("separable", parameters=one)
    [taken] = rewritten(model, shortlists_of(model, *rules)[:1], data(count=2)).outcomes
    assert taken.candidate is not None and taken.candidate.option.structure == "separable"


def test_a_lenient_limit_keeps_nothing() -> None:
    model = settled(Chain().double())
    found = rewritten(
        model, shortlists_of(model, rule("channel", require=Require(max_output_error=10.0))), data(count=2)
    )
    assert all(outcome.candidate is not None for outcome in found.outcomes)


def test_of_several_candidates_the_one_with_the_least_held_out_error_is_taken() -> None:
    model = settled(Chain(12).double())
    calibration = data(count=3)
    rules = [rule("channel"), rule("separable", name="s"), rule("asymmetric", name="a")]
    shortlists = shortlists_of(model, *rules)
    first = next(i for i, shortlist in enumerate(shortlists) if len(shortlist.candidates) > 1)
    site = shortlists[first].site

    def alone(candidates: tuple[Candidate, ...]) -> tuple[str, float]:
        shortlist = [
            Shortlist(o.site, candidates if o.site is site else (), None if o.site is site else "not now")
            for o in shortlists
        ]
        outcome = rewritten(model, shortlist, calibration).outcomes[first]
        assert outcome.candidate is not None and outcome.error is not None
        return outcome.candidate.option.describe(), outcome.error

    singles = [alone((candidate,)) for candidate in shortlists[first].candidates]
    chosen, error = alone(shortlists[first].candidates)
    assert chosen in [name for name, _ in singles]
    assert error <= min(e for _, e in singles) * 1.25  # what a ReLU lets through is refitted after the choice


def test_without_data_the_error_is_that_of_the_kernel() -> None:
    model = settled(Chain().double())
    found = rewritten(model, shortlists_of(model, rule("channel")), WEIGHTS)
    assert all(o.error is not None and 0 < o.error < 1 for o in found.outcomes if o.candidate)
    assert any(o.candidate for o in found.outcomes)


def test_data_does_better_than_the_weights_alone() -> None:
    model = settled(Residual(12).double())
    shortlists = shortlists_of(model, rule("separable", "channel", ratio=0.4))
    calibration = data(count=16)
    x = torch.cat([inputs[0] for inputs in calibration.held_out])
    fitted = relative(rewritten(model, shortlists, calibration).model(x), model(x))
    plain = relative(rewritten(model, shortlists, WEIGHTS).model(x), model(x))
    assert fitted < 0.5 * plain


def test_progress_names_every_site_and_ends_at_the_last() -> None:
    model = settled(Chain())
    told: list[tuple[str, int, int, str]] = []
    rewritten(
        model, shortlists_of(model, rule("channel")), data(torch.float32, 2), progress=lambda *args: told.append(args)
    )
    assert {stage for stage, _, _, _ in told} == {"fit"}
    done = [count for _, count, _, _ in told]
    assert done == sorted(done)
    assert told[-1][1] == told[-1][2] == len([o for o in shortlists_of(model, rule("channel")) if o.candidates])


# --- determinism


@pytest.mark.parametrize(
    ("dtype", "memory"), [(torch.float32, 400_000), (torch.float64, 1 << 30)], ids=["on disk", "in memory"]
)
def test_two_runs_give_the_same_bytes(dtype: torch.dtype, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []
    plain = store.Waiting.put
    monkeypatch.setattr(store.Waiting, "put", lambda value, path: (saved.append(path), plain(value, path))[1])
    model = settled(Chain().to(dtype))
    shortlists, calibration = shortlists_of(model, rule("separable", "cp", ratio=0.3)), data(dtype, 2, 1)
    first = rewritten(model, shortlists, calibration, memory=memory)
    assert bool(saved) == (dtype == torch.float32), "activations wait on disk where memory is little, and only there"
    torch.manual_seed(77)
    again = rewritten(model, shortlists, calibration)
    assert state_bytes(first.model) == state_bytes(again.model)
    assert [o.error for o in first.outcomes] == [o.error for o in again.outcomes]


def test_patches_that_are_cut_from_planes_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = settled(Chain().float())
    shortlists, calibration = shortlists_of(model, rule("separable", "cp", ratio=0.3)), data(torch.float32, 2, 1)
    kept = rewritten(model, shortlists, calibration)
    cut: list[bool] = []
    usual = Accumulator.__init__
    monkeypatch.setattr(site_inputs, "OF_MEMORY", 1 << 40)  # any patch is too much
    monkeypatch.setattr(
        Accumulator, "__init__", lambda *args, **named: (cut.append(named["cut"]), usual(*args, **named))[1]
    )
    planes = rewritten(model, shortlists, calibration)
    assert any(cut)
    assert state_bytes(planes.model) == state_bytes(kept.model)


@torch.no_grad()
def test_a_model_in_bfloat16_can_be_rewritten() -> None:
    model = settled(Chain().to(torch.bfloat16))
    with torch.enable_grad():
        found = rewritten(model, shortlists_of(model, rule("channel")), data(torch.bfloat16, 2))
    x = natural(2, 3, 12, 12, torch.bfloat16)
    assert {p.dtype for p in found.model.parameters()} == {torch.bfloat16}
    assert relative(found.model(x), model(x)) < 1


def test_a_rewritten_model_can_be_rewritten_again() -> None:
    model = settled(Chain().double())
    once = rewritten(model, full_rank_shortlists(model, "separable"), WEIGHTS).model
    twice = rewritten(once, full_rank_shortlists(once, "channel"), WEIGHTS)
    x = natural(2, 3, 12, 12)
    assert any(outcome.candidate for outcome in twice.outcomes)
    assert relative(twice.model(x), model(x)) < 1e-10


# --- drawn networks


def is_possible(step: Step) -> bool:
    return not (step.transposed and step.padding_mode != "zeros")


STEPS = st.builds(
    Step,
    way=st.sampled_from(["plain", "skip", "branches", "twice"]),
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    norm=st.booleans(),
    transposed=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
).filter(is_possible)
NAMES = st.permutations(["separable", "asymmetric", "channel", "grouped", "tucker", "cp"]).map(
    lambda names: [*names[:3], "channel"]
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(STEPS, min_size=1, max_size=4),
    names=NAMES.map(lambda names: tuple(dict.fromkeys(names))),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
@torch.no_grad()
def test_any_network_at_full_rank_gives_its_own_outputs(
    steps: list[Step], names: tuple[str, ...], double: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    model = settled(Drawn(steps).to(dtype))
    before = state_bytes(model)
    narrow = Rule(name="r", structures=names, match=Match(name="main.*|side.*"), protect=UNPROTECTED)
    shortlists = []
    for space in search_spaces(sites_of(model), [narrow], discover()):
        rank_range = space.rank_ranges[0] if space.rank_ranges else None
        shortlists.append(
            Shortlist(space.site, (rank_range.at(max(rank_range.ranks)),) if rank_range else (), space.reason)
        )
    found = rewritten(model, shortlists, WEIGHTS)
    x = torch.randn(2, 3, 12, 12).to(dtype)
    assert relative(found.model(x), model(x)) < (1e-9 if double else 1e-3)
    assert state_bytes(model) == before
    for outcome in found.outcomes:
        assert (outcome.reason is None) == (outcome.candidate is not None)
        assert outcome.candidate is None or outcome.candidate.option.structure in names
    assert [name for name, module in found.model.named_modules() if module.training] == []


# --- memory


def test_a_memory_limit_that_the_largest_site_exceeds_is_refused_before_the_work() -> None:
    model = settled(Chain().double())
    shortlists, calibration = shortlists_of(model, rule("channel")), data(torch.float64, 2, 1)
    told: list[str] = []
    with pytest.raises(UsageError, match=r"memory: .* needs \d+\.\d MB .* found a limit of 0\.0 MB; give more"):
        rewritten(model, shortlists, calibration, memory=1000, progress=lambda stage, *_: told.append(stage))
    assert told == []
    with pytest.raises(UsageError) as refused:
        rewritten(model, shortlists, calibration, memory=1000)
    active = [shortlist.site.name for shortlist in shortlists if shortlist.candidates]
    assert len(active) > 1
    assert all(f"--exclude {name}" in str(refused.value) for name in active)
    weights = Calibration((), calibration.held_out, "weights only", "none")
    assert rewritten(model, shortlists, weights, memory=1000).model is not model


def test_a_small_memory_limit_keeps_fewer_positions_and_still_fits() -> None:
    model = settled(Chain().float())
    shortlists, calibration = shortlists_of(model, rule("channel", ratio=0.6)), data(torch.float32, 2, 1)
    plenty = rewritten(model, shortlists, calibration)
    little = rewritten(model, shortlists, calibration, memory=300_000)
    assert [o.positions or 0 for o in little.outcomes] < [o.positions or 0 for o in plenty.outcomes]
    for a, b in zip(plenty.outcomes, little.outcomes, strict=True):
        assert (a.error is None) == (b.error is None)
        assert a.error is None or b.error is None or b.error < 2 * a.error + 0.05
