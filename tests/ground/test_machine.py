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
