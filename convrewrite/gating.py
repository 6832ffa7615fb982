"""The latency gate of a rule: options that do not run enough faster, measured at the site's real shape, are not offered."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from convrewrite.conv import ConvSpec
from convrewrite.latency import Graph, time_options
from convrewrite.proposing import Offer, Proposal
from convrewrite.structure import Structure, branch_specs
from convrewrite.timing_cache import TimingCache


def fast_enough(offers: Sequence[Offer], structures: Mapping[str, Structure], threads: int) -> tuple[Offer, ...]:
    """The offers without the proposals that miss their rule's ``min_latency_gain``; rules without one are not timed."""
    cache = TimingCache()
    return tuple(_gated(offer, structures, threads, cache) for offer in offers)


def _gated(offer: Offer, structures: Mapping[str, Structure], threads: int, cache: TimingCache) -> Offer:
    timed = [proposal for proposal in offer.proposals if proposal.rule.require.min_latency_gain is not None]
    if not timed:
        return offer
    spec, site = offer.site.folded_spec, offer.site
    graphs = [_graph(proposal, spec, structures) for proposal in timed]
    before, after = time_options(spec, graphs, site.input_sizes[0], threads=threads, cache=cache)
    gains = {proposal.option: 1 - seconds / before for proposal, seconds in zip(timed, after, strict=True)}
    kept = tuple(p for p in offer.proposals if gains.get(p.option, 1.0) >= (p.rule.require.min_latency_gain or 0.0))
    if kept:
        return replace(offer, proposals=kept)
    best = max(gains.values())
    return Offer(site, (), f"no option is fast enough: the best changes the measured time by {-best:+.0%}")


def _graph(proposal: Proposal, spec: ConvSpec, structures: Mapping[str, Structure]) -> Graph:
    """The convolutions an option is built from."""
    stages = structures[proposal.option.structure].stages(spec.per_group, proposal.option.parameters)
    return branch_specs(spec, stages, proposal.option.lowering)
