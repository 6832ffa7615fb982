"""Where torch can compute: the processor, and the devices beside it, by the names that users give them.

What a device may lack is found out here too: free memory and float64. Torch is imported only where a device is asked for.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from convrewrite.errors import UsageError
from convrewrite.escaping import led_to, message_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROCESSOR, AUTO = "cpu", "auto"

_NAMES = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)

ROOM = 0.7
"""Part of a device's free memory that activations and moments may take: the rest is for the operations on them."""

_EXHAUSTED = ("out of memory", "STATUS_ALLOC_FAILED", "STATUS_NOT_INITIALIZED")
"""What errors say where a device is full: torch's own, and those of libraries that get no memory to work in or to start with."""


def there(name: str | None, where: str = "--device") -> str | None:
    """The name as it is, if a device is asked for and available; ``where`` is what the caller calls the option. Raises
    UsageError, which lists the names or the devices that are possible."""
    if name is None:
        return None
    if not isinstance(name, str) or not _NAMES.fullmatch(name):
        raise UsageError(f"{where}: expected cpu, cuda, cuda:N, mps or auto, found {name!r:.60}")
    if name not in (AUTO, PROCESSOR) and name not in (found := known_places()):
        raise UsageError(f"{where} {name}: expected a device that is here ({', '.join(found)}), found no such one")
    return name


def known_places() -> tuple[str, ...]:
    """The names of all available devices; the first is the one that ``auto`` takes."""
    import torch

    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return (*(["cuda", *cuda] if cuda else []), *mps, PROCESSOR)


def place_of(name: str) -> "torch.device":
    """The device of a name, with its number, as tensors on it report it. Raises UsageError where it is not available."""
    import torch

    there(name)
    device = torch.device(known_places()[0] if name == AUTO else name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps", 0) if device.type == "mps" else device


def place_of_model(model: "nn.Module") -> "torch.device":
    """Where the parameters and buffers of a model lie: the processor unless all of them lie on one device."""
    import torch

    from convrewrite.state import parameters_of

    found = {tensor.device for tensor in (*parameters_of(model), *model.buffers()) if not tensor.is_meta}
    return found.pop() if len(found) == 1 else torch.device(PROCESSOR)


def described(device: "torch.device") -> str:
    """A device's name, with its product name where torch reports that."""
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def free_memory(device: "torch.device") -> int:
    """Bytes that activations and moments may take on a device as it is now; memory that torch only caches there counts as
    free."""
    import torch

    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(ROOM * (torch.cuda.mem_get_info(device)[0] + held))
    return int(ROOM * (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()))


def let_go(device: "torch.device") -> None:
    """Give back the memory that torch only caches on a device."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def ready_thread() -> None:
    """What a new thread has to do before it works on a device: cuBLAS warns in a thread that has not used CUDA before."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def has_float64(device: "torch.device") -> bool:
    """Whether a device computes in float64: Apple's do not."""
    return device.type != "mps"


def exact_place(device: "torch.device") -> "torch.device":
    """Where float64 is computed for a device: on it, or on the processor where it has no float64."""
    import torch

    return device if has_float64(device) else torch.device(PROCESSOR)


def exactly(tensor: "Tensor") -> "Tensor":
    """The tensor on a device that has float64: itself, or a copy on the processor."""
    return tensor if has_float64(tensor.device) else tensor.to(PROCESSOR)


def in_float64(tensor: "Tensor") -> "Tensor":
    """The numbers in float64, on a device that has it."""
    return exactly(tensor).double()


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a device has no memory left."""
    import torch

    return any(
        isinstance(one, torch.OutOfMemoryError)
        or (isinstance(one, RuntimeError) and any(text in message_of(one) for text in _EXHAUSTED))
        for one in led_to(error)
    )


class RandomSource(NamedTuple):
    """How the state of one of torch's generators is read, put back, and made from a seed."""

    state: "Callable[[], Tensor]"
    put: "Callable[[Tensor], object]"
    seed: Callable[[int], object]


def random_sources() -> list[RandomSource]:
    """The generators of the processor and of the devices in use. ``torch.manual_seed`` would also let a device that is first used
    later begin with this seed, and keeps the whole call stack for each kind of device: most of its time on the processor."""
    import torch

    used = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    found = [RandomSource(one.get_state, one.set_state, one.manual_seed) for one in (torch.default_generator, *used)]
    if torch.backends.mps.is_available():
        found.append(RandomSource(torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed))
    return found
