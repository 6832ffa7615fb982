"""The state of a model under flat names, whatever its class says of it.

A class may have a ``state_dict`` of its own, which nests its entries or holds only what was trained, or such a ``parameters``. A
model is identified by, and stored with, all of its state.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

EXTRA = "_extra_state"
"""How names end under which ``state_dict`` has what a module's ``get_extra_state`` gives, which may be a dictionary."""


def named_parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by name, each once, as torch's own method gives them: a class may have one that gives what is trained."""
    return nn.Module.named_parameters(model)


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters, each once, whatever the class gives by a method of its own."""
    return (parameter for _, parameter in named_parameters_of(model))


def state_of(model: nn.Module) -> dict[str, Any]:
    """What a model's ``state_dict`` lists, and the parameters and buffers that this leaves out."""
    listed = listed_state(model)
    return listed | unlisted_state(model, listed)


def listed_state(model: nn.Module) -> dict[str, Any]:
    """What a model's ``state_dict`` lists by name; what torch's own lists, where it is nested."""
    own: Any = model.state_dict()
    return dict(own) if _is_flat(own) else dict(nn.Module.state_dict(model))


def fill_listed(model: nn.Module, state: Mapping[str, Any], *, strict: bool = False) -> None:
    """Put what :func:`listed_state` lists back. Raises whatever ``load_state_dict`` raises where it does not fit."""
    if _is_flat(model.state_dict()):
        model.load_state_dict(state, strict=strict)
    else:
        nn.Module.load_state_dict(model, state, strict=strict)


def versions_of(state: object) -> dict[str, dict[str, Any]]:
    """What torch notes of each module beside a state dict, above all the version of its class: by that a class knows weights that
    an earlier one of it has saved, and changes them."""
    noted = getattr(state, "_metadata", None)
    if not isinstance(noted, dict):
        return {}
    return {path: dict(note) for path, note in noted.items() if isinstance(path, str) and isinstance(note, dict)}


def with_versions(state: Mapping[str, Any], versions: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """A copy of a state dict with notes like those of :func:`versions_of`, where ``load_state_dict`` looks for them."""
    made = OrderedDict(state)
    if versions:
        made._metadata = versions  # type: ignore[attr-defined]
    return made


def unlisted_state(model: nn.Module, listed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters and lasting buffers that ``listed`` has under no name."""
    held = {identity_of(value) for value in listed.values() if is_plain_tensor(value)}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # which has no other state, and tables that are no dictionaries
            continue
        lasting = {
            name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | lasting).items():
            name = f"{path}.{key}" if path else key
            if name not in listed and is_plain_tensor(tensor) and identity_of(tensor) not in held:
                found[name] = tensor
    return found


def unmade_part(model: nn.Module) -> str:
    """A lazy module that has not run yet and so lacks its sizes, even if a file has filled it; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and hasattr(module, "_initialize_hook"):  # which its first run removes
            kind = type(module).__name__
            return f"{name} ({kind})" if name else kind
    return ""


def is_plain_tensor(value: Any) -> bool:
    """Whether it is numbers in memory of its own, none of a subclass that wraps other tensors."""
    if not isinstance(value, Tensor) or hasattr(value, "__tensor_flatten__"):
        return False
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta or value.is_nested)


def identity_of(tensor: Any) -> object:
    """Equal for two names of one plain tensor."""
    place = address_of(tensor)
    same = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (place, *same) if place else id(tensor)


def address_of(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor
        return 0


def _is_flat(state: Any) -> bool:
    return isinstance(state, Mapping) and not any(
        not isinstance(name, str) or (isinstance(value, Mapping) and not name.endswith(EXTRA))
        for name, value in state.items()
    )
