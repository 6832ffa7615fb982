"""Frontiers handed to a cluster: what the points of a model share is one task, and every worker gets some of the points.

Results come back as text, which is checked like any other text from elsewhere. A worker must behave as this process does: its
versions are compared once (:mod:`convrewrite.pipeline.clusters`), and every task sets the same number of threads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter

import convrewrite.errors
from convrewrite.errors import ConvRewriteError, FitError, ProcessLostError
from convrewrite.onnx_graph import PortableGraph
from convrewrite.pipeline.clusters import Workers, failure, kept
from convrewrite.pipeline.points import Beginning, Frontier, Made
from convrewrite.process import torch_threads
from convrewrite.progress import Progress

MADE = TypeAdapter(list[Made])


class _Failed(BaseModel):
    """One of this package's errors as text, in the place of a result, which is text as well."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    error: str
    message: str


@dataclass(frozen=True, slots=True)
class _Sent:
    """A frontier in the form that is sent: ``graph`` is that of a model that came as ONNX; ``threads`` are those of torch in the
    process that asks, as sums depend on them."""

    frontier: Frontier
    graph: PortableGraph | None
    threads: int

    @classmethod
    def of(cls, frontier: Frontier) -> "_Sent":
        """What a worker needs, without anything that belongs to this process. Raises UsageError for weights in files beside an
        ONNX file."""
        bare = replace(frontier, extras=replace(frontier.extras, progress=None, name=frontier.name))
        graph = PortableGraph.of(bare.network.model, bare.network.inputs)
        if graph is not None:
            bare = replace(bare, network=replace(bare.network, model=torch.nn.Module(), inputs=()))
        return cls(bare, graph, torch.get_num_threads())

    def unpacked(self) -> Frontier:
        """The frontier, in the process that works on it."""
        if self.graph is None:
            return self.frontier
        found = self.graph.network(self.frontier.settings.timeout)
        network = replace(self.frontier.network, model=found.module, inputs=found.inputs)
        return replace(self.frontier, network=network)


@dataclass(frozen=True, slots=True)
class Handed:
    """A frontier whose tasks are handed out; each of the tasks for ``points`` has some of these, so that workers share them."""

    frontier: Frontier
    beginning: Any
    points: Sequence[Any]

    @classmethod
    def to(cls, workers: Workers, frontier: Frontier) -> "Handed":
        """Hand it to workers. Raises UsageError for what cannot be sent."""
        sent = workers.keep(_Sent.of(frontier))
        beginning = workers.hand(_beginning, sent)
        shares = [
            list(frontier.budgets[first :: workers.count]) for first in range(min(workers.count, len(frontier.budgets)))
        ]
        return cls(frontier, beginning, [workers.hand(_points, sent, beginning, share) for share in shares])


def collected(workers: Workers, handed: Sequence[Handed], progress: Progress) -> list[tuple[Beginning, list[Made]]]:
    """The results of frontiers, with points from the largest budget to the smallest. Raises what the work raised, and
    ProcessLostError."""
    beginnings = {one.beginning: position for position, one in enumerate(handed)}
    tasks = [*beginnings, *(task for one in handed for task in one.points)]
    total, done = sum(len(one.frontier.budgets) for one in handed), 0
    begun, made = dict[Any, Beginning](), dict[Any, list[Made]]()
    progress("survey", 0, len(handed), f"on {workers.count} workers")
    for task in workers.finished(tasks):
        found = _result_in(workers.result(task))
        if task in beginnings:
            begun[task] = Beginning.model_validate_json(found)
            progress("survey", len(begun), len(handed), "done")
        else:
            made[task] = MADE.validate_json(found)
            done += len(made[task])
            progress("points", done, total, f"{done} of {total}")
    return [
        (
            begun[one.beginning],
            sorted((point for task in one.points for point in made[task]), key=lambda point: -point.point.budget),
        )
        for one in handed
    ]


def _result_in(text: str) -> str:
    """The text of a result. Raises the error if the text is one."""
    if not text.startswith(FAILED):
        return text
    failed = _Failed.model_validate_json(text.removeprefix(FAILED))
    kind = getattr(convrewrite.errors, failed.error, None)
    if not (isinstance(kind, type) and issubclass(kind, ConvRewriteError)):
        kind = ProcessLostError
    if issubclass(kind, FitError):  # it is made from two texts, but its message is one
        site, _, reason = failed.message.partition(": ")
        raise kind(site, reason)
    raise kind(*failed.message.splitlines())


FAILED = "failed:"
"""The prefix of an error's text, with which no JSON begins."""


def _beginning(sent: bytes) -> str:
    return _answered(sent, lambda frontier: frontier.beginning().model_dump_json())


def _points(sent: bytes, beginning: str, budgets: Sequence[float]) -> str:
    if beginning.startswith(FAILED):
        return beginning
    known = Beginning.model_validate_json(beginning)
    return _answered(sent, lambda frontier: MADE.dump_json(frontier.points(known, budgets)).decode())


def _answered(sent: bytes, work: Callable[[Frontier], str]) -> str:
    """The result of the work, or the error in which it ends, as text."""
    try:
        opened: _Sent = kept(sent)
        with torch_threads(opened.threads):
            return work(opened.unpacked())
    except ConvRewriteError as error:
        return FAILED + _Failed(error=type(error).__name__, message=str(error)).model_dump_json()
    except Exception as error:  # from the user's code, or from what the worker lacks
        return FAILED + _Failed(error=ProcessLostError.__name__, message=failure(error)).model_dump_json()
