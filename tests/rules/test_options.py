"""What the rules allow at every site, and why at some there is nothing."""

import re
from typing import Any

import pytest
import torch
from networks import CalledTwice, NineKinds, Residual, macs_by_hooks, settled
from torch import nn

from convrewrite.conv import ConvSpec, Kind
from convrewrite.errors import RuleFileError, UsageError
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.rewriting.surgery import empty_option, replace_site
from convrewrite.rules.files import builtin_rules, check, load_rule_file
from convrewrite.rules.options import SearchSpace, search_spaces, shortlist_of, subjects
from convrewrite.rules.schema import Match, Protect, Require, Rule, RuleFile
from convrewrite.structures.structure import Setting, Structure

X = torch.zeros(1, 3, 12, 12)
UNPROTECTED = Protect(stem=False, min_channels=0, min_mac_share=0)


def rule(*names: str, **values: object) -> Rule:
    return Rule(**{"name": "r", "structures": names, "protect": UNPROTECTED, "ratio": 0.6, **values})  # type: ignore[arg-type]


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    return find_sites(model, (X,), trace(model))


def spaces_of(model: nn.Module, structures: dict[str, Structure], *rules: Rule) -> dict[str, SearchSpace]:
    return {space.site.name: space for space in search_spaces(sites_of(settled(model)), rules, structures)}


def test_every_site_has_options_or_a_reason(structures: dict[str, Structure]) -> None:
    for space in spaces_of(NineKinds(16), structures, rule(*structures)).values():
        shortlist = shortlist_of(space)
        assert bool(shortlist.candidates) != bool(shortlist.reason), space.site.name
        assert shortlist.candidates or len(str(shortlist.reason).split()) > 2


def test_a_refused_site_keeps_its_own_reason(structures: dict[str, Structure]) -> None:
    space = spaces_of(NineKinds(), structures, rule("channel"))["#0"]
    assert (space.rank_ranges, space.reason) == ((), "the kernel is computed from the input")
    assert shortlist_of(space).reason == space.reason


def test_what_a_rule_does_not_take_has_the_rules_reason(structures: dict[str, Structure]) -> None:
    found = spaces_of(NineKinds(), structures, rule("channel", match=Match(kind=(Kind.DILATED,))))
    assert [name for name, space in found.items() if space.rank_ranges] == ["dilated"]
    assert found["standard"].reason == "kind is standard, the rule takes dilated"


def test_what_no_structure_takes_has_the_structures_reasons(structures: dict[str, Structure]) -> None:
    found = spaces_of(NineKinds(), structures, rule("asymmetric", "separable"))
    assert "no second axis" in str(found["pointwise"].reason) and "no spatial extent" in str(found["pointwise"].reason)
    assert {rank_range.structure.name for rank_range in found["asymmetric"].rank_ranges} == {"separable"}


def test_parameters_that_leave_nothing_are_a_reason(structures: dict[str, Structure]) -> None:
    found = spaces_of(Residual(), structures, rule("grouped", parameters={"grouped": {"groups": (2048,)}}))
    assert found["blocks.0.conv2"].reason == "the rule's parameters leave no variant, or no rank"


def test_ranks_that_a_site_has_none_of_leave_nothing_there(structures: dict[str, Structure]) -> None:
    both = rule("channel", "asymmetric", parameters={"channel": {"rank": (4096,)}})
    space = spaces_of(Residual(), structures, both)["blocks.0.conv2"]
    assert {rank_range.structure.name for rank_range in space.rank_ranges} == {"asymmetric"}
    alone = rule("channel", parameters={"channel": {"rank": (4096,)}})
    space = spaces_of(Residual(), structures, alone)["blocks.0.conv2"]
    assert (space.rank_ranges, space.reason) == ((), "the rule's parameters leave no variant, or no rank")


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (
            {"order": ("sideways",)},
            "parameters.separable.order: expected one of depthwise-first, pointwise-first, found 'side",
        ),
        ({"ordr": (1,)}, "parameters.separable.ordr: expected order or rank, found ordr, which separable does not"),
        ({"rank": (2, 0)}, "parameters.separable.rank: expected whole numbers of at least 1, found 0"),
        ({"rank": (1.5,)}, "expected whole numbers of at least 1, found 1.5"),
        ({"rank": ("a",)}, "expected whole numbers of at least 1, found 'a'"),
    ],
)
def test_parameters_that_no_structure_has_are_refused(
    structures: dict[str, Structure], allowed: dict[str, tuple[float | str, ...]], message: str
) -> None:
    wrong = rule("separable", parameters={"separable": allowed})
    with pytest.raises(RuleFileError, match=f"^rule r: .*{re.escape(message)}"):
        spaces_of(Residual(), structures, wrong)
    (finding,) = check(RuleFile(schema=1, rule=(wrong,)), lambda *_: None, structures)
    assert not finding.passed and message in f"{finding.example}: {finding.text}"


class OnlyOfSeven:
    """A structure that takes none of the geometries at which parameters are judged, with a variant and a rank of one's choice."""

    name, reference = "seven", "a test"

    def __init__(self, variant: Setting, top: float) -> None:
        self.variant, self.top = variant, top

    def reject(self, spec: ConvSpec) -> str | None:
        return None if spec.kernel_size == (7, 7) else "it takes 7 x 7 only"

    def variants(self, _spec: ConvSpec) -> tuple[Setting, ...]:
        return (self.variant,)

    def full_rank(self, _spec: ConvSpec, _variant: Setting) -> float:
        return self.top


@pytest.mark.parametrize(
    ("variant", "top", "rank", "error", "message"),
    [
        ({}, 8, "a", RuleFileError, "rule r: parameters.seven.rank: expected whole numbers of at least 1, found 'a'"),
        (
            {"part": 0.5},
            8,
            2,
            UsageError,
            "structure seven: parameter part: expected a whole number of Python, or text,",
        ),
        ({}, 8.0, 2, UsageError, "structure seven: full_rank: expected a whole number, found 8.0, of the type float;"),
    ],
)
def test_what_a_structure_of_ones_own_cannot_have_is_refused(
    variant: Setting, top: float, rank: int | str, error: type[Exception], message: str
) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 8, 3)))
    own: Any = OnlyOfSeven(variant, top)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        spaces_of(model, {"seven": own}, rule("seven", parameters={"seven": {"rank": (rank,)}}))


def test_parameters_that_structures_have_are_taken(structures: dict[str, Structure]) -> None:
    allowed = {
        "separable": {"order": ("depthwise-first",), "rank": (1, 2)},
        "grouped": {"groups": (2, 16)},
        "cp": {"rank": (3,)},
    }
    file = RuleFile(schema=1, rule=(rule("separable", "grouped", "cp", parameters=allowed),))
    assert check(file, lambda *_: None, structures) == []
    for path in builtin_rules().values():
        found = check(load_rule_file(path), lambda name, spec: structures[name].reject(spec.per_group), structures)
        assert all(finding.passed for finding in found)


def test_several_rules_add_up(structures: dict[str, Structure]) -> None:
    first = rule("channel", match=Match(kernel_size=((1, 1),)))
    second = rule("separable", name="s", match=Match(kernel_size=((3, 3),)))
    found = spaces_of(Residual(16), structures, first, second)
    assert [rank_range.rule.name for rank_range in found["blocks.1.downsample.0"].rank_ranges] == ["r"]
    assert {rank_range.rule.name for rank_range in found["stem"].rank_ranges} == {"s"}


def test_an_unknown_structure_is_a_rule_file_error(structures: dict[str, Structure]) -> None:
    with pytest.raises(RuleFileError, match="rule r: structure 'butterfly' is not known; known are asymmetric"):
        search_spaces([], [rule("butterfly")], structures)


def test_the_share_of_macs_counts_every_call() -> None:
    sites = sites_of(settled(CalledTwice()))
    shares = {name: subject.mac_share for name, subject in subjects(sites).items()}
    macs = {site.name: site.cost.macs for site in sites}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["shared"] / shares["last"] == pytest.approx(macs["shared"] / macs["last"]) == pytest.approx(5)


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5, 0.8])
def test_of_every_rank_range_the_largest_rank_within_the_ratio(ratio: float, structures: dict[str, Structure]) -> None:
    for space in spaces_of(Residual(16), structures, rule(*structures, ratio=ratio)).values():
        limit = ratio * space.site.cost.macs
        candidates = {candidate.option for candidate in shortlist_of(space).candidates}
        expected = set()
        for rank_range in space.rank_ranges:
            fitting = [rank for rank in rank_range.ranks if rank_range.at(rank).cost.macs <= limit]
            if fitting:
                expected.add(rank_range.at(max(fitting)).option)
        assert candidates == expected


def test_each_rule_has_its_own_ratio(structures: dict[str, Structure]) -> None:
    narrow, wide = rule("channel", ratio=0.3), rule("asymmetric", name="wide", ratio=0.7)
    space = spaces_of(Residual(16), structures, narrow, wide)["blocks.0.conv1"]
    parts = {p.rule.name: p.cost.macs / space.site.cost.macs for p in shortlist_of(space).candidates}
    assert 0.2 < parts["r"] <= 0.3
    assert 0.6 < parts["wide"] <= 0.7


def test_the_least_strict_of_the_rules_that_allow_an_option_counts_in_any_order(
    structures: dict[str, Structure],
) -> None:
    loose = rule("separable", name="loose")
    strict = rule("separable", name="strict", require=Require(max_output_error=0.01, min_latency_gain=0.2))
    near = rule("separable", name="near", require=Require(max_output_error=0.01))
    fast = rule("separable", name="fast", require=Require(min_latency_gain=0.2))

    def names(*rules: Rule) -> set[str]:
        spaces = spaces_of(Residual(), structures, *rules).values()
        return {c.rule.name for space in spaces for c in shortlist_of(space).candidates}

    assert names(loose, strict, near) == names(strict, near, loose) == {"loose"}
    assert names(near, strict, fast) == names(fast, strict, near) == {"near", "fast"}


def test_the_required_saving_bounds_every_ratio(structures: dict[str, Structure]) -> None:
    space = spaces_of(Residual(16), structures, rule("channel", require=Require(min_mac_saving=0.6), ratio=0.9))["stem"]
    assert all(p.cost.macs <= 0.4 * space.site.cost.macs for p in shortlist_of(space).candidates)
    nothing = shortlist_of(spaces_of(Residual(16), structures, rule("channel", ratio=0.01))["stem"])
    assert nothing.reason == "no option of channel costs at most 0.01 of its MACs"


@pytest.mark.parametrize("network", [Residual, CalledTwice, NineKinds])
@torch.no_grad()
def test_the_cost_of_a_candidate_is_what_the_rewritten_model_has_less(
    network: type[nn.Module], structures: dict[str, Structure]
) -> None:
    model = settled(network(16))  # type: ignore[call-arg]
    for space in search_spaces(sites_of(model), [rule("separable", "channel")], structures):
        for candidate in shortlist_of(space).candidates:
            copy = settled(network(16))  # type: ignore[call-arg]
            option = candidate.option
            stages = structures[option.structure].stages(space.site.spec.per_group, option.parameters)
            replace_site(copy, space.site, empty_option(space.site.folded_spec, stages, option, X))
            saved = macs_by_hooks(model, X) - macs_by_hooks(copy, X)
            assert saved == space.site.cost.macs - candidate.cost.macs
            fewer = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in copy.parameters())
            assert fewer == space.site.cost.parameters - candidate.cost.parameters
