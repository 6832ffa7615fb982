"""Ctrl-C and similar signals: delayed while something must not be left half done, and raised where they would kill."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

KILLING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a process without a word, unless it handles them."""


SOON = 0.02
"""Seconds after which a signal that had to wait is delivered again."""


class Terminated(BaseException):
    """One of :data:`KILLING` came; ``number`` is its own. Not an Exception, so that nothing on its way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


_raised: list[int] = []
"""Signals whose exceptions have not yet reached the end of a command."""


@contextmanager
def signals_raised() -> Iterator[None]:
    """Inside the block signals that would kill raise :class:`Terminated`, so that what is temporary is cleared; no signal gets
    lost.

    A signal that the process ignores, as under nohup, or handles itself is left alone. Only the main thread gets signals: in
    other threads nothing changes.
    """
    with ExitStack() as stack:
        ours = [n for n in _ending() if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
        for number in ours:
            stack.enter_context(_handled(number, _raise))
        if ours:
            _raised.clear()
            stack.enter_context(_swallowed_in_silence())
        stack.enter_context(interrupts_told())
        yield


@contextmanager
def _swallowed_in_silence() -> Iterator[None]:
    """Where an interrupt is raised in code that can raise nothing, Python prints its traceback and goes on; it is not lost here,
    as :func:`raise_unheard` raises it again, so nothing is printed."""
    before = sys.unraisablehook

    def hook(found: "sys.UnraisableHookArgs") -> None:
        if not issubclass(found.exc_type, (KeyboardInterrupt, Terminated)):
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


@contextmanager
def interrupts_told() -> Iterator[None]:
    """An error that the block raises after a signal is replaced by that signal's interrupt.

    Compiled code may catch what a signal raises and then fail with another error: pybind11, while it looks for an overload that
    takes the arguments, says that there is none.
    """
    try:
        yield
    except BaseException as error:
        found = error if isinstance(error, (KeyboardInterrupt, Terminated)) else _unheard()
        _raised.clear()
        if found is None or found is error:
            raise
        raise found from error


def raise_unheard() -> None:
    """Raise a signal's interrupt again where something on its way swallowed it and the command went on."""
    if (found := _unheard()) is not None:
        raise found


def _unheard() -> BaseException | None:
    return _error_of(_raised[-1]) if _raised else None


@contextmanager
def held(deliver: Callable[[int], None] = signal.raise_signal) -> Iterator[None]:
    """Inside the block Ctrl-C and the signals that :func:`signals_raised` raises wait; the last of them is delivered at the
    end."""
    came: list[int] = []
    try:
        with ExitStack() as stack:
            for number in _ending():
                if callable(signal.getsignal(number)):
                    stack.enter_context(_handled(number, lambda number, _frame: came.append(number)))
            yield
    finally:
        if came:
            deliver(came[-1])


def _ending() -> tuple[int, ...]:
    """Ctrl-C and the signals that would kill, where this thread gets any."""
    return (signal.SIGINT, *KILLING) if _gets_signals() else ()


def ignored_from_here() -> None:
    """All is done: Ctrl-C and similar signals come too late to change anything, so they are ignored until the process ends."""
    for number in _ending():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def put_back() -> Iterator[None]:
    """After the block signals do what they did before it."""
    with ExitStack() as stack:
        for number in _ending():
            if (before := signal.getsignal(number)) is not None:  # None: something outside Python handles it
                stack.callback(signal.signal, number, before)
        yield


def soon(number: int) -> None:
    """Deliver a signal a moment later, since an exception that is raised while an object is garbage-collected is lost."""
    timer = threading.Timer(SOON, _deliver, [number])
    timer.daemon = True
    with suppress(RuntimeError):  # the interpreter is about to end anyway
        timer.start()


def _deliver(number: int) -> None:
    """Deliver it to the main thread, and wake that if it sleeps."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, number)
    else:
        signal.raise_signal(number)


def _gets_signals() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(number: int, _frame: FrameType | None) -> None:
    _raised.append(number)
    raise _error_of(number)


def _error_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


@contextmanager
def _handled(number: int, handler: "signal._HANDLER") -> Iterator[None]:
    """Inside the block ``handler`` handles the signal, and the earlier handler after it, unless the block set another one."""
    before = signal.getsignal(number)
    try:
        signal.signal(number, handler)
        yield
    finally:
        if signal.getsignal(number) is handler:
            signal.signal(number, before)
