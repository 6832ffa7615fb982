"""What the machine has, and limits that keep one process from taking all of it. Without effect where the system has none."""

import ctypes
import functools
import importlib
import os
import platform
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

_SET_PARENT_DEATH_SIGNAL = 1
"""Linux's number of this operation of ``prctl``."""

UNKNOWN_MEMORY = 8 << 30
"""Bytes of memory that a machine is taken to have when it does not report them."""

SHARE = 0.9
"""Share of the main memory that the command line may take."""

SPINS = "30000"
"""How often a waiting thread of GNU OpenMP spins before it sleeps; GNU's default is 300,000. On two cores a step of training took
0.064, 0.070 and 0.082 s alone with 300,000, 30,000 and 1,000 spins, and 0.27, 0.24 and 0.17 s beside two busy processes; with
1,000 refinement took half as long again."""

HEAP_BLOCK, HEAP_KEPT = 1 << 26, 1 << 29
"""The largest block that comes from the heap, and how much the heap keeps unused at its end, in bytes. Memory outside the heap is
returned to the system and cleared again at every use: with a ResNet-18 a batch of 32 images took 0.83 s, and 0.70 s with
these."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""mallopt's numbers for the two."""


def memory_bytes() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's where that is less."""
    found = [UNKNOWN_MEMORY]
    with suppress(ValueError, OSError, AttributeError):
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            found.append(int(Path(name).read_text(encoding="ascii")))
    return min(found)


def is_ours(about: os.stat_result) -> bool:
    """Whether a file belongs to the user in whose name this process makes files; every file where the system has no users."""
    return not hasattr(os, "geteuid") or about.st_uid == os.geteuid()


def permit_alike(made: Path, place: Path) -> None:
    """Give ``made`` the group and the permissions of what is in ``place``: a folder that its owner had closed to others would
    otherwise be open again once a new result is in it."""
    if not hasattr(os, "chown"):  # Windows
        return
    # Nothing may be there; or a group that this user is not in, whose permissions are for nobody else.
    with suppress(OSError):
        before = os.stat(place)
        os.chown(made, -1, before.st_gid)
        os.chmod(made, stat.S_IMODE(before.st_mode))


def processor() -> tuple[str, frozenset[str]]:
    """The processor's name, and its feature flags in lower case."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = entries.get("model name") or platform.processor() or platform.machine()
    flags = entries.get("flags", "").lower().split()
    return name, frozenset(flags or _numpy_features())


@functools.cache
def adds_bytes() -> bool:
    """Whether the processor adds up products of two bytes in 32 bits. Other processors add them in 16, which overflow with 8-bit
    weights."""
    return bool({"avx512_vnni", "avx_vnni", "asimddp"} & processor()[1])


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor's matrix units take bfloat16: a convolution then takes a sixth of its time in float32."""
    return "amx_bf16" in processor()[1]


def _numpy_features() -> list[str]:
    try:
        found: object = getattr(importlib.import_module("numpy._core._multiarray_umath"), "__cpu_features__", {})
    except ImportError:
        return []
    return [name.lower() for name, there in found.items() if there] if isinstance(found, dict) else []


def channel_block() -> int:
    """Channels in one block of onnxruntime's NCHWc layout: 16 with AVX-512, otherwise 8."""
    return 16 if "avx512f" in processor()[1] else 8


def limit_memory(limit: int, *, address_space: bool = False) -> None:
    """Let this process have ``limit`` bytes of data, or of address space, and no more: what asks for more gets a MemoryError.

    A limit that is already lower stays.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    kind = resource.RLIMIT_AS if address_space else resource.RLIMIT_DATA
    soft, hard = resource.getrlimit(kind)
    lower = [bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY]
    with suppress(ValueError, OSError):  # macOS knows the limit and refuses to set it
        resource.setrlimit(kind, (min([limit, *lower]), hard))


def share_processor() -> None:
    """Let torch's threads sleep soon while they wait for each other, unless the user's environment says how long they spin.
    Where other work runs on the same cores, spinning threads keep the threads that they wait for from running. To be called
    before torch is imported, as its OpenMP reads the variable then."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_heap() -> None:
    """Let activations and covariances reuse memory that this process has already, where the C library is GNU's and the
    user's environment does not say otherwise."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_")) for name in os.environ):
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_THRESHOLD, HEAP_BLOCK)
    library.mallopt(_TRIM_THRESHOLD, HEAP_KEPT)


def give_back_heap() -> None:
    """Return memory that the C library keeps unused to the system, before blocks of other sizes are asked for."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, however that ends. Only Linux has this."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def limit_processor(seconds: int) -> None:
    """Let this process compute for so long, and no longer, even where nobody is left to stop it."""
    try:
        import resource
    except ImportError:
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
"""Variables in which launchers tell a process its number: torchrun and accelerate launch, and three kinds of mpirun."""

COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which they tell how many processes there are."""


def is_main_process() -> bool:
    """Whether this process is the first of those that were launched together, which alone writes and prints; True where it is
    the only one. A number without a count of several counts for nothing: something else has left it, and no other process
    would write."""
    ranks, counts = (
        [int(os.environ[name]) for name in told if os.environ.get(name, "").isdecimal()] for told in (RANKS, COUNTS)
    )
    return not ranks or ranks[0] == 0 or all(count < 2 for count in counts)
