"""State dicts: where a checkpoint has one, and how its names become those of the network it is meant for.

Trainers nest weights under keys of their own and put prefixes before every name. Whatever is taken, passed over or removed
is reported in a note.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError
from convrewrite.escaping import summary
from convrewrite.loading.checkpoints import listed
from convrewrite.state import (
    EXTRA,
    fill_listed,
    listed_state,
    named_parameters_of,
    state_of,
    versions_of,
    with_versions,
)
from convrewrite.values import shape_text

_KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "ema", "model_ema", "state_dict_ema", "ema_state_dict",
    "net", "network", "module", "weights", "params", "params_ema",
)  # fmt: skip
"""Keys under which weights usually are in a checkpoint, those of the model itself before averaged ones."""

_DEPTH = 4
"""Dictionaries within dictionaries in which weights are looked for."""

_COMPILED = "._orig_mod."
"""What stands in the names of a part of a network that torch.compile has wrapped."""

_PROBES = 8
"""How many names of the network are looked for behind prefixes."""


Found = tuple[nn.Module | dict[str, Tensor] | None, tuple[str, ...]]
"""Weights, or the network that has them, and a note on where they were."""


def find_weights(content: object) -> Found:
    """The module or state dict in a checkpoint, and a note on where it was.

    It is looked for under the usual keys, then under any other, where it must be the only one.
    """
    return _find(content, 0, {})


def _find(content: object, depth: int, known: dict[tuple[int, int], Found]) -> Found:
    """As :func:`find_weights`; ``known`` has what was found in dictionaries before, as millions of ways may lead to one."""
    place = (id(content), depth)
    if place not in known:
        known[place] = _found_in(content, depth, known)
    return known[place]


def _found_in(content: object, depth: int, known: dict[tuple[int, int], Found]) -> Found:
    if isinstance(content, nn.DataParallel):
        inner, notes = _find(content.module, depth, known)
        return inner, ("the DataParallel wrapper was removed", *notes)
    if isinstance(content, nn.Module):
        return content, ()
    if not isinstance(content, Mapping) or depth > _DEPTH or not all(isinstance(key, str) for key in content):
        return None, ()
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return with_versions(content, versions_of(content)), ()
    others = [
        key for key in content if key not in _KEYS and not key.endswith(EXTRA)
    ]  # such a state may hold tensors alone
    for keys in (_KEYS, others):
        found = {key: _find(content.get(key), depth + 1, known) for key in keys}
        usable = [key for key in keys if found[key][0] is not None]
        if usable and (keys is _KEYS or len(usable) == 1):
            key = _averaged_network(found) or usable[0]
            weights, notes = found[key]
            return weights, (_where_found(key, content), *notes)
    is_mixed = any(isinstance(value, Tensor) for value in content.values())
    return (with_versions(content, versions_of(content)), ()) if is_mixed else (None, ())


def _averaged_network(found: Mapping[str, tuple[object, tuple[str, ...]]]) -> str | None:
    """``ema`` where it and ``model`` are both networks, as in files of ultralytics, which runs the averaged one."""
    both = all(isinstance(found.get(key, (None,))[0], nn.Module) for key in ("model", "ema"))
    return "ema" if both else None


def _where_found(key: str, content: Mapping[str, object]) -> str:
    others = [k for k in _KEYS if k != key and isinstance(content.get(k), Mapping | nn.Module)]
    passed_over = f"; {', '.join(repr(k) for k in others)} not used" if others else ""
    return f"weights found under the key {key!r}{passed_over}"


def widened(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A network that a checkpoint holds among other things, in float32: trainers store float16 to save room, all of it or all
    but the BatchNorms, and run float32."""
    held = (value for value in state_of(model).values() if isinstance(value, Tensor))
    types = {value.dtype for value in held if value.is_floating_point()}
    if types - {torch.float32} != {torch.float16}:
        return model, ()
    return model.float(), ("stored in half precision, taken in float32",)


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str, factory: str) -> tuple[str, ...]:
    """Fill the network with a state dict, and say how its names were changed; raises ModelLoadError unless all fits."""
    expected = listed_state(model)
    state, notes = _under_own_names(state, expected)
    tied = _fill_tied(state, expected)
    _require_numbers_kept(model, state, expected, source)
    _require_ties_kept(state, expected, source, factory)
    notes += _types_changed(state, expected)
    try:
        fill_listed(model, state, strict=True)
    except Exception as error:  # values of any type can stand in a checkpoint
        raise ModelLoadError(
            f"{source}: expected the weights of {factory} ({type(model).__name__}), found "
            f"{_mismatch(state, expected) or summary(error)}; pass the factory these weights were trained with"
        ) from error
    if tied:
        notes.append(f"tied weights not stored twice were taken from their partner: {listed(tied)}")
    return tuple(notes)


def _under_own_names(state: dict[str, Tensor], expected: Mapping[str, object]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights without what wrappers put before and into their names, and notes on that."""
    found, notes = _without_prefix(state, expected)
    plain = {name.replace(_COMPILED, "."): value for name, value in state.items()}
    if expected.keys() <= found.keys() or plain.keys() == state.keys() or len(plain) < len(state):
        return found, notes
    versions = {f"{path}.".replace(_COMPILED, ".").removesuffix("."): note for path, note in versions_of(state).items()}
    found, notes = _without_prefix(with_versions(plain, versions), expected)
    return found, [f"{_COMPILED[1:]!r}, which torch.compile puts into names, was removed from them", *notes]


def _without_prefix(state: dict[str, Tensor], expected: Mapping[str, object]) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefix that wrappers put before every name, and leave out names without it; unless as many fit as they are."""
    if expected.keys() <= state.keys():
        return state, []
    prefix = _prefix(list(state), list(expected))
    if sum(f"{prefix}{name}" in state for name in expected) <= sum(name in state for name in expected):
        return state, []
    notes = [f"prefix {prefix!r} removed from the names of the weights"]
    left_out = [key for key in state if not key.startswith(prefix)]
    if left_out:
        notes.append(f"only names that begin with it were taken, not {listed(left_out)}")
    kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return with_versions(kept, _versions_below(prefix, state)), notes


def _versions_below(prefix: str, state: object) -> dict[str, Any]:
    """What is noted of the module behind a prefix, and of its parts, by their names behind it."""
    return {
        f"{path}.".removeprefix(prefix).removesuffix("."): note
        for path, note in versions_of(state).items()
        if f"{path}.".startswith(prefix)
    }


def _prefix(stored: Sequence[str], expected: Sequence[str]) -> str:
    """The prefix that stands before the most names of the network; among equals the first."""
    known = set(stored)
    probes = expected[:_PROBES]
    found = dict.fromkeys(key.removesuffix(name) for name in probes for key in stored if key.endswith(f".{name}"))
    return max(found, key=lambda prefix: sum(f"{prefix}{name}" in known for name in expected), default="")


def _fill_tied(state: dict[str, Tensor], expected: Mapping[str, Any]) -> list[str]:
    """Give names missing from the file the value of the stored name that is the same tensor in the network."""
    stored = {_place(expected[key]): key for key in state if key in expected}
    stored.pop(None, None)
    partners = {key: stored[_place(t)] for key, t in expected.items() if key not in state and _place(t) in stored}
    state.update({key: state[partner] for key, partner in partners.items()})
    return sorted(partners)


def _place(tensor: Any) -> object:
    """Equal for names of one tensor of a network; None for what has no memory."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _require_ties_kept(state: Mapping[str, object], expected: Mapping[str, Any], source: str, factory: str) -> None:
    """Raise ModelLoadError where the file has other numbers for a second name of one tensor: only the last would be kept."""
    first: dict[object, tuple[str, Tensor]] = {}
    for name, stored, wanted in _pairs(state, expected):
        place = _place(wanted)
        if place is None or stored.is_meta or stored.shape != wanted.shape:
            continue
        partner, value = first.setdefault(place, (name, stored))
        if value is not stored and not torch.equal(value.to(wanted.dtype), stored.to(wanted.dtype)):
            raise ModelLoadError(
                f"{source}: expected the weights of {factory}, in which {partner} and {name} are one tensor, found other numbers "
                "for each; pass the factory these weights were trained with"
            )


def _require_numbers_kept(
    model: nn.Module, state: Mapping[str, object], expected: Mapping[str, Any], source: str
) -> None:
    """Raise ModelLoadError where torch would convert what is stored, without a word, to numbers that mean something else."""
    parameters = dict(named_parameters_of(model))
    lost = [
        f"{name} ({stored.dtype} stored, {wanted.dtype} expected)"
        for name, stored, wanted in _pairs(state, expected)
        if _means_another(stored, wanted, name in parameters)
    ]
    if lost:
        raise ModelLoadError(
            f"{source}: expected weights whose numbers a conversion keeps, found {len(lost)} of another kind: {listed(lost)}; "
            "give the floating-point weights as they were trained"
        )


def _pairs(state: Mapping[str, object], expected: Mapping[str, Any]) -> list[tuple[str, Tensor, Tensor]]:
    """Tensors of the file and those of the network that they are for, by name."""
    return [
        (name, value, expected[name])
        for name, value in state.items()
        if isinstance(value, Tensor) and isinstance(expected.get(name), Tensor)
    ]


def _means_another(stored: Tensor, wanted: Tensor, is_parameter: bool) -> bool:
    """Whether these are quantised weights, complex numbers for real ones, or whole numbers that half precision has rounded."""
    if stored.is_complex():
        return not wanted.is_complex()
    if wanted.is_floating_point() or wanted.is_complex():
        return is_parameter and not stored.is_floating_point()
    if not stored.is_floating_point() or stored.is_meta or stored.numel() < 2:  # one is a count of batches
        return False
    return bool((stored.float().abs() * torch.finfo(stored.dtype).eps >= 2).any())


def _types_changed(state: Mapping[str, object], expected: Mapping[str, Any]) -> list[str]:
    changed = {
        (stored.dtype, wanted.dtype): None
        for _, stored, wanted in _pairs(state, expected)
        if stored.is_floating_point() and wanted.is_floating_point() and stored.dtype != wanted.dtype
    }
    return [f"weights stored in {stored} were taken in {wanted}, as the factory has them" for stored, wanted in changed]


def _mismatch(state: Mapping[str, object], expected: Mapping[str, object]) -> str:
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} ({_shape(state[key])} stored, {_shape(expected[key])} expected)"
        for key in expected
        if key in state and _shape(state[key]) != _shape(expected[key])
    ]
    empty = [key for key in expected if isinstance(value := state.get(key), Tensor) and value.is_meta]
    found = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("on the meta device, without values", empty),
    )
    return "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in found if keys)


def _shape(value: object) -> str:
    return shape_text(value.shape) if isinstance(value, Tensor) else type(value).__name__
