"""The one place for what belongs to the whole process: patches of torch and Python, streams, loggers, random state, threads.

Everything here happens under one lock, and is as it was once the lock is free again, also in a process that another thread forks
(:mod:`convrewrite.process_lock`). Meanwhile other threads go on: a patched function does for them what it did before, and what
they print is shown. Random numbers alone are one state for all: a thread of the caller's that draws some gets other ones.
"""

import contextlib
import copy
import functools
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

from convrewrite.places import random_sources
from convrewrite.process_lock import ProcessLock
from convrewrite.thread_stream import ThreadStream
from convrewrite.traceable import traceable
from convrewrite.written_data import WrittenData

_LOCK = ProcessLock()

FAKE_TENSORS = "torch._subclasses.fake_tensor"
"""torch's logger of errors while shapes are computed; a forward may catch these itself."""

CALLS = 3
"""A call draws random numbers if their states are other ones after each of so many. Threads of servers and schedulers draw some
now and then, as how long to wait; that they do so during three calls of a few milliseconds is not to be expected."""

Patched = Callable[..., Any]

Found = TypeVar("Found")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread at a time."""
    with _LOCK:
        yield


@contextlib.contextmanager
def at_work(seed: int) -> Iterator[None]:
    """One run at a time: seeded random numbers, and torch in its ordinary mode (no inference mode, no autocast, nothing
    compiled). Random state, thread count, default dtype, warning filters and loggers are restored afterwards."""
    with _LOCK, ordinary_mode(), compiled("force_eager"), same_random_numbers(seed), _settings_kept():
        yield


COMPILED_LIMITS = ("recompile_limit", "accumulated_recompile_limit")
MODULES_COMPILED = 1 << 20
"""How many modules of one class may be compiled side by side: as many as there are options to time."""


@contextlib.contextmanager
def compiled(stance: str) -> Iterator[None]:
    """How code under ``torch.compile`` behaves inside the block: ``"force_eager"`` runs it uncompiled, ``"default"`` as usual.
    A model that is observed, traced and taken apart would be compiled anew at every step, and parts of this package with it."""
    stack = contextlib.ExitStack()
    with _LOCK.changed(stack.close):
        if "torch._dynamo" in sys.modules:  # otherwise nobody has asked for it, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance(stance))
            # Modules of one class share one forward: torch compiles it for eight of them, and runs the others uncompiled.
            stack.enter_context(torch._dynamo.config.patch(dict.fromkeys(COMPILED_LIMITS, MODULES_COMPILED)))
        yield


@contextlib.contextmanager
def ordinary_mode() -> Iterator[None]:
    """Tensors made inside the block can be trained, whatever mode the caller is in; nothing is autocast, and tensors made without
    naming a device are on the processor."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def ordinary(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors, with copies of those made in inference mode, which torch cannot differentiate with."""
    with torch.inference_mode(False):
        return tuple(tensor.clone() if tensor.is_inference() else tensor for tensor in tensors)


@contextlib.contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """Torch, numpy and Python draw from ``seed``; their random states are given back afterwards."""
    with random_states_kept():
        for source in random_sources():
            source.seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        yield


def draw_from(state: Tensor) -> None:
    """Torch draws on the processor from this state on: only inside :func:`random_states_kept`, which puts the caller's back."""
    torch.set_rng_state(state)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Processes that Python starts meanwhile import nothing from the working folder, whoever's that is: by itself it is the first
    place where they look for their modules."""
    name = "PYTHONSAFEPATH"
    with _LOCK:
        before = os.environ.get(name)

        def put_back() -> None:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before

        with _LOCK.changed(put_back):
            os.environ[name] = "1"
            yield


def without_draws(call: Callable[[], Found]) -> Found:
    """What a call gives that draws no random numbers; the states of torch, numpy and Python are given back. Raises RuntimeError
    for one that draws some. It is made up to ``CALLS`` times, as another thread may draw meanwhile."""
    for _ in range(CALLS):
        with random_states_kept():
            before = _random_states()
            found = call()
            if _random_states() == before:
                return found
    raise RuntimeError("it draws random numbers")


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """The random states of torch, numpy and Python are those before once the block is left."""
    with _LOCK, contextlib.ExitStack() as stack:
        for source in random_sources():
            stack.callback(source.put, source.state())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        yield


def _random_states() -> list[str | bytes]:
    drawn = [source.state().numpy().tobytes() for source in random_sources()]
    return [repr((random.getstate(), np.random.get_state(legacy=False))), *drawn]


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Inside the block graphics cards multiply float32 in full, not rounded to the ten bits of TF32, whose errors would end up in
    the fits; and cuDNN takes the same algorithm every time."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    asked: list[tuple[Any, str, object]] = [(cudnn, "benchmark", False), (cudnn, "deterministic", True)]
    if hasattr(cudnn, "conv"):  # from torch 2.9 on; what is set through one interface cannot be read through the other
        asked += [(part, "fp32_precision", "ieee") for part in (products, cudnn.conv, cudnn.rnn)]
    else:
        asked += [(part, "allow_tf32", False) for part in (products, cudnn)]
    stack = contextlib.ExitStack()
    with _LOCK.changed(stack.close):
        for owner, name, value in asked:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch, for one caller at a time, as the number belongs to the process."""
    with _LOCK, _LOCK.changed(functools.partial(torch.set_num_threads, torch.get_num_threads())):
        torch.set_num_threads(count)
        yield


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Inside the block this thread may trace modules with torch.fx, which replaces ``nn.Module.__call__`` for the whole process;
    other threads keep the original. What is made of sizes becomes a node too: fx itself does so for the functions of ``math``."""
    with _LOCK, contextlib.ExitStack() as stack:
        stack.enter_context(_calls_of_this_thread())
        if "torch._dynamo" in sys.modules:  # what torch.compile made is then followed as what it was made of
            stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
        for owner, name, function in list(traceable()):
            stack.enter_context(_patched(owner, name, function))
        yield


@contextlib.contextmanager
def exporting(loggers: Sequence[str]) -> Iterator[None]:
    """Inside the block this thread may export: nothing of it is shown, other threads run their models as before, weights are
    not written (:mod:`convrewrite.written_data`), and ``tensor.set_()`` does nothing. Reversible networks free a tensor that way
    once they are done with it, which is no part of what they compute and which the exporter refuses. The exporter's table of
    operators is made only once, and so is its list of operators that C++ composes."""
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    original = torch.Tensor.set_

    def set_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(self, *args, **kwargs) if args or kwargs else self

    with (
        _LOCK,
        _calls_of_this_thread(),
        quiet(loggers),
        _asked_once(utils, "_materialize_cpp_cia_ops"),
        _patched(torch.Tensor, "set_", _for_this_thread(set_, original)),
        _patched(ONNXRegistry, "from_torchlib", functools.partial(_copied_table, ONNXRegistry.from_torchlib)),
        WrittenData(),
    ):
        yield


@contextlib.contextmanager
def standard_output_closed() -> Iterator[None]:
    """Inside the block what libraries themselves write to the process's standard output is discarded, as a report may be piped
    there."""
    with _LOCK:
        sys.stdout.flush()
        try:
            kept = os.dup(1)
        except OSError:  # there is no standard output
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            with _LOCK.changed(functools.partial(os.dup2, kept, 1)):
                os.dup2(nowhere, 1)
                yield
        finally:
            os.close(kept)
            os.close(nowhere)


@contextlib.contextmanager
def pickled_by_value(modules: Sequence[ModuleType]) -> Iterator[None]:
    """Inside the block cloudpickle writes out the code of these modules, where it otherwise only names them."""
    import cloudpickle

    with _LOCK, contextlib.ExitStack() as stack:
        known = cloudpickle.list_registry_pickle_by_value()
        for module in (module for module in modules if module.__name__ not in known):
            cloudpickle.register_pickle_by_value(module)
            stack.callback(cloudpickle.unregister_pickle_by_value, module)
        yield


@contextlib.contextmanager
def quiet(loggers: Sequence[str] = ()) -> Iterator[None]:
    """Show nothing that this thread prints or warns of, and nothing of these loggers."""
    with _LOCK, contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = ThreadStream(getattr(sys, name))
            stack.enter_context(_LOCK.changed(stream.release))
            stack.enter_context(_patched(sys, name, stream))
        stack.enter_context(no_warnings())
        for logger in map(logging.getLogger, loggers):
            stack.enter_context(_LOCK.changed(functools.partial(logger.setLevel, logger.level)))
            logger.setLevel(logging.CRITICAL)
        yield


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before, inherited = getattr(owner, name), name not in vars(owner)

    def put_back() -> None:
        if getattr(owner, name) is not value:  # somebody else has replaced it meanwhile
            pass
        elif inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    with _LOCK.changed(put_back):
        setattr(owner, name, value)
        yield


@contextlib.contextmanager
def _asked_once(owner: Any, name: str) -> Iterator[None]:
    """Inside the block a function without arguments does its work for this thread at the first call only. Torch looks through the
    operators of C++ once for each of its two dozen namespaces, a tenth of the time of a small export."""
    if not hasattr(owner, name):  # private to torch, and not in every version
        yield
        return
    original = getattr(owner, name)
    with _patched(owner, name, _for_this_thread(functools.cache(original), original)):
        yield


def _copied_table(make: Patched, *args: Any, **kwargs: Any) -> Any:
    """A copy of the table by which the exporter translates operators. To make it torch parses the source of 500 functions, half
    of the time of a small export."""
    table = copy.copy(_table(make, args, tuple(kwargs.items())))
    table.functions = {name: list(functions) for name, functions in table.functions.items()}
    return table


@functools.cache
def _table(make: Patched, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]) -> Any:
    return make(*args, **dict(kwargs))


def _for_this_thread(function: Patched, otherwise: Patched) -> Patched:
    """One function for the calling thread, another one for all others."""
    owner = threading.get_ident()

    @functools.wraps(function)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        chosen = function if threading.get_ident() == owner else otherwise
        return chosen(*args, **kwargs)

    return dispatched


@contextlib.contextmanager
def _calls_of_this_thread() -> Iterator[None]:
    """What a tracer of torch patches in ``nn.Module`` inside the block holds for this thread only."""
    patcher = _symbolic_trace._Patcher
    original = patcher.patch_method

    def patch_method(self: Any, cls: type, name: str, new_fn: Patched, deduplicate: bool = True) -> None:
        own = _for_this_thread(new_fn, getattr(cls, name)) if cls is nn.Module else new_fn
        original(self, cls, name, own, deduplicate)

    with _patched(patcher, "patch_method", _for_this_thread(patch_method, original)):
        yield


class _Here:
    """A pattern for a warning filter that matches every text, but only in the thread that made it, and while it ``holds``."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self.holds = True

    def match(self, _text: str) -> bool:
        return self.holds and threading.get_ident() == self._owner


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Warnings of this thread are ignored, by a filter, as ``catch_warnings`` would act on every thread."""
    here = _Here()
    entry = ("ignore", here, Warning, None, 0)
    filters = cast("list[Any]", warnings.filters)
    filters.insert(0, entry)
    try:
        yield
    finally:
        here.holds = False
        for known in (filters, cast("list[Any]", warnings.filters)):
            if entry in known:
                known.remove(entry)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    threads, dtype, filters = torch.get_num_threads(), torch.get_default_dtype(), list(warnings.filters)
    names = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    loggers = [logging.root, *map(logging.getLogger, names)]
    states = [(logger, logger.level, logger.disabled, logger.propagate, list(logger.handlers)) for logger in loggers]

    def put_back() -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if list(warnings.filters) != filters:
            cast("list[Any]", warnings.filters)[:] = filters
        for logger, level, disabled, propagate, handlers in states:
            if logger.level != level:
                logger.setLevel(level)
            logger.disabled, logger.propagate = disabled, propagate
            if logger.handlers != handlers:
                logger.handlers[:] = handlers

    with _LOCK.changed(put_back):
        yield
