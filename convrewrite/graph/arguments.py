"""What forwards are given, and what they take in place of the rest.

A part that is followed by itself has to be followed as the model calls it: ``self.up(x, skip)`` without the skip is another part.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from convrewrite.inputs import Inputs
from convrewrite.modules import hooked, run
from convrewrite.process import random_states_kept


def names_given(module: nn.Module, count: int) -> list[str]:
    """The arguments of a module's forward that ``count`` inputs are given to."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY][:count]


def defaults_of(module: nn.Module, given: Collection[str]) -> dict[str, Any]:
    """The arguments that are not ``given``, with their defaults: as Proxies they would bake ``if x is None`` to False."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in given and p.default is not p.empty}


@dataclass
class GivenToParts:
    """The parameters of the forwards of a model's parts that they are given a value for, as a run on ``inputs`` shows. The
    run waits until something is asked, as most models are followed whole."""

    model: nn.Module
    inputs: Inputs

    def of(self, part: nn.Module) -> tuple[str, ...]:
        """Those of one part, where all its calls give it the same ones; none where they do not, nor of the model itself. What
        they are given is not told: a constant may be another one at the next call. Raises TraceError where the model does
        not run."""
        return () if part is self.model else self._known.get(part, ())

    @cached_property
    def _known(self) -> dict[nn.Module, tuple[str, ...]]:
        found: dict[nn.Module, set[tuple[str, ...]]] = {}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.setdefault(module, set()).add(tuple(named_values(module, args, kwargs) or ()))

        def handles() -> Iterator[RemovableHandle]:
            for module in self.model.modules():
                if module is not self.model and not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    yield module.register_forward_pre_hook(enter, with_kwargs=True)

        with random_states_kept(), hooked(handles()):
            run(self.model, self.inputs)
        return {module: next(iter(calls)) for module, calls in found.items() if len(calls) == 1}


def named_values(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a call gives, by the names of the forward's parameters, without what is None; None where the forward takes any number
    of arguments, or others."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    kinds = {parameter.kind for parameter in bound.signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return None
    return {name: value for name, value in bound.arguments.items() if value is not None}
