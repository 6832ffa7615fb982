"""Signals whose exceptions something on their way swallows: what they interrupt ends by them all the same."""

import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from convrewrite.interrupts import Terminated, held, interrupts_told, raise_unheard, signals_raised

KINDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


def swallowed(number: signal.Signals, after: Callable[[], None] = lambda: None) -> None:
    """A signal in compiled code that catches what it raises, and what comes after it."""
    with signals_raised():
        with suppress(BaseException):
            signal.raise_signal(number)
        after()


def overloads() -> None:
    raise TypeError("incompatible arguments. The following argument types are supported:")


@pytest.mark.parametrize("number", KINDS)
def test_an_error_after_a_signal_is_told_as_that_signal(number: signal.Signals) -> None:
    with pytest.raises(KINDS[number]) as caught:
        swallowed(number, overloads)
    assert isinstance(caught.value.__cause__, TypeError)


def test_an_error_that_no_signal_preceded_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match="a fault"), signals_raised(), interrupts_told():
        raise TypeError("a fault")


@pytest.mark.parametrize("number", KINDS)
def test_what_goes_on_after_a_signal_is_ended_at_its_next_step(number: signal.Signals) -> None:
    with pytest.raises(KINDS[number]):
        swallowed(number, raise_unheard)


def test_a_signal_that_was_told_is_not_told_again() -> None:
    def told_and_later() -> None:
        with suppress(KeyboardInterrupt), interrupts_told(), held():
            signal.raise_signal(signal.SIGINT)
        raise_unheard()
        overloads()

    with pytest.raises(TypeError, match="incompatible"), signals_raised():
        told_and_later()


def test_one_run_does_not_end_by_the_signal_of_an_earlier_one() -> None:
    swallowed(signal.SIGINT)
    with signals_raised():
        raise_unheard()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_in_code_that_can_raise_nothing_is_no_traceback() -> None:
    class Finalised:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    usual, seen = sys.unraisablehook, []
    sys.unraisablehook = lambda found: seen.append(found.exc_type)
    try:
        with signals_raised():
            Finalised(KeyboardInterrupt())
            Finalised(ValueError())
        assert seen == [ValueError], "others are told as ever"
        Finalised(KeyboardInterrupt())
        assert seen == [ValueError, KeyboardInterrupt], "as before behind the block"
    finally:
        sys.unraisablehook = usual
