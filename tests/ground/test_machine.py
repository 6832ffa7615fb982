"""What the machine has."""

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
