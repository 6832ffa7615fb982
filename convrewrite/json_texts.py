"""JSON in a file of a user's: one that has an entry twice is refused, as readers differ in which of the two counts."""

import json
from collections import Counter
from typing import Any

from convrewrite import values


def each_key_once(text: str) -> Any:
    """What a text says. Raises ValueError for no JSON and for an object that has a key twice, RecursionError for one too deep."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which no entry stands in the shade of another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{values.shown(key)}: expected once in its object, found more than once")
    return found
