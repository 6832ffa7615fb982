"""The state of a rewritten model as safetensors, which hold tensors and cannot run code.

What is one tensor under several names is written once. A view that shares only a part of its memory with others is
written out, so that every name has its numbers. Tensors of dtypes that the format does not know are written as bytes, and a
state that is no tensor (``get_extra_state``) as JSON where JSON holds it whole. Quantised and sparse tensors, and any other
objects, are in model.pt alone; :func:`read_weights` leaves them as they are in the model that it is given.
"""

import json
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from safetensors.torch import save_file
from torch import Tensor, nn

from convrewrite.escaping import printable
from convrewrite.json_texts import each_key_once
from convrewrite.state import (
    address_of,
    fill_listed,
    identity_of,
    is_plain_tensor,
    listed_state,
    state_of,
    unlisted_state,
    versions_of,
    with_versions,
)
from convrewrite.values import some_of

OTHERS = "convrewrite.state"
"""The key of the metadata that holds state that is no tensor, as JSON."""

SHOWN = 3
"""Most names in a warning."""


def write_weights(model: nn.Module, path: Path) -> list[str]:
    """Write the model's state; returns the names of what the format cannot hold."""
    state = state_of(model)
    tensors = {name: value for name, value in sorted(state.items()) if is_plain_tensor(value)}
    others = {name: value for name, value in state.items() if not isinstance(value, Tensor) and _is_json(value)}
    once = {
        name: tensors[name]
        for name in {identity_of(tensor): name for name, tensor in reversed(tensors.items())}.values()
    }
    known = {dtype for dtype in {tensor.dtype for tensor in once.values()} if _is_known(dtype)}
    places = Counter(address_of(tensor) for tensor in once.values())
    written = {name: _written(tensor, places[address_of(tensor)] > 1, known) for name, tensor in once.items()}
    save_file(written, str(path), metadata={OTHERS: json.dumps(others, sort_keys=True)} if others else None)
    return [name for name in state if name not in tensors and name not in others]


def read_weights(model: nn.Module, path: Path) -> list[str]:
    """Put the state in a file into ``model``; returns the names of what the format cannot hold, which stays as it is. Raises
    RuntimeError, ValueError or SafetensorError where they do not fit."""
    listed = listed_state(model)
    unlisted = unlisted_state(model, listed)
    expected = listed | unlisted
    with safe_open(path, "pt") as file:
        others = each_key_once((file.metadata() or {}).get(OTHERS, "{}"))
        found: dict[str, Any] = {name: _read(file.get_tensor(name), expected.get(name)) for name in file.keys()}  # noqa: SIM118
    found |= {name: value for name, value in others.items() if not isinstance(expected.get(name), Tensor)}
    found |= _under_other_names(expected, found)
    left = [name for name, value in expected.items() if name not in found and not is_plain_tensor(value)]
    missing = sorted(expected.keys() - found.keys() - {*left} - _parts(expected, found.keys()))
    strangers = sorted(found.keys() - expected.keys())
    if missing or strangers:
        raise RuntimeError(f"it has no {_named(missing)}" if missing else f"it has {_named(strangers)} besides")
    _require_types(expected, found)
    own = nn.Module.state_dict(model, keep_vars=True)
    for tensor in (*own.values(), *unlisted.values()):
        if _is_spread(tensor):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
    kept = {name: value for name, value in found.items() if name not in unlisted}
    fill_listed(model, with_versions(kept, versions_of(own)))  # as the same classes have written it, just as they are
    with torch.no_grad():
        for name, tensor in (unlisted | _unfilled(model, found)).items():
            if name in found:
                tensor.copy_(found[name])
    return left


def _require_types(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise RuntimeError where numbers are of another type than the model's: torch would convert them without a word."""
    for name, value in found.items():
        wanted = expected[name]
        if isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.dtype != wanted.dtype:
            raise RuntimeError(f"expected {name} in {wanted.dtype}, found {value.dtype}")


def _unfilled(model: nn.Module, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's own tensors that do not hold what was found under their names: a class may list them under names that its
    ``load_state_dict`` does not know."""
    own = {identity_of(tensor) for tensor in nn.Module.state_dict(model).values() if is_plain_tensor(tensor)}
    listed = {name: value for name, value in listed_state(model).items() if name in found and is_plain_tensor(value)}
    return {
        name: value
        for name, value in listed.items()
        if identity_of(value) in own and value.shape == found[name].shape and not torch.equal(value, found[name])
    }


def warn_of(left: Sequence[str]) -> None:
    """Say what is not in the file, if anything."""
    if left:
        warnings.warn(
            f"{_named(left)}: only in model.pt, as weights.safetensors can hold no such state; convrewrite.load leaves it as the "
            "original model has it",
            stacklevel=3,
        )


def _named(names: Sequence[str]) -> str:
    return printable(some_of(names, SHOWN))


def _is_json(value: object) -> bool:
    """Whether it comes back from JSON as it is: a tuple, or a number as a key, does not."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _is_known(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors write it and read it again."""
    try:
        return tensors_of(bytes_of({"one": torch.empty(1, dtype=dtype)}))["one"].dtype == dtype
    except Exception:  # each version refuses a dtype in its own way
        return False


def _written(tensor: Tensor, shared: bool, known: Collection[torch.dtype]) -> Tensor:
    """Its numbers alone, in memory that no other tensor of the file shares."""
    alone = tensor.resolve_conj().resolve_neg().contiguous()
    if shared and address_of(alone) == address_of(tensor):
        alone = alone.clone()
    return alone if alone.dtype in known else alone.reshape(-1).view(torch.uint8)


def _read(value: Tensor, expected: object) -> Tensor:
    """A tensor of the file as the model has it, where it was written as bytes."""
    if not isinstance(expected, Tensor) or value.dtype != torch.uint8 or _is_known(expected.dtype):
        return value
    aligned = value.clone()  # in the file bytes may begin anywhere
    return aligned.view(expected.dtype).reshape(expected.shape)


def _under_other_names(expected: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has under one name, by the other names that the model has for it."""
    held = {
        identity_of(value): found[name] for name, value in expected.items() if name in found and is_plain_tensor(value)
    }
    absent = {name: value for name, value in expected.items() if name not in found and is_plain_tensor(value)}
    return {name: held[identity_of(value)] for name, value in absent.items() if identity_of(value) in held}


def _parts(expected: Mapping[str, Any], found: Collection[str]) -> set[str]:
    """Names of tensors whose memory is part of that of a tensor in the file: earlier versions left those out."""
    plain = {name: value for name, value in expected.items() if is_plain_tensor(value)}
    whole = {address_of(value) for name, value in plain.items() if name in found and _is_whole(value)}
    return {name for name, value in plain.items() if address_of(value) in whole}


def _is_whole(tensor: Tensor) -> bool:
    return address_of(tensor) != 0 and tensor.nbytes == tensor.untyped_storage().nbytes()


def _is_spread(value: object) -> bool:
    """Whether several of its elements share the same memory, as in an expanded tensor: torch copies nothing into those."""
    return (
        isinstance(value, Tensor)
        and is_plain_tensor(value)
        and any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    )
