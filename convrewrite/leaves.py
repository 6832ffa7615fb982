"""What stands in nested containers: tuples, lists, dictionaries and dataclasses."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor


def leaves_of(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Everything in a value that is no container, named after its indices, keys and fields behind ``name``, in the order in which
    it stands there."""
    parts = None if isinstance(value, Tensor) else _parts(value)
    if parts is None:
        yield name, value
        return
    for key, part in parts:
        yield from leaves_of(part, f"{name}.{key}")


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, along a last axis."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _parts(value: object) -> list[tuple[str, object]] | None:
    """The parts of a container under their keys; None for anything else."""
    # Mapping comes first: the ModelOutput classes of the transformers family are dictionaries and dataclasses at once.
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(str(key), part) for key, part in zip(value._fields, value, strict=True)]
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [(str(index), part) for index, part in enumerate(value)]
    return None
