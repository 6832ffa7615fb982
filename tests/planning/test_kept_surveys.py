"""Surveys as plain values: what comes back is what was told."""

import json
import math
from dataclasses import replace

import torch
from torch import nn

from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.curves import Dropped, Scored, Surveyed
from convrewrite.planning.kept_surveys import survey_facts, survey_of_facts
from convrewrite.rules import cost_of
from convrewrite.rules.options import search_spaces
from convrewrite.rules.schema import Protect, Rule
from convrewrite.structures.discovery import discover


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
    assert survey_of_facts(spaces, json.loads(text)) == found


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
    assert survey_of_facts([space], json.loads(json.dumps(survey_facts([space], found)))) == found
