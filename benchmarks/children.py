"""Work in a child process, so that a crash or an endless run of one piece does not end a whole table."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Failure:
    """``end``: "crashed" or "timeout"; ``message`` says how."""

    end: str
    message: str


@dataclass(frozen=True)
class Done(Generic[Found]):
    """What the work gave, or how it failed, and the seconds that it took: of the processor, or of the clock for a timeout."""

    found: Found | Failure
    seconds: float


def guarded(work: Callable[[], Found], timeout: float) -> Done[Found]:
    """The outcome of the work in a child process that may take so many seconds; forked, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Done(Failure("timeout", f"not done in {timeout:.0f} s"), timeout)
        done: Done[Found] = receiver.recv()
        return done
    except EOFError:
        process.join()
        return Done(Failure("crashed", f"the process ended with {process.exitcode}"), 0.0)
    finally:
        process.kill()
        process.join()


def _child(work: Callable[[], Found], pipe: Connection) -> None:
    started = time.process_time()
    found: Found | Failure
    try:
        found = work()
    except Exception as error:
        found = Failure("crashed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.send(Done(found, time.process_time() - started))
