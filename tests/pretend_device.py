"""A device that is none: its tensors lie in the processor's memory and are known by their storage, so that machines without a
graphics card can show that nothing is left behind.

The device is called ``meta``, the one name that torch takes without a driver. As on a real one, an operation on tensors of both
places is an error, and so are a processor's generator and numpy there; numbers alone, and indices from the processor, are taken.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from convrewrite import places
from convrewrite.rewriting import work

AWAY = torch.device("meta")

MIXING = ("aten::copy_", "aten::_copy_from", "aten::set_")
"""Operations that take tensors of both places."""

INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


class Pretended(TorchDispatchMode):
    """Knows which storages lie away; ``counts`` has how often each operation ran there, ``most`` how many bytes may lie there."""

    def __init__(self, *, float64: bool = True, most: int | None = None) -> None:
        super().__init__()
        self.float64, self.most = float64, most
        self.counts: dict[str, int] = {}
        # An address is not given away again as long as it is referred to.
        self._storages: dict[int, StorageWeakRef] = {}

    def is_away(self, value: object) -> bool:
        """Whether it is a tensor that lies on the device."""
        return isinstance(value, Tensor) and not value.is_meta and value.untyped_storage()._cdata in self._storages

    def put(self, tensor: Tensor, away: bool) -> Tensor:
        """A copy that lies there, or at home."""
        with torch.utils._python_dispatch._disable_current_modes():
            copy = tensor.detach().clone() if not tensor.requires_grad else tensor.clone()
        if away:
            self.note(copy)
        return copy

    def note(self, tensor: Tensor) -> None:
        """From now on it lies away."""
        if not self.float64 and tensor.dtype == torch.float64:
            raise TypeError("the device has no float64")
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage)
        if self.most is not None and self.held() > self.most:
            raise torch.OutOfMemoryError("the pretended device is out of memory")

    def held(self) -> int:
        """Bytes that lie there."""
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        return sum(
            torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes()
            for ref in self._storages.values()
            if not ref.expired()
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, on the processor, and puts what it gives where its inputs lie."""
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        name = func._schema.name
        asked = kwargs.get("device")
        away = self._place(name, args, tensors)
        if asked is not None and torch.device(asked) == AWAY:
            away, kwargs["device"] = True, torch.device("cpu")
            if kwargs.get("generator") is not None:
                raise RuntimeError("expected a generator of the device, found one of the processor")
        if kwargs.get("pin_memory") is None:
            kwargs.pop("pin_memory", None)
        found = func(*args, **kwargs)
        if away:
            self.counts[name] = self.counts.get(name, 0) + 1
            for value in tree_flatten(found)[0]:
                if isinstance(value, Tensor):
                    self.note(value)
        return found

    def _place(self, name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
        there = [tensor for tensor in tensors if self.is_away(tensor)]
        if not there:
            return False
        if name in MIXING:
            return self.is_away(args[0])
        here = [tensor for tensor in tensors if tensor.dim() and not self.is_away(tensor)]
        if here and not (name in INDEXING and self.is_away(args[0])):
            raise RuntimeError(f"{name}: expected all tensors on one device, found some on the processor")
        return True


class _Words(TorchFunctionMode):
    """What Python asks of tensors by name: where they lie, and to be moved."""

    def __init__(self, pretended: Pretended) -> None:
        super().__init__()
        self._pretended = pretended

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, of = dict(kwargs or {}), self._pretended
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return AWAY if of.is_away(args[0]) else func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and of.is_away(args[0]):
            raise TypeError("a tensor of the device has no numpy array")
        if func is Tensor.cpu:
            return self._moved(args[0], torch.device("cpu"))
        if func is Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func in (torch.multinomial, torch.bernoulli, Tensor.bernoulli_) and of.is_away(args[0]):
            assert kwargs.get("generator") is None, "a generator of the processor draws there alone"
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """As ``Tensor.to``: its words are a device, a dtype, or another tensor that has both."""
        words = [*args, *(kwargs.pop(name) for name in ("device", "dtype", "other") if name in kwargs)]
        others = [word for word in words if isinstance(word, Tensor)]
        for other in others:
            words += [AWAY if self._pretended.is_away(other) else other.device, other.dtype]
        devices = [torch.device(word) for word in words if isinstance(word, str | torch.device)]
        dtypes = [word for word in words if isinstance(word, torch.dtype)]
        device = devices[0] if devices else (AWAY if self._pretended.is_away(tensor) else torch.device("cpu"))
        if device == AWAY and dtypes and not self._pretended.float64 and tensor.dtype == torch.float64:
            tensor = tensor.to(*dtypes)  # on the way
        moved = self._moved(tensor, device)
        kwargs.pop("non_blocking", None)
        return moved.to(*dtypes, **kwargs) if dtypes or kwargs else moved

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        away = device == AWAY
        return tensor if self._pretended.is_away(tensor) == away else self._pretended.put(tensor, away)


@contextlib.contextmanager
def pretended(*, float64: bool = True, most: int | None = None) -> Iterator[Pretended]:
    """Meanwhile the device is there, and ``auto`` takes it; without ``float64``, or with so many bytes at ``most``."""
    known, has, exactly = places.known_places, places.has_float64, places.exactly
    free, name = work.free_memory, places._NAMES
    device = Pretended(float64=float64, most=most)
    try:
        places.known_places = lambda: ("meta", "cpu")
        places.has_float64 = lambda place: float64 or place != AWAY
        # Hooks of a backward pass are called without the modes of functions, so that no tensor tells them where it lies.
        places.exactly = lambda x: device.put(x, away=False) if device.is_away(x) and not float64 else x
        work.free_memory = lambda _: 1 << 30
        places._NAMES = re.compile("auto|cpu|meta")
        with device, _Words(device):
            yield device
    finally:
        places.known_places, places.has_float64, places.exactly = known, has, exactly
        work.free_memory, places._NAMES = free, name
