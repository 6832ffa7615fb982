"""From a torch model to one ONNX file that takes any batch size, or any size of the axes asked for, and that onnxruntime can run.

The file's inputs are called ``input`` (or ``input.0``, ``input.1``, ...), its outputs as
:func:`convrewrite.modules.named_outputs` calls them.
"""

import keyword
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import onnx
import torch
from onnx_ir.passes import PassError
from torch import Tensor, nn
from torch.export import ExportedProgram

from convrewrite.axes import BATCH, at_least_two, axes_named, by_parameters, held_within, of_another_size
from convrewrite.errors import ExportError, TraceError, UsageError
from convrewrite.escaping import innermost_cause
from convrewrite.folders import Scratch, disk_full, given_path, resolved, unwritable, write_errors
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs, examples_in, shapes_of
from convrewrite.modules import ROOT, copy_model, eval_mode, named_outputs, preserved, run
from convrewrite.names import require_names
from convrewrite.onnx_files import (
    new_name_of_weights,
    open_session,
    opset_of,
    place,
    require_opset,
    tensors,
)
from convrewrite.process import FAKE_TENSORS, exporting, ordinary, ordinary_mode, quiet
from convrewrite.runtime.bounds import BoundsOfOneKind
from convrewrite.runtime.parity import check_free_axes, wrong_for_one
from convrewrite.state import named_parameters_of, parameters_of
from convrewrite.values import free_axes as checked_axes

PROTOBUF_LIMIT = 2**31
"""Bytes one ONNX file may have; weights beyond it must be in a second file."""

GRAPH_ALLOWANCE = 2**26
"""Bytes kept free below the limit for the graph itself."""

DRAFT = "model.onnx"
"""Name of a file in the making: torch's exporter and onnx write text where another suffix, as ``.json``, seems to ask for it."""

WITHOUT_CONVOLUTION = frozenset({onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16})
"""Types of numbers for which onnxruntime has no convolution."""

NOISY_LOGGERS = (
    "torch.onnx._internal.exporter._registration",  # torchvision is not installed
    "torch.onnx._internal.exporter",
    "torch.fx.experimental.symbolic_shapes",
    "torch.export",
    "onnxscript",
    "onnx_ir",
    FAKE_TENSORS,
)


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file; ``note`` says what falls short: a fixed batch size, weights in a second file. ``batch`` is that
    size, where the file itself may not say it."""

    path: Path
    dynamic_batch: bool
    note: str | None = None
    batch: int | None = None


def export(
    model: nn.Module,
    inputs: ExampleInput,
    path: str | Path,
    *,
    opset: int | None = None,
    free_axes: str | Sequence[str] | None = None,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Exported:
    """Write the model, in eval mode, as ONNX to ``path``; its training flags stay as they are.

    ``inputs`` are example inputs, the batch as first axis of each: a tensor, a tuple of positional inputs, a dictionary by the
    names of ``forward``'s parameters, or ``(args, kwargs)``. The file takes any batch size if the model allows
    it, otherwise only that of the example, and then the note gives the reason. ``free_axes`` says instead which axes must take
    any size, ``"batch"``, ``"height"`` and ``"width"``, or that none does; the file has been run at twice the size of each,
    against the model. ``opset`` is the version of ONNX's operators; None: that of the exporter. The file has been checked with
    onnx's checker and opened in onnxruntime; it appears only when complete. ``metadata`` goes into its ``metadata_props``.

    Raises TraceError if the model does not run on the inputs or returns no tensor, ExportError if it has no ONNX form, none with
    that opset or those axes, or one for which onnxruntime lacks an operator, and if the folder of ``path`` is missing, UsageError
    if ``path`` cannot be written, for an opset that does not exist, for axes that no input has, and for metadata other than text.
    """
    require_names(model, type(model).__name__)
    if opset is not None:
        require_opset(opset)
    if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
        raise UsageError("metadata: expected texts by texts, as ONNX keeps nothing else; write numbers as text")
    path, example = given_path(path, "the path of the file to write"), bind_inputs(model, inputs)
    _require_real(model, example)
    if any(tensor.is_inference() for tensor in (*example, *parameters_of(model), *model.buffers())):
        model, example = copy_model(model), ordinary(example)  # torch exports no tensors of inference mode
    free_axes = None if free_axes is None else checked_axes(free_axes)
    free = None if free_axes is None else axes_named(example, free_axes)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder does not exist; create it first")
    place_of_file = resolved(path)
    external = _needs_external_data(model)
    notes = (
        [f"weights stand in a second file, {place_of_file.name}.*.data, as one holds at most 2 GB"] if external else []
    )
    with ExitStack() as stack:
        with write_errors(path):
            scratch = stack.enter_context(Scratch(place_of_file.parent))
            folder = scratch.path / "draft"
            folder.mkdir()
        stack.enter_context(ordinary_mode())
        stack.enter_context(preserved(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        names = _output_names(model, example)
        draft = _Draft(model, names, folder / DRAFT, place_of_file, external, opset)
        dynamic, reason = _write(draft, example) if free is None else _write_asked(draft, example, free)
        _name_weights(draft.path, place_of_file)
        _stamp(draft.path, metadata)
        _check(draft.path, model, opset)
        check_free_axes(model, draft.path, example, free_axes or ())
        with write_errors(path):
            place(draft.path.rename(folder / place_of_file.name), place_of_file)
    if reason is not None:
        notes.append(f"batch size fixed at {examples_in(example)}: {reason}")
    return Exported(path, dynamic, "; ".join([*notes, *_notes(opset, free_axes)]) or None)


def _require_real(model: nn.Module, inputs: Inputs) -> None:
    """Raise ExportError for complex inputs: torch's exporter makes pairs of numbers of them, which a model does not take."""
    if any(tensor.is_complex() for tensor in inputs):
        raise ExportError(
            f"{type(model).__name__}: no ONNX form: expected inputs of real numbers, found complex ones; put a module around the "
            "model that takes their real and imaginary parts, or do without the ONNX file (--no-onnx, in Python measure=False)"
        )


def _notes(opset: int | None, free_axes: Sequence[str] | None) -> list[str]:
    """Notes on what was asked of the file, and holds."""
    said = [] if opset is None else [f"the ONNX file has opset {opset}"]
    if free_axes is not None:
        tried = (
            f"takes any {', '.join(free_axes)}, tried at twice the size of each"
            if free_axes
            else "takes one size alone"
        )
        said.append(f"the ONNX file {tried}")
    return said


@dataclass(frozen=True, slots=True)
class _Draft:
    """What is the same in both attempts, with a dynamic and with a fixed batch."""

    model: nn.Module
    names: list[str]
    path: Path
    place: Path
    external: bool
    opset: int | None


class _FlatOutputs(nn.Module):
    """Returns a model's tensors in the order of their names, whatever container the model uses."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.model(*inputs)).values())

    def __repr__(self) -> str:
        """Not the model's own: the exporter calls it, and would fail with one that raises."""
        return type(self.model).__name__


def _has_repr(model: nn.Module) -> bool:
    try:
        repr(model)
    except Exception:
        return False
    return True


def _output_names(model: nn.Module, inputs: Inputs) -> list[str]:
    with quiet(NOISY_LOGGERS):
        return list(named_outputs(run(model, inputs)))


def _write(draft: _Draft, inputs: Inputs) -> tuple[bool, str | None]:
    """Write the draft; returns whether its batch is dynamic, and if not, why."""
    batches = {tensor.shape[0] if tensor.ndim else None for tensor in inputs}
    reason: str | None
    if len(batches) != 1 or None in batches:
        reason = f"the inputs' shapes {shapes_of(inputs)} have no common first axis"
    else:
        try:
            reason = _export_freed(draft, at_least_two(inputs), tuple({0: BATCH} for _ in inputs))
            if not _has_dynamic_batch(draft.path):
                reason = "the exported graph holds on to the batch size of the example"
            reason = reason or wrong_for_one(draft.model, draft.path, inputs)
            if reason is None:
                return True, None
        except Exception as error:
            _refuse_full_disk(draft, error)
            reason = innermost_cause(error)
    try:
        _torch_export(draft, inputs, None)
    except Exception as error:
        _refuse_full_disk(draft, error)
        raise _no_form(draft, error) from error
    return False, reason


def _no_form(draft: _Draft, error: Exception) -> ExportError:
    called = next(
        (name for name, _ in draft.model.named_modules() if any(map(keyword.iskeyword, name.split(".")))), None
    )
    if called is not None and "SyntaxError" in innermost_cause(error):
        return ExportError(
            f"{type(draft.model).__name__}: no ONNX form: torch writes the names of parts into Python source, where that of "
            f"{called} is a word of the language; rename it, or do without the ONNX file (--no-onnx, in Python measure=False)"
        )
    return ExportError(
        f"{type(draft.model).__name__}: no ONNX form: {innermost_cause(error)}; "
        "change the part of the model's forward that this names, or do without the ONNX file (--no-onnx, in Python "
        "measure=False)"
    )


def _write_asked(draft: _Draft, inputs: Inputs, free: tuple[dict[int, str], ...]) -> tuple[bool, None]:
    """Write the draft with these axes free and no others; returns whether the batch is one of them. Raises ExportError where that
    fails."""
    names, reason = list(dict.fromkeys(name for axes in free for name in axes.values())), None
    try:
        if names:
            reason = _export_freed(draft, at_least_two(inputs) if BATCH in names else inputs, free)
            if BATCH in names:
                reason = reason or wrong_for_one(draft.model, draft.path, inputs)
        else:
            _torch_export(draft, inputs, None)
    except Exception as error:
        _refuse_full_disk(draft, error)
        if not names:
            raise _no_form(draft, error) from error
        raise ExportError(
            f"{type(draft.model).__name__}: no ONNX form that takes any {', '.join(names)}: {innermost_cause(error)}; name fewer "
            "axes (--free-axes), or none"
        ) from error
    if reason is not None:
        raise ExportError(f"{type(draft.model).__name__}: --free-axes: {reason}; leave that axis out")
    graph = onnx.load(str(draft.path), load_external_data=False).graph
    held = [
        name
        for axes, entry in zip(free, graph.input, strict=True)
        for position, name in axes.items()
        if not entry.type.tensor_type.shape.dim[position].dim_param
    ]
    if held:
        raise ExportError(
            f"{type(draft.model).__name__}: the exported graph holds on to the {held[0]} of the example; leave it out "
            "(--free-axes)"
        )
    return BATCH in names, None


def _refuse_full_disk(draft: _Draft, error: Exception) -> None:
    if (reason := disk_full(error, draft.path)) is not None:
        raise unwritable(draft.place, reason) from error


def _export_freed(draft: _Draft, inputs: Inputs, free: tuple[dict[int, str], ...]) -> str | None:
    """Write the draft with these axes free; returns why it is not right at every size of them. A forward that keeps what it made
    for the last size is held to that size where torch exports it at the same, so it first sees another one."""
    with quiet(NOISY_LOGGERS), suppress(TraceError):  # a model may take no other size
        run(draft.model, of_another_size(inputs, free))
    program = _torch_export(draft, inputs, free)
    return None if program is None else held_within(program, free)


def _torch_export(draft: _Draft, inputs: Inputs, free: tuple[dict[int, str], ...] | None) -> ExportedProgram | None:
    # A model with a single plain output keeps its own parameter names in the file; others are wrapped.
    wrapped = draft.names != [ROOT] or not _has_repr(draft.model)
    model = _FlatOutputs(draft.model) if wrapped else draft.model
    write = partial(
        torch.onnx.export,
        model,
        tuple(tensor.contiguous() for tensor in inputs),  # no size is free of a view whose strides hang on it
        draft.path,
        input_names=input_names(len(inputs)),
        output_names=draft.names,
        opset_version=draft.opset,
        dynamic_shapes=None if free is None else by_parameters(model.forward, free),
        dynamo=True,
        external_data=draft.external,
        verbose=False,
    )
    with exporting(NOISY_LOGGERS), BoundsOfOneKind():
        try:
            written = write()
        except PassError:  # onnxscript's optimizer fails on some right graphs, as on that of chunks along a free axis
            written = write(optimize=False)
    return None if written is None else written.exported_program


def input_names(count: int) -> list[str]:
    """The names under which an exported file takes its inputs."""
    return ["input"] if count == 1 else [f"input.{index}" for index in range(count)]


def _name_weights(path: Path, place_of_file: Path) -> None:
    """Give the weights beside a file a name of their own, so that they never replace those of an earlier file."""
    weights = path.with_name(f"{path.name}.data")  # where torch's exporter writes them
    name = new_name_of_weights(place_of_file)
    if not weights.is_file():
        return
    file = onnx.load(str(path), load_external_data=False)
    for tensor in tensors(file):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == weights.name:
                entry.value = name
    onnx.save(file, str(path))
    weights.rename(path.with_name(name))


def _stamp(path: Path, metadata: Mapping[str, str]) -> None:
    if not metadata:
        return
    file = onnx.load(str(path), load_external_data=False)
    for key, value in metadata.items():
        file.metadata_props.add(key=key, value=value)
    onnx.save(file, str(path))


def _check(path: Path, model: nn.Module, opset: int | None) -> None:
    file = onnx.load(str(path), load_external_data=False)
    found = opset_of(file)
    if opset is not None and found != opset:
        raise ExportError(
            f"{type(model).__name__}: --opset: expected a file with opset {opset}, found that torch's exporter gives {found}; "
            "ask for that, or leave it out"
        )
    try:
        onnx.checker.check_model(str(path), full_check=True)
        open_session(path)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__}: its ONNX form cannot be used: {innermost_cause(error)}; {_advice(model, file.graph)}"
        ) from error


def _advice(model: nn.Module, graph: onnx.GraphProto) -> str:
    """What to do about a file that onnxruntime does not run."""
    without = "leave out export and measurement (--no-onnx, in Python measure=False)"
    if not WITHOUT_CONVOLUTION & _types_of(graph):
        return f"let the model compute that part with other operators, or {without}"
    tensors = (*parameters_of(model), *model.buffers())
    own = any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors)
    advice = "convert the model with model.float()" if own else "let its forward do without torch.autocast and casts"
    return f"onnxruntime has no convolution in float64 or bfloat16: {advice}, or {without}"


def _types_of(graph: onnx.GraphProto) -> set[int]:
    """The types of numbers in a graph, as far as they are known."""
    return {entry.type.tensor_type.elem_type for entry in (*graph.input, *graph.value_info, *graph.output)}


def _has_dynamic_batch(path: Path) -> bool:
    graph = onnx.load(str(path), load_external_data=False).graph
    return all(entry.type.tensor_type.shape.dim[0].dim_param for entry in graph.input)


def _needs_external_data(model: nn.Module) -> bool:
    tensors = {id(tensor): tensor for tensor in (*parameters_of(model), *model.buffers())}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return total > PROTOBUF_LIMIT - GRAPH_ALLOWANCE


def require_runtime_dtype(model: nn.Module) -> None:
    """Raise ExportError for what onnxruntime cannot run: before the long work, not after it."""
    for name, parameter in named_parameters_of(model):
        if parameter.dtype in (torch.float64, torch.bfloat16):
            raise ExportError(
                f"{type(model).__name__}: expected float32 weights, found {name} in "
                f"{str(parameter.dtype).removeprefix('torch.')}, for which "
                "onnxruntime has no convolution; convert the model with model.float(), or leave out export and "
                "measurement (--no-onnx, in Python measure=False)"
            )
