"""What every run starts from: the traced model with its sites, what the rules allow there, and the cost of the whole."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from convrewrite.conv import Cost
from convrewrite.graph import find
from convrewrite.inputs import Inputs, moved
from convrewrite.modules import copy_model, private_copy, put_on, tally
from convrewrite.onnx_graph import hidden_cost, kept_sites, refused_sites
from convrewrite.pipeline.at_a_time import examples_at_a_time
from convrewrite.places import PROCESSOR, place_of_model
from convrewrite.rewriting import Prepared
from convrewrite.rules import Rule, search_spaces
from convrewrite.state import parameters_of
from convrewrite.structures import Structure, discover

LOG = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    inputs: Inputs,
    rules: Sequence[Rule],
    structures: Sequence[Structure] = (),
    original: nn.Module | None = None,
    *,
    left: float | None = None,
) -> Prepared:
    """Trace the model, find its sites, and ask the rules. Raises TraceError, RuleFileError.

    ``original``: the model of which ``model`` is a copy, and whose state the result will have. ``left``: the part of the
    network that a budget leaves, where options are chosen by what they do to the outputs.
    """
    known = discover() | {structure.name: structure for structure in structures}
    lifted, traced, sites = find(model, inputs, kept_sites(model), refused_sites(model))
    hidden = hidden_cost(model)
    made_of = Cost(parameters=sum(site.further_parameters for site in sites))
    totals = whole_cost(lifted.model, inputs) + hidden + made_of
    # A run counts what its own thread does; sites are also seen in threads that a forward starts.
    totals = replace(totals, macs=max(totals.macs, sum(site.cost.macs for site in sites)))
    spaces = search_spaces(sites, rules, known, left)
    allowed = sum(1 for space in spaces if space.rank_ranges)
    LOG.info("%d convolution sites, %d of which the rules take; %s MACs", len(sites), allowed, f"{totals.macs:,}")
    for space in spaces:
        LOG.debug("%s: %s", space.site.name, space.reason or f"{len(space.rank_ranges)} structures compete")
    return Prepared(
        model if original is None else original,
        lifted,
        inputs,
        traced,
        sites,
        totals,
        tuple(rules),
        known,
        spaces,
        hidden,
        examples_at_a_time(model, inputs),
    )


def prepare_copy(
    model: nn.Module,
    inputs: Inputs,
    rules: Sequence[Rule],
    structures: Sequence[Structure] = (),
    *,
    left: float | None = None,
) -> Prepared:
    """:func:`prepare` of a copy of the caller's model, which is not touched. Where that lies on a device, the copy and a second
    one in the original's place are put on the processor; the result goes back to the device."""
    origin, home = place_of_model(model), torch.device(PROCESSOR)
    copy = private_copy(model, moved(inputs, origin))
    if origin == home:
        return prepare(copy, inputs, rules, structures, model, left=left)
    original = put_on(home, copy)
    placed = moved(inputs, home)
    prepared = prepare(copy_model(original), placed, rules, structures, original, left=left)
    return replace(prepared, origin=origin)


def whole_cost(model: nn.Module, inputs: Inputs) -> Cost:
    """Parameters of the whole model; MACs of one example, as a run of it shows them (:func:`convrewrite.modules.tally`)."""
    return Cost(sum(parameter.numel() for parameter in parameters_of(model)), tally(model, inputs).macs)
