"""Surveys as plain values: what comes back is what was told."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clocks import FalseTimer, by_macs
from torch import nn

from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.effort import FAST
from convrewrite.planning.kept_surveys import KeptSurveys, survey_facts, survey_of_facts
from convrewrite.planning.latency_table import LatencyTable
from convrewrite.rules import cost_of
from convrewrite.rules.options import search_spaces
from convrewrite.rules.schema import Protect, Rule
from convrewrite.stored.result_cache import ResultCache, RunCache
from convrewrite.structures.discovery import discover


class Lasting(FalseTimer):
    """Times that may be kept from run to run, as this machine's may."""

    lasting = "this machine"


def table_of(timer: FalseTimer) -> LatencyTable:
    return LatencyTable(discover(), timer=timer)


def test_options_that_a_runtime_cannot_run_go_through_json() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    rule = Rule(name="r", structures=("asymmetric",), protect=Protect(stem=False))
    spaces = search_spaces(find_sites(model, (torch.zeros(1, 16, 8, 8),), trace(model)), [rule], discover())
    [ranks, *_] = spaces[0].rank_ranges
    dropped = (
        Dropped(ranks.at(3), None, "cannot run there", math.inf),
        Dropped(ranks.at(4), None, "slower", 3e-4),
        Dropped(ranks.at(5), 0.1, "far behind"),
    )
    options = (Scored(ranks.at(2), 0.1, 0.2, True).timed(1e-4),)
    found = (Surveyed(spaces[0].site, options, dropped, 2e-4),)
    text = json.dumps(survey_facts(spaces, found), allow_nan=False)
    table = table_of(FalseTimer(seconds=lambda *_: 2e-4))
    assert survey_of_facts(spaces, json.loads(text), table) == found


def test_times_come_back_at_the_speed_that_the_machine_has_now(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    rule = Rule(name="r", structures=("asymmetric",), protect=Protect(stem=False))
    [space] = search_spaces(find_sites(model, (torch.zeros(1, 16, 8, 8),), trace(model)), [rule], discover())
    candidates = [space.rank_ranges[0].at(rank) for rank in (2, 3, 4)]
    surveys, tables = [], []
    for slower in (1.0, 3.0):
        table = table_of(Lasting(seconds=lambda graph, size, slower=slower: slower * by_macs(graph, size)))
        option, slow, unable = table.of(space.site, candidates)
        scored = Scored(option.candidate, 0.1, 0.2, True).timed(option.seconds)
        dropped = (Dropped(slow.candidate, None, "slow", slow.seconds), Dropped(unable.candidate, None, "no", math.inf))
        surveys.append(Surveyed(space.site, (scored,), dropped, option.original))
        tables.append(table)
    (before, now), cache = surveys, RunCache(ResultCache(tmp_path, 1.0))
    KeptSurveys.of(cache, FAST, tables[0], ["0"]).keep(space, {}, before, {})
    found = KeptSurveys.of(cache, FAST, tables[1], ["0"]).find(space, {})
    handed = survey_of_facts([space], survey_facts([space], [before]), tables[1])
    assert found is not None
    for survey in (found[0], *handed):
        assert survey.seconds == now.seconds != before.seconds
        assert survey.options[0].costs.of("latency") == pytest.approx(now.options[0].costs.of("latency"))
        assert [entry.seconds for entry in survey.dropped] == [pytest.approx(entry.seconds) for entry in now.dropped]


def test_every_option_comes_back_as_that_of_its_rule_variant_rank_and_lowering() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
    names = ("asymmetric", "separable", "grouped")
    rules = [Rule(name=name, structures=names, protect=Protect(stem=False)) for name in ("one", "two")]
    known = discover()
    [space] = search_spaces(find_sites(model, (torch.zeros(1, 16, 8, 8),), trace(model)), rules, known)
    each = [rank_range.at(rank) for rank_range in space.rank_ranges for rank in rank_range.ranks[:3]]
    for branched in [candidate for candidate in each if candidate.option.lowering == "branches"]:
        option = replace(branched.option, lowering="chain")
        each.append(replace(branched, option=option, cost=cost_of(space.site, option, known[option.structure])))
    assert len({candidate.option for candidate in each}) > 10 and len(each) == len(set(map(repr, each)))
    found = (Surveyed(space.site, tuple(Scored(candidate, 0.1, 0.2, False) for candidate in each)),)
    assert (
        survey_of_facts([space], json.loads(json.dumps(survey_facts([space], found))), table_of(FalseTimer())) == found
    )
