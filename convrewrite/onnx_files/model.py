"""An ONNX file as a callable, so that it can be run on inputs like a module."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from convrewrite.errors import ConvRewriteError, ModelLoadError, UsageError, VerificationError
from convrewrite.escaping import one_line
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs, seed_of
from convrewrite.modules import left_out, named_outputs, run
from convrewrite.onnx_files.contents import require_self_contained, without_shape
from convrewrite.onnx_files.probing import require_well_behaved
from convrewrite.onnx_files.running import PATIENCE, run_within
from convrewrite.onnx_files.sessions import open_session
from convrewrite.process import same_random_numbers
from convrewrite.values import PROBE_SECONDS

Runner = Callable[..., object]
"""A model, an OnnxModel, or anything else that maps input tensors to outputs."""

ELEMENT_TYPES = {
    torch.float32: "tensor(float)", torch.float64: "tensor(double)", torch.float16: "tensor(float16)",
    torch.int64: "tensor(int64)", torch.int32: "tensor(int32)", torch.int16: "tensor(int16)",
    torch.int8: "tensor(int8)", torch.uint8: "tensor(uint8)", torch.bool: "tensor(bool)",
}  # fmt: skip


class OnnxModel:
    """An ONNX file, or its bytes, as a callable from tensors to ``name -> tensor``, run by onnxruntime on the CPU."""

    def __init__(
        self,
        source: Path | bytes,
        *,
        threads: int = 1,
        probe: float | None = None,
        trust: bool = False,
        folder: Path | None = None,
        held: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Open the model; raises VerificationError if onnxruntime cannot. Unless the file is trusted, ModelLoadError for
        operators of a library and for weights outside of its folder.

        ``probe`` is for a file from elsewhere: seconds within which it must open, and run once on its first inputs, in a
        process of its own, before it is used here. ModelLoadError if it does not. ``folder``: where the files lie that a model
        given as bytes names. ``held`` are inputs that every run gets, and that callers do not give.
        """
        if isinstance(source, Path) and not trust:
            require_self_contained(source)
        self.where = str(source) if isinstance(source, Path) else "ONNX model"
        self._elsewhere = source if isinstance(source, Path) and probe is not None else None
        self._untried = self._elsewhere
        self._probe = probe or PROBE_SECONDS
        self._misfit: type[ConvRewriteError] = VerificationError if probe is None else UsageError
        if self._untried is not None:
            require_well_behaved(self._untried, self._probe)
        try:
            self._session = open_session(source, threads, folder)
            self.output_names: tuple[str, ...] = tuple(entry.name for entry in self._session.get_outputs())
            metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # onnxruntime's own exceptions share no public base class; text may be no UTF-8
            raise VerificationError(f"{self.where}: onnxruntime cannot open it: {one_line(error)}") from error
        self.metadata: dict[str, str] = metadata
        scalars = {entry.name for entry in self._session.get_inputs() if not entry.shape}
        self._without_shape = scalars & without_shape(source) if scalars else scalars
        self._hold(held)

    def _hold(self, held: Mapping[str, Tensor]) -> None:
        entries = self._session.get_inputs()
        free = [entry for entry in entries if entry.name not in held]
        self.held = {entry.name: held[entry.name] for entry in entries if entry.name in held}
        self.input_names: tuple[str, ...] = tuple(entry.name for entry in free)
        self.input_shapes: tuple[tuple[int | str | None, ...], ...] = tuple(tuple(entry.shape) for entry in free)
        self.input_types: tuple[str, ...] = tuple(entry.type for entry in free)
        # onnxruntime reports these as it reports single numbers.
        self.unranked = self._without_shape & set(self.input_names)

    def holding(self, held: Mapping[str, Tensor]) -> "OnnxModel":
        """The same file, which gets these inputs at every run. Where the first run of a file is tried out beforehand, so is its
        next one."""
        other = copy(self)
        other._untried = self._elsewhere
        other._hold(held)
        return other

    def feed(self, inputs: Inputs) -> Inputs:
        """``inputs`` and those that are held, in the order of the file."""
        own = dict(zip(self.input_names, inputs, strict=True))
        return tuple((own | self.held)[entry.name] for entry in self._session.get_inputs())

    def in_parts(self, inputs: Inputs) -> dict[str, Tensor]:
        """As a call, but with as many examples at a time as the file's fixed batch has. Raises VerificationError for outputs that
        have no axis of examples along which to join them."""
        batch, count = self.batch, len(inputs[0]) if inputs and inputs[0].ndim else 0
        # An input that does not have one row for each example is the same for all of them.
        of_examples = all(tensor.ndim and len(tensor) == count for tensor in inputs)
        if batch is None or not of_examples or batch >= count or count % batch:
            return self(*inputs)
        parts = [self(*(tensor[start : start + batch] for tensor in inputs)) for start in range(0, count, batch)]
        shared = {name: tensor for name, tensor in parts[0].items() if _is_shared(name, parts, batch)}
        if alone := [name for name, tensor in parts[0].items() if not tensor.ndim and name not in shared]:
            raise VerificationError(
                f"{self.where}: expected outputs of {batch} examples each, found that {', '.join(alone)} is one number for all; "
                "give so many inputs"
            )
        return {
            name: shared[name] if name in shared else torch.cat([part[name] for part in parts]) for name in parts[0]
        }

    @property
    def batch(self) -> int | None:
        """The batch size the model is fixed at, also by an input that it holds, one of whose axes has the name of that of
        examples; None if it takes any."""
        sizes = [shape[0] for shape in self.input_shapes if shape]
        free = {size for size in sizes if isinstance(size, str)}
        for entry in self._session.get_inputs():
            if entry.name in self.held:
                stated = zip(entry.shape, self.held[entry.name].shape, strict=False)
                sizes += [size for axis, size in stated if axis in free]
        return next((size for size in sizes if isinstance(size, int)), None)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the model; raises VerificationError (UsageError for a file from elsewhere) if number, shapes or types of the
        inputs do not fit, ModelLoadError if it cannot be run on them or gives something else than tensors."""
        self._check_inputs(inputs)
        if self._untried is not None:
            require_well_behaved(self._untried, self._probe, self.feed(inputs), source=self.where)
            self._untried = None
        feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(self.input_names, inputs, strict=True)}
        try:
            feed |= {name: tensor.numpy() for name, tensor in self.held.items()}
            arrays = run_within(self._session, None, feed, PATIENCE * self._probe, self.where)
        except ModelLoadError:
            raise
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            raise ModelLoadError(
                f"{self.where}: onnxruntime cannot run it on these inputs: {one_line(error, 300)}"
            ) from error
        return {name: self._tensor(name, array) for name, array in zip(self.output_names, arrays, strict=True)}

    def _tensor(self, name: str, array: object) -> Tensor:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiubc":
            found = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ModelLoadError(
                f"{self.where}: expected tensors of numbers as outputs, found that {name!r} is {found}; "
                "leave that output out"
            )
        return torch.as_tensor(array.view(array.dtype.name))  # numpy has two types of one name, torch knows one

    def _check_inputs(self, inputs: Inputs) -> None:
        if len(inputs) != len(self.input_names):
            expected = ", ".join(self.input_names)
            raise self._misfit(
                f"{self.where}: expected {len(self.input_names)} inputs ({expected}), found {len(inputs)}"
            )
        for name, shape, kind, tensor in zip(
            self.input_names, self.input_shapes, self.input_types, inputs, strict=True
        ):
            found = tuple(tensor.shape)
            alike = len(found) == len(shape) and all(
                not isinstance(want, int) or want == have for want, have in zip(shape, found, strict=True)
            )
            if not alike and name not in self.unranked:
                shapes = f"expected shape {_text(shape)}, found {_text(found)}"
                raise self._misfit(f"{self.where}: input {name!r}: {shapes}")
            if ELEMENT_TYPES.get(tensor.dtype) != kind:
                raise self._misfit(f"{self.where}: input {name!r}: expected {kind}, found {tensor.dtype}")


def _is_shared(name: str, parts: Sequence[Mapping[str, Tensor]], batch: int) -> bool:
    """Whether an output has no axis of examples and is the same in all parts, as anchors are."""
    first = parts[0][name]
    return first.shape[:1] != (batch,) and all(torch.equal(part[name], first) for part in parts)


class _Models(nn.Module):
    """Stands for models that take any tensors by position; what they are given is checked when they run."""

    def forward(self, *inputs: Tensor) -> None:
        pass


def inputs_of(runners: Sequence[Runner], inputs: ExampleInput) -> Inputs:
    """Inputs in the order in which models take them: by the names of a module's forward, and where none is a module by those of
    a file's inputs. Raises UsageError."""
    module = next((runner for runner in runners if isinstance(runner, nn.Module)), None)
    if module is not None or not isinstance(inputs, Mapping):
        return bind_inputs(_Models() if module is None else module, inputs)
    names = next((runner.input_names for runner in runners if isinstance(runner, OnnxModel)), ())
    if sorted(names) != sorted(map(str, inputs)):
        raise UsageError(
            f"example input: expected a tensor for every input of the file by its name ({', '.join(names) or 'no file'}), found "
            f"{', '.join(map(str, inputs)) or 'none'}"
        )
    return bind_inputs(_Models(), tuple(inputs[name] for name in names))


def outputs_of(runner: Runner, inputs: Inputs) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors a model gives, and what else it gives. Raises TraceError where a module does not run on these inputs."""
    if isinstance(runner, OnnxModel):
        return runner.in_parts(inputs), ()
    if isinstance(runner, nn.Module):
        output = run(runner, inputs)
        return named_outputs(output), left_out(output)
    with torch.no_grad(), same_random_numbers(seed_of(inputs)):
        # A model may work in place on what it is given, and the next runner needs the same inputs.
        output = runner(*(tensor.clone() for tensor in inputs))
        return named_outputs(output), left_out(output)


def _text(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
