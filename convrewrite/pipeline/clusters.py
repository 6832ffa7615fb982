"""Work handed to processes elsewhere: a small interface to Dask, which is imported nowhere else.

Dask sends values as pickles, so every process of a cluster can run code in all others: a scheduler and its workers are trusted as
this process is. A cluster that is started here listens on this machine alone, and admits only processes with its certificate.
"""

import importlib.metadata
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from convrewrite.errors import ProcessLostError, UsageError
from convrewrite.escaping import innermost_cause, led_to, message_of
from convrewrite.folders import temporary
from convrewrite.process import pickled_by_value, quiet, safe_path
from convrewrite.version import tool_version

PATIENCE = 10.0
"""Seconds within which a scheduler must answer and have a worker; a scheduler that is up takes one second."""

LONELY = 60.0
"""After this many seconds without any worker none is expected to come: a worker that died is back in a few seconds."""

DEATHS = 1
"""In a cluster that is started here, workers may die this many times at a task before the task is taken for the cause."""

LOCAL = "local"

MOST_WORKERS = 1024
"""Most processes on one machine: a larger number is a mistake."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of a cluster, as the process that hands out work sees them."""

    client: Any
    name: str

    @property
    def count(self) -> int:
        """How many processes there are; each works on one thing at a time."""
        return max(1, len(self.client.nthreads()))

    def keep(self, value: object) -> Any:
        """Send once what many tasks take; each opens it with :func:`kept`. Raises UsageError for what cannot be sent."""
        return self.hand(_same, _sendable(value))

    def hand(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Hand out a task, which begins as soon as a worker is free and its arguments are known."""
        with quiet():  # Dask warns about large arguments
            return self.client.submit(function, *arguments, pure=False)

    def finished(self, tasks: Sequence[Any]) -> Iterator[Any]:
        """The tasks as they end. Raises ProcessLostError where no worker is left."""
        from distributed import wait

        pending = set(tasks)
        while pending:
            try:
                with self._losses_told(), self.client.as_current():
                    done, pending = wait(pending, timeout=PATIENCE, return_when="FIRST_COMPLETED")
            except TimeoutError:
                self._require_company()
                continue
            yield from done

    def result(self, task: Any) -> Any:
        """The result of a task that has ended. Raises ProcessLostError where its worker died, or the task ended in an error."""
        with self._losses_told():
            failed: BaseException | None = task.exception()
            if isinstance(failed, Exception) and not _is_loss(failed):
                raise ProcessLostError(
                    f"cluster {self.name}: expected a worker to carry out its task, found that one ended in "
                    f"{innermost_cause(failed)}; mend what it names, or sweep without a cluster"
                ) from failed
            return task.result()

    @contextmanager
    def _losses_told(self) -> Iterator[None]:
        from distributed import KilledWorker
        from distributed.comm import CommClosedError

        try:
            yield
        except KilledWorker as error:
            raise ProcessLostError(
                f"cluster {self.name}: expected a worker to carry out its task, found that {_deaths(error)} died of it; "
                "the memory may be too little: take fewer workers, or a smaller --memory, or sweep without a cluster"
            ) from error
        except (CommClosedError, CancelledError) as error:
            raise self._gone() from error

    def _require_company(self) -> None:
        try:
            self.client.wait_for_workers(1, timeout=LONELY)
        except Exception as error:  # a scheduler that is gone may raise anything
            raise self._gone() from error

    def _gone(self) -> ProcessLostError:
        return ProcessLostError(
            f"cluster {self.name}: expected its scheduler and workers to stay until the end, found them gone; "
            "start them again, and the sweep"
        )


@contextmanager
def workers_of(cluster: str) -> Iterator[Workers]:
    """Workers on this machine for ``local`` or ``local:N``, otherwise those of the scheduler at an address, such as
    ``tcp://host:8786``.

    Raises UsageError for another form, a scheduler that does not answer, and workers that have other versions.
    """
    count = require_cluster(cluster)
    with _here(count) if count is not None else _elsewhere(cluster) as client:
        workers = Workers(client, cluster)
        _require_alike(workers)
        yield workers


def require_cluster(cluster: str) -> int | None:
    """How many workers are to be started here; None for an address. Raises UsageError for another form, and if Dask is
    missing."""
    try:
        import cryptography  # noqa: F401
        import distributed  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"cluster: expected dask, distributed and cryptography, {error.name} is not installed; "
            "pip install 'convrewrite[cluster]'"
        ) from error
    text = cluster if isinstance(cluster, str) else ""  # a caller in Python may give anything
    kind, separator, number = text.partition(":")
    if kind == LOCAL:
        if not separator:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if number.isascii() and number.isdigit() and 0 < int(number) <= MOST_WORKERS:
            return int(number)
    elif "://" in text:
        return None
    raise UsageError(
        f"cluster: expected local, local:N with N up to {MOST_WORKERS}, or an address such as tcp://host:8786, found "
        f"{cluster!r:.60}"
    )


@contextmanager
def _here(count: int) -> Iterator[Any]:
    """Processes of this machine, each with one thread, that end with the block."""
    import dask
    from distributed import Client, LocalCluster

    settings = {"distributed.scheduler.allowed-failures": DEATHS, "distributed.scheduler.http.routes": []}
    scratch = temporary()
    with scratch, safe_path(), dask.config.set(settings):
        try:
            cluster = LocalCluster(
                n_workers=count,
                threads_per_worker=1,
                host="127.0.0.1",
                security=True,
                dashboard_address="127.0.0.1:0",
                memory_limit=0,  # a run has its own limit, and a worker that is ended for exceeding one reports nothing
                local_directory=str(scratch.path),
                silence_logs="CRITICAL",
            )
        except (RuntimeError, OSError, TimeoutError) as error:
            *_, first = led_to(error)  # the last one says only that a worker did not start
            raise UsageError(
                f"cluster: {count} workers cannot be started here: {message_of(first)}; sweep in a process that may start "
                'others, and in a script under if __name__ == "__main__":'
            ) from error
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client
            with suppress(Exception):  # workers that were started again end in order only once they are up
                client.wait_for_workers(count, timeout=PATIENCE)


@contextmanager
def _elsewhere(address: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise UsageError(
            f"cluster {address}: expected a scheduler that answers within {PATIENCE:g} s, found none "
            f"({message_of(error)}); start one with `dask scheduler`, and workers with `dask worker {address}`"
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise UsageError(
                f"cluster {address}: expected a worker within {PATIENCE:g} s, found none; start some with `dask worker {address}`"
            ) from error
        yield client


def _require_alike(workers: Workers) -> None:
    """Raise UsageError unless all workers have the versions that results depend on."""
    own = _versions()
    try:
        others = workers.client.run(_versions)
    except Exception as error:  # whatever a worker lacks
        raise UsageError(
            f"cluster {workers.name}: expected workers that import convrewrite {own['convrewrite']}, found that one does not: "
            f"{message_of(error)}; install the same version there"
        ) from error
    for worker, versions in others.items():
        for name, version in versions.items():
            if version != own[name]:
                raise UsageError(
                    f"cluster {workers.name}: expected {name} {own[name]} as here, found {version} on {worker}; install the same"
                )


def _versions() -> dict[str, str]:
    """The versions that results depend on, without the part that only says how torch was built."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    return {
        "convrewrite": tool_version(),
        "torch": torch,
        "Python": ".".join(map(str, sys.version_info[:2])),
    }


def failure(error: Exception) -> str:
    """In a task: the message for an unforeseen error, with the worker and the place in the code."""
    from distributed import get_worker

    *_, last = traceback.extract_tb(error.__traceback__) or [None]
    place = "" if last is None else f" (in {last.name}, line {last.lineno})"
    return (
        f"worker {get_worker().address}: expected to carry out its task, found {innermost_cause(error)}{place}; mend what that "
        "names, or sweep without a cluster"
    )


def kept(value: bytes) -> Any:
    """In a task: what was sent with :meth:`Workers.keep`."""
    import cloudpickle

    return cloudpickle.loads(value)


def _sendable(value: object) -> bytes:
    """The value as a pickle, with the code that only this process has. Raises UsageError for what cannot be pickled."""
    import cloudpickle

    try:
        with pickled_by_value(_own_modules()):
            pickled: bytes = cloudpickle.dumps(value)
    except Exception as error:  # a class can fail in any way
        raise UsageError(
            "cluster: expected a model, inputs and a metric that can be sent to another process, found that "
            f"{message_of(error)}; sweep without a cluster"
        ) from error
    return pickled


def _own_modules() -> list[ModuleType]:
    """Modules that a worker cannot be expected to have: those from files outside the places where packages are installed."""
    installed = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {
        Path(__file__).parents[1]
    }
    found = []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is None or getattr(module, "__name__", "__main__") == "__main__":
            continue
        if not any(Path(file).is_relative_to(place) for place in installed):
            found.append(module)
    return found


def _same(value: bytes) -> bytes:
    return value


def _is_loss(error: Exception) -> bool:
    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    return isinstance(error, KilledWorker | CommClosedError)


def _deaths(error: Any) -> str:
    count = getattr(error, "allowed_failures", DEATHS) + 1
    return f"{count} workers" if count > 1 else "a worker"
