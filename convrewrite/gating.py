"""Where speed counts: options in the lowering that runs fastest, and none that misses its rule's ``min_latency_gain``."""

from collections.abc import Sequence
from dataclasses import replace

from convrewrite.pricing import Price, Prices
from convrewrite.proposing import Offer


def in_fastest_lowering(offers: Sequence[Offer], prices: Prices) -> tuple[Offer, ...]:
    """The same options, each lowered as it runs fastest at its site."""
    return tuple(_offered(offer, _priced(offer, prices)) for offer in offers)


def fast_enough(offers: Sequence[Offer], prices: Prices) -> tuple[Offer, ...]:
    """As above, without the options that miss their rule's ``min_latency_gain``."""
    return tuple(_gated(offer, _priced(offer, prices)) for offer in offers)


def _priced(offer: Offer, prices: Prices) -> tuple[Price, ...]:
    return prices.of(offer.site, offer.proposals) if offer.proposals else ()


def _offered(offer: Offer, prices: Sequence[Price]) -> Offer:
    return replace(offer, proposals=tuple(price.proposal for price in prices))


def _gated(offer: Offer, prices: Sequence[Price]) -> Offer:
    kept = [price for price in prices if price.gain >= (price.proposal.rule.require.min_latency_gain or -1e9)]
    if kept or not prices:
        return _offered(offer, kept)
    best = max(prices, key=lambda price: price.gain)
    return Offer(offer.site, (), f"no option is fast enough: the best changes the measured time by {-best.gain:+.0%}")
