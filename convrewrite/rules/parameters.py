"""The parameters that a rule restricts: whether its structures have them, and their values.

Which values a structure has depends on the geometry. So it is asked at a few geometries in which nearly every value appears; of a
structure that takes none of these only the ranks are judged, which are whole numbers everywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from convrewrite.conv import ConvSpec
from convrewrite.errors import RuleFileError
from convrewrite.rules.schema import Rule
from convrewrite.structures import Setting, Structure
from convrewrite.values import near

CHANNELS = (64, 4096, 5040)
"""Numbers of channels of these geometries: among their divisors are powers of two and the small numbers."""

KERNELS = ((3, 3), (1, 1), (5, 5), (1, 3))
"""Kernels of these geometries: of each structure those count that it takes."""

RANK = "rank"


def require_parameters(rule: Rule, structures: Mapping[str, Structure]) -> None:
    """Raise RuleFileError for a parameter, or a value of one, that a structure of the rule does not have."""
    for key, text in wrong_parameters(rule, structures):
        raise RuleFileError(f"rule {rule.name}: {key}: {text}")


def wrong_parameters(rule: Rule, structures: Mapping[str, Structure]) -> Iterator[tuple[str, str]]:
    """Keys, as ``parameters.separable.order``, and what was expected there."""
    for name, allowed in rule.parameters.items():
        if name not in structures:
            continue
        variants = _variants(structures[name])
        known = [*dict.fromkeys(key for variant in variants for key in variant), RANK]
        for key, values in allowed.items():
            where = f"parameters.{name}.{key}"
            if not variants and key != RANK:
                continue
            if key not in known:
                yield where, f"expected {' or '.join(known)}, found {key}, which {name} does not have{near(key, known)}"
            elif (text := _wrong(values, [] if key == RANK else [v[key] for v in variants if key in v])) is not None:
                yield where, text


def _wrong(values: Sequence[int | float | str], known: Sequence[int | str]) -> str | None:
    """What is wrong with the values of a parameter; ``known``: the values that exist, empty for a rank."""
    for value in values:
        if known and value not in known:
            some = ", ".join(str(one) for one in dict.fromkeys(known))
            return f"expected one of {some}, found {value!r}{near(str(value), [str(one) for one in known])}"
        if not known and (isinstance(value, str) or value < 1 or value % 1):
            return f"expected whole numbers of at least 1, found {value!r}"
    return None


def _variants(structure: Structure) -> list[Setting]:
    found: list[Setting] = []
    for channels, kernel in product(CHANNELS, KERNELS):
        spec = ConvSpec(channels, channels, kernel)
        if structure.reject(spec) is None:
            found += structure.variants(spec)
    return found
