"""The times of everything that a plan may need: measured here, or written as graphs for another machine to measure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from convrewrite.errors import UsageError
from convrewrite.folders import made_aside, temporary
from convrewrite.inputs import ExampleInput
from convrewrite.machine import processor
from convrewrite.modules import private_copy, surroundings_preserved
from convrewrite.onnx_graph import exporter_of
from convrewrite.pipeline.keywords import RuleSource, settings_of
from convrewrite.pipeline.networks import ModelSource, at_home, network_of
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning import latency_table_of, to_time
from convrewrite.process import at_work
from convrewrite.rewriting import Prepared
from convrewrite.rules import resolve
from convrewrite.runtime import Baseline
from convrewrite.settings import Settings
from convrewrite.targets import ORIGINAL, Profile, list_graphs

MOST_TOLD = 4096
"""Most numbers of an input that are written into a list of graphs."""


def profile(
    model: ModelSource,
    example_input: ExampleInput | None = None,
    rules: Sequence[RuleSource] = ("balanced",),
    *,
    settings: Settings | None = None,
    graphs: str | Path | None = None,
) -> Profile | None:
    """The times of all options that a plan by these rules may need, in ``settings.runtime``; of :class:`Settings` only
    ``runtime``, ``threads``, ``fast`` and ``timeout`` count.

    ``graphs``: nothing is timed; the ONNX graphs are written to a new folder of this name instead, for
    ``convrewrite profile FOLDER`` on a machine that needs no torch, and None is returned. Raises UsageError for a folder that
    exists already, ExportError for a model that the runtime cannot run.
    """
    asked = replace(settings_of(settings), timings=None)
    network = at_home(network_of(model, example_input, asked.timeout))
    module, inputs = network.model, network.inputs
    with at_work(asked.seed), surroundings_preserved(module):
        # left=0: within the smallest budgets most sites take part, and no budget is known here.
        prepared = prepare(private_copy(module, inputs), inputs, resolve(rules), (), module, left=0.0)
        if graphs is not None:
            _write(prepared, asked, Path(graphs))
            return None
        table = latency_table_of(prepared, asked)
        with temporary() as scratch:
            exporter = exporter_of(prepared.original)
            baseline = Baseline.of(
                prepared.model, inputs, scratch.path, asked.clock, asked.threads, exporter, asked.target
            )
            seconds = {ORIGINAL: baseline.seconds()}
            for entry in to_time(prepared, table):
                seconds |= entry.times(table.timer, asked.threads, table.rounds)
    target = asked.target
    return Profile(
        target.name, target.version(), processor()[0], target.block(), asked.threads, seconds, prepared.layout
    )


def _write(prepared: Prepared, asked: Settings, folder: Path) -> None:
    """Write the graphs and the original to a new folder, in one step."""
    if folder.exists():
        raise UsageError(f"{folder}: expected a new folder for the graphs, found one that is there; name another")
    with made_aside(folder, "another folder with --graphs") as made:
        made.mkdir()
        exporter = exporter_of(prepared.original)
        exporter.rewritten(prepared.model, prepared.inputs, made / f"{ORIGINAL}.onnx", {})
        one = tuple(tensor[:1] for tensor in prepared.inputs)
        own = one if exporter.exports and prepared.batch is None else prepared.inputs
        groups = [entry.written(made) for entry in to_time(prepared, latency_table_of(prepared, asked))]
        inputs = [_described(tensor, any(tensor is given for given in own)) for tensor in exporter.feed(own)]
        list_graphs(made, groups, inputs, prepared.layout, len(own[0]))


def _described(tensor: Tensor, of_examples: bool) -> dict[str, Any]:
    """An input by shape and type; by its numbers too where all examples share them and they are few: as a size that is resized
    to, they may decide what is computed."""
    described = {"shape": list(tensor.shape), "type": str(tensor.dtype).removeprefix("torch.")}
    if of_examples or tensor.numel() > MOST_TOLD:
        return described
    return {**described, "values": tensor.flatten().tolist()}
