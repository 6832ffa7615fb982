"""The inputs that a command runs two models on: those that both take. Inputs of an ONNX file that are the same for all examples
become part of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from convrewrite import values
from convrewrite.calibration import Reading, peek_example, read_inputs
from convrewrite.cli.example_inputs import (
    Network,
    as_images,
    fitting,
    for_graph,
    given_example,
    named_shapes,
    noise,
    require_one,
    states_sizes,
)
from convrewrite.cli.known_sizes import KnownSizes, sizes_of
from convrewrite.cli.options import Sources, require_calibration
from convrewrite.errors import CalibrationError, UsageError
from convrewrite.inputs import Inputs, examples_in, parameter_names, required_names
from convrewrite.loading import find_input_shape, import_object, runs_on, stated_input_shapes
from convrewrite.onnx_files import OnnxModel
from convrewrite.onnx_graph import ExampleAxis, example_of_graph, noise_for

EXAMPLES = 8
"""Random examples that two models are compared on where nothing says how many."""


@dataclass(frozen=True, slots=True)
class Both:
    """Two models, inputs of examples that both take, and what was assumed for them. Other inputs of ONNX files are held by the
    files."""

    first: Network
    second: Network
    inputs: Inputs
    notes: tuple[str, ...]

    @property
    def batch(self) -> int | None:
        """How many examples they take at a time, where one says so; where both do, the fewest that are whole batches of both."""
        sizes = [network.batch for network in (self.first, self.second) if isinstance(network, OnnxModel)]
        known = list(filter(None, sizes))
        return math.lcm(*known) if known else None

    def whole_batches(self) -> "Both":
        """Without the examples that do not fill a batch where so many are taken at a time. Raises CalibrationError if none
        remain."""
        count, batch = examples_in(self.inputs), self.batch or 1
        left = count - count % batch
        if left == count:
            return self
        if not left:
            raise CalibrationError(
                f"calibration inputs: expected at least {batch}, as a model takes so many at a time, found {count}"
            )
        out = "input was" if count - left == 1 else "inputs were"
        note = f"the last {count - left} {out} left out: a model takes {batch} at a time"
        return replace(self, inputs=tuple(tensor[:left] for tensor in self.inputs), notes=(*self.notes, note))


def for_both(first: Network, second: Network, sources: Sources, seed: int, names: Sequence[str]) -> Both:
    """Two models with inputs that both take: the given ones, noise of a shape that one of them states or that is found by running
    one, or calibration inputs. ``names``: what the user called the two, whose reports may state the sizes of their inputs."""
    require_calibration(sources)
    known = sizes_of(*names)
    if isinstance(first, OnnxModel) and isinstance(second, OnnxModel):
        return _for_files(first, second, sources, seed, known)
    inputs, notes = _for_modules(first, second, sources, seed, known)
    if sources.data is not None:
        module = next(network for network in (first, second) if isinstance(network, nn.Module))
        inputs, told = _read(sources, inputs, seed, parameter_names(module)[: len(inputs)])
        notes = (*notes, *told)
    return Both(first, second, inputs, notes)


def _for_files(first: OnnxModel, second: OnnxModel, sources: Sources, seed: int, known: KnownSizes | None) -> Both:
    """Noise is as ``optimize`` makes it: inputs without an axis of examples stay as in the example."""
    given, calib = sources.input or (), sources.data
    axis = ExampleAxis.of(first)
    stated, notes = for_graph(first, given, calib, known, of_examples=axis.names, seed=seed)
    example, assumed = example_of_graph(first, stated)
    own, held = axis.divided(dict(zip(first.input_names, example, strict=True)))
    notes = (*notes, *assumed)
    if held:
        notes = (*notes, f"inputs without an axis of examples stay as in the example input: {', '.join(held)}")
    # The second file may have other names for its inputs: they are matched by their order.
    others = {
        other: held[name] for name, other in zip(first.input_names, second.input_names, strict=False) if name in held
    }
    both = Both(first.holding(held), second.holding(others), tuple(own.values()), notes)
    if calib is not None:
        inputs, told = _read(sources, both.inputs, seed, tuple(own))
        return replace(both, inputs=inputs, notes=(*notes, *told))
    if given:
        return both
    count = both.batch or (1 if assumed else EXAMPLES)
    shapes = {name: (count, *tensor.shape[1:]) for name, tensor in own.items()}
    return replace(both, inputs=tuple(noise_for(first, shapes, seed).values()))


def _for_modules(
    first: Network, second: Network, sources: Sources, seed: int, known: KnownSizes | None
) -> tuple[Inputs, tuple[str, ...]]:
    """Inputs of two modules, or of a module and a file, before calibration inputs are read that look like them."""
    given = sources.input or ()
    module = next(network for network in (first, second) if isinstance(network, nn.Module))
    files = [network for network in (first, second) if isinstance(network, OnnxModel)]
    if given and (not files or values.example_target(given) is not None):
        return given_example(module, given, seed), ()
    if given:
        inputs = tuple(noise_for(files[0], named_shapes(given, files[0].input_names), seed).values())
        if len(inputs) < len(files[0].input_names):
            raise UsageError(f"--input: expected shapes of all inputs ({', '.join(files[0].input_names)})")
        return inputs, ()
    shapes, notes = _common_shapes(first, second, sources.data, known)
    return _of_shapes(shapes, files, seed, module), notes


def _of_shapes(shapes: Sequence[tuple[int, ...]], files: Sequence[OnnxModel], seed: int, module: nn.Module) -> Inputs:
    """Noise in the types that a file states, or in that of the module's weights."""
    if files and len(files[0].input_names) == len(shapes):
        return tuple(noise_for(files[0], dict(zip(files[0].input_names, shapes, strict=True)), seed).values())
    return tuple(noise(shape, seed + index, module) for index, shape in enumerate(shapes))


def _common_shapes(
    first: Network, second: Network, calib: str | None, known: KnownSizes | None
) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Shapes of examples, and what was assumed: those of the calibration file, those that an ONNX file, a program or a report
    states, or those found by running the module."""
    modules = [network for network in (first, second) if isinstance(network, nn.Module)]
    files = [network for network in (first, second) if isinstance(network, OnnxModel)]
    names = files[0].input_names if files else required_names(modules[0]) or ("input",)
    if files and len(named := parameter_names(modules[0])) >= len(names):
        names = named[: len(names)]
    if calib is not None and (peeked := peek_example(calib, names)) is not None:
        return _as_stated([tuple(tensor.shape) for tensor in as_images(peeked, modules[0])], files), ()
    batch = next((file.batch for file in files if file.batch), EXAMPLES)
    for file in files:
        if states_sizes(file):
            return [(batch, *(int(n or 1) for n in shape[1:])) for shape in file.input_shapes], ()
    for module in modules:
        if stated := stated_input_shapes(module):
            return [(batch, *shape[1:]) for shape in stated], ()
    fits = known is not None and len(known.shapes) == len(names)
    if known is not None and fits and all(runs_on(module, known.shapes) for module in modules):
        return [(batch, *shape[1:]) for shape in known.shapes], (known.note,)
    require_one(names, type(modules[0]).__name__)
    shape, note = find_input_shape(modules[0])
    return [(batch, *shape[1:])], (note,)


def _as_stated(shapes: list[tuple[int, ...]], files: Sequence[OnnxModel]) -> list[tuple[int, ...]]:
    """The shapes; those of images, which have their channels first, with the axes in an ONNX file's order."""
    if not files or len(files[0].input_names) != len(shapes):
        return shapes
    named = dict(zip(files[0].input_names, shapes, strict=True))
    found = fitting(files[0], named)
    return [found.get(name, shape) for name, shape in named.items()]


def _read(sources: Sources, example: Inputs, seed: int, names: Sequence[str]) -> tuple[Inputs, list[str]]:
    """All calibration inputs, and what there is to say of how they were read."""
    how = Reading(seed=seed, mean=sources.mean, std=sources.std, resize=sources.resize)
    read = read_inputs(sources.data, example, how, import_object, names)
    return read.inputs, read.notes
