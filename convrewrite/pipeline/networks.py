"""Turns whatever a caller names a model by into a module with its inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.inputs import ExampleInput, Inputs, bound_inputs, moved, require_common_batch
from convrewrite.loading import load_model
from convrewrite.modules import copy_model, put_on
from convrewrite.names import require_names
from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph import ExampleAxis, noise_for, open_onnx, read_network, source_of_graph
from convrewrite.pipeline.workplace import HOME
from convrewrite.places import place_of_model
from convrewrite.process import ordinary_mode
from convrewrite.reporting import Report
from convrewrite.state import named_parameters_of, parameters_of, unmade_part

ModelSource = Any
"""A module, the path of a file, or an ``onnx.ModelProto``, which is not named here, so that onnx need not be imported."""


LARGEST_REPORTED = 1 << 30
"""Most numbers of an input whose shape only a report states, which may come from anyone: four gigabytes of float32."""

REBUILT = "give convrewrite.loading.rebuild(program).model, where program is what torch.export gave"


@dataclass(frozen=True, slots=True)
class BoundNetwork:
    """The module, one example for it, its name, and what was assumed, one sentence for each assumption."""

    model: nn.Module
    inputs: Inputs
    name: str
    notes: Sequence[str] = ()


def network_of(
    source: ModelSource, example: ExampleInput | None, timeout: float, report: Report | None = None
) -> BoundNetwork:
    """A model with its inputs bound; an ONNX file has ``timeout`` seconds to open, and again to run once. ``report``: of a result
    of that model, by whose shapes an example is made where none is given. Raises UsageError for anything other than a model, and
    for a module without an example; ModelLoadError for a file that cannot be read, and for a module without weights."""
    with ordinary_mode():  # examples that are made here lie on the processor
        example = example if report is None else example_for(report, source, example)
        return _network(source, example, timeout, () if report is None else report.input_shapes)


def example_for(report: Report, model: ModelSource, example: ExampleInput | None) -> ExampleInput | None:
    """The example that was given; for a module without one, random numbers of the shapes in the report, in double precision where
    all its own numbers are, and in single precision otherwise. Raises UsageError for shapes that no example has."""
    if example is not None or not isinstance(model, nn.Module):
        return example
    if (largest := max(map(math.prod, report.input_shapes), default=0)) > LARGEST_REPORTED:
        raise UsageError(
            f"example input: expected at most {LARGEST_REPORTED} numbers by the report, found {largest}; give an example"
        )
    generator = torch.Generator().manual_seed(0)
    own = {p.dtype for p in parameters_of(model) if p.is_floating_point()}
    dtype = torch.float64 if own == {torch.float64} else torch.float32
    return tuple(torch.randn(shape, generator=generator, dtype=dtype, device="cpu") for shape in report.input_shapes)


def at_home(network: BoundNetwork) -> BoundNetwork:
    """The network on the processor, where sites are found and models are exported and timed; a copy if it lies elsewhere."""
    if place_of_model(network.model) == HOME:
        return replace(network, inputs=moved(network.inputs, HOME))
    return replace(network, model=put_on(HOME, copy_model(network.model)), inputs=moved(network.inputs, HOME))


def _network(
    source: ModelSource, example: ExampleInput | None, timeout: float, shapes: Sequence[tuple[int, ...]]
) -> BoundNetwork:
    if isinstance(source, nn.Module):
        require_names(source, type(source).__name__)
        _require_modes(source)
        _require_numbers(source)
        name = source_of_graph(source) or type(source).__name__
        return BoundNetwork(source, bound_inputs(source, _needed(example)), name)
    if type(source).__name__ == "ModelProto" or (isinstance(source, str | Path) and _is_onnx(source)):
        opened = open_onnx(source, seconds=timeout)
        if example is None:
            example = _of_shapes(opened.session, ExampleAxis.of(opened.file.model).names, shapes)
        network = read_network(opened, example)
        require_common_batch(network.inputs)
        name = source.graph.name if not isinstance(source, str | Path) else str(source)
        return BoundNetwork(network.module, network.inputs, name, network.notes)
    if isinstance(source, str | Path):
        loaded = load_model(source)
        return BoundNetwork(loaded.model, bound_inputs(loaded.model, _needed(example)), loaded.source, loaded.notes)
    rebuilt = f"; {REBUILT}" if type(source).__name__ == "ExportedProgram" else ""
    raise UsageError(f"model: expected a module, a path or an onnx.ModelProto, found {type(source).__name__}{rebuilt}")


def _of_shapes(session: OnnxModel, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> ExampleInput | None:
    """Noise of these shapes for ``names``, the inputs of a graph that have examples; None where the graph has others."""
    stated = dict(zip(session.input_names, session.input_shapes, strict=True))
    if len(names) != len(shapes):
        return None
    named = dict(zip(names, shapes, strict=True))
    fit = all(name in session.unranked or _is_stated(stated[name], shape) for name, shape in named.items())
    return noise_for(session, named) if fit else None


def _is_stated(stated: Sequence[int | str | None], shape: Sequence[int]) -> bool:
    return len(stated) == len(shape) and all(
        not isinstance(want, int) or want == size for want, size in zip(stated, shape, strict=True)
    )


def _require_modes(model: nn.Module) -> None:
    """Raise ModelLoadError for the module of an exported program: torch has put a refusal in place of its ``eval``."""
    own = getattr(vars(model).get("eval"), "__func__", None)
    if getattr(own, "__module__", None) == "torch.export.exported_program":
        raise ModelLoadError(
            f"{type(model).__name__}: expected a module that can change its mode, found what ExportedProgram.module() gives; "
            f"{REBUILT}"
        )


def _require_numbers(model: nn.Module) -> None:
    """Raise ModelLoadError for a module whose weights do not exist yet, or that lacks its sizes even though they do."""
    lazy = [name for name, tensor in named_parameters_of(model) if is_lazy(tensor)]
    unmade = lazy[0] if lazy else unmade_part(model)
    if unmade:
        raise ModelLoadError(
            f"{type(model).__name__}: expected a trained model, found {unmade}, which is made when the model is first run; run "
            "it, and load or train its weights, or take out a part that never runs"
        )
    for name, tensor in named_parameters_of(model):
        if tensor.is_meta:
            raise ModelLoadError(
                f"{type(model).__name__}: expected weights, found {name} on the meta device, which holds no numbers; load the "
                "weights, as with model.to_empty(device='cpu') and model.load_state_dict(...)"
            )


def _is_onnx(source: str | Path) -> bool:
    return Path(source).suffix.lower() == ".onnx"


def _needed(example: ExampleInput | None) -> ExampleInput:
    if example is None:
        raise UsageError(
            "example input: expected one, as the module does not say what it takes; give a tensor (N, C, H, W)"
        )
    return example
