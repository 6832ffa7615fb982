"""What the machine has."""

import os

import pytest

from convrewrite import machine


def test_there_is_memory() -> None:
    assert machine.memory_bytes() > 1 << 20


@pytest.mark.parametrize(("flags", "block"), [({"avx2", "avx512f"}, 16), ({"avx2"}, 8), (set(), 8)])
def test_the_block_follows_the_processor(flags: set[str], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: ("any", frozenset(flags)))
    assert machine.channel_block() == block


def test_the_processor_has_a_name_and_flags() -> None:
    name, flags = machine.processor()
    assert name.strip() == name != ""
    assert all(flag == flag.lower() for flag in (*flags, *machine._numpy_features()))


def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    machine.share_processor()
    assert os.environ["GOMP_SPINCOUNT"] == machine.SPINS
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    machine.share_processor()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    machine.share_processor()
    assert "GOMP_SPINCOUNT" not in os.environ


class Heap:
    """Stands in for the C library, and remembers what it was told."""

    def __init__(self) -> None:
        self.told: dict[int, int] = {}

    def mallopt(self, parameter: int, value: int) -> int:
        self.told[parameter] = value
        return 1


@pytest.fixture
def heap(monkeypatch: pytest.MonkeyPatch) -> Heap:
    found = Heap()
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: found)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    return found


def test_large_blocks_come_from_the_heap(heap: Heap) -> None:
    machine.keep_heap()
    assert heap.told == {-3: machine.HEAP_BLOCK, -1: machine.HEAP_KEPT}, "M_MMAP_THRESHOLD and M_TRIM_THRESHOLD"


def test_the_heap_is_the_users_who_says_so_and_that_of_other_libraries_is_left_alone(
    heap: Heap, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MALLOC_ARENA_MAX", "2")
        machine.keep_heap()
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("", ""))
    machine.keep_heap()
    assert not heap.told


@pytest.mark.parametrize(
    ("told", "main"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, True),  # nobody else is there who would write
        ({"PMI_RANK": "1", "PMI_SIZE": "1"}, True),
        ({"RANK": "", "WORLD_SIZE": "many"}, True),
    ],
)
def test_the_main_process_is_the_first_of_several(
    told: dict[str, str], main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*machine.RANKS, *machine.COUNTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert machine.is_main_process() is main
