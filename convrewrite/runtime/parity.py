"""Parity: whether onnxruntime, and the target, compute what torch computes for the same model. They must, up to rounding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.axes import doubled
from convrewrite.errors import ConvRewriteError, ExportError, VerificationError
from convrewrite.escaping import one_line
from convrewrite.inputs import Inputs, in_batches_of, shapes_of
from convrewrite.meanings import NOTHING, Meaning, require_same_outputs
from convrewrite.modules import eval_mode
from convrewrite.onnx_files import OnnxModel, outputs_of
from convrewrite.runtime.latency import compiled
from convrewrite.targets import Program, Target

UNIT_SCALE = 0.05
"""Least scale that errors of probabilities are related to: onnxruntime computes a sigmoid to so many places, however small all
are."""

ANY = Meaning("values", "not told")
"""What an output is taken for where nothing is known of it."""

FLIPPED = 1e-3
"""Part of the entries of an integer or boolean output that may differ from torch's."""


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output, torch against a runtime; ``relative_error`` is max |a - b| / max |a|, both over all inputs. Of scores beside
    boxes both figures are those of the worse.

    For integers and booleans it is the share of entries that differ, in the worst batch, and ``equal_share`` that of the equal
    ones.
    """

    name: str
    max_abs_difference: float
    relative_error: float
    tolerance: float
    passed: bool
    equal_share: float | None = None
    runtime: str = "onnxruntime"


@dataclass(frozen=True, slots=True)
class Parity:
    """Every output's parity; ``inputs_checked`` counts the batches that were run."""

    outputs: tuple[OutputParity, ...]
    inputs_checked: int

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.passed for output in self.outputs)


@dataclass(slots=True)
class RunningParity:
    """The parity over batches of every output that is not ignored according to the ``meanings``, in this ``runtime``;
    ``tolerance`` replaces that of real outputs' own type, ``inputs`` are such as the model takes, as in :func:`tolerance_for`.

    Differences are related to the largest element of all batches: the only number that a regression gives for a single example
    may be almost zero, and rounding is no smaller for that. If an output has parts of different units, as scores beside boxes,
    each is related to its own largest element, and the worst part counts. What lies between 0 and 1, as probabilities do, is
    related to UNIT_SCALE at least.
    """

    runtime: str
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    tolerance: float | None = None
    inputs: Sequence[Tensor] = ()
    _found: dict[str, OutputParity] = field(default_factory=dict)
    _parts: dict[str, list["_RealPart"]] = field(default_factory=dict)
    _batches: int = 0

    def add(self, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str | None = None) -> None:
        """One batch. Raises VerificationError if names, number or shapes of the outputs differ, in a message that begins with
        ``where``; and where what is ``expected`` holds NaN, which nothing equals."""
        ignored = {name for name, meaning in self.meanings.items() if not meaning.counts}
        require_same_outputs(expected, found, where or self.runtime, ignored)
        self._batches += 1
        for name, tensor in expected.items():
            if name in ignored:
                continue
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise VerificationError(
                    f"output {name!r}: expected numbers to hold {self.runtime} to, found NaN in what the model itself gives; "
                    "give inputs that it is made for, or a model whose weights hold none"
                )
            self._found[name] = self._with(name, tensor, found[name])

    def _with(self, name: str, expected: Tensor, found: Tensor) -> OutputParity:
        """The parity of an output over this batch and those before."""
        before = self._found.get(name)
        if not expected.is_floating_point():
            now = replace(output_parity(name, expected, found), runtime=self.runtime)
            return now if before is None or now.relative_error > before.relative_error else before
        meaning = self.meanings.get(name, ANY)
        parts = self._parts[name] = _with_batch(self._parts.get(name, []), expected, found, meaning)
        tolerance = tolerance_for(expected.dtype, self.inputs) if self.tolerance is None else self.tolerance
        return replace(_worst(name, parts, tolerance), runtime=self.runtime)

    def add_arrays(
        self, expected: Mapping[str, Tensor], arrays: Sequence[Any], listed: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """One batch, whose arrays or tensors are in the order of what is ``expected``, or of the outputs that are ``listed`` in
        the file, some of them twice; returns them by name. Raises VerificationError where they are something else, as a runtime
        of another package may give."""
        if not isinstance(arrays, Sequence) or isinstance(arrays, str | bytes):
            raise VerificationError(
                f"{self.runtime}: expected a list of {len(expected)} outputs, found {type(arrays).__name__}; mend the runtime"
            )
        names = listed if listed and len(arrays) == len(listed) else tuple(expected)
        if len(arrays) != len(names):
            raise VerificationError(
                f"{self.runtime}: expected {len(expected)} outputs, found {len(arrays)}; mend the runtime, or name another"
            )
        found = {name: self._tensor(name, array) for name, array in zip(names, arrays, strict=True)}
        self.add(expected, found)
        return found

    def _tensor(self, name: str, array: Any) -> Tensor:
        try:
            return torch.as_tensor(array).detach().cpu().clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise VerificationError(
                f"{self.runtime}: output {name!r}: expected an array of numbers, found {type(array).__name__}; mend the runtime"
            ) from error

    def result(self) -> Parity:
        """The parity of every output, over what was added."""
        return Parity(tuple(self._found.values()), self._batches)


@dataclass(slots=True)
class _RealPart:
    """Real numbers of one unit: their largest difference, and the largest of what was expected."""

    scale: float
    difference: float = 0.0

    @property
    def relative(self) -> float:
        return self.difference / self.scale

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.scale = max(self.scale, _scale_of(expected))
        self.difference = max(self.difference, _largest_difference(expected, found))


def tolerance_for(dtype: torch.dtype, inputs: Sequence[Tensor] = ()) -> float:
    """The largest relative error that rounding explains, of an output relative to its largest element.

    onnxruntime sums in another order and folds BatchNorm into weights, so every layer adds a few units of rounding, in
    sums of thousands of terms: 2**12 units cover deep networks (5e-4 in float32, where up to 2e-4 was met on correct
    exports of 100 layers, and a wrong weight or attribute shows as 1e-2 and more). For float64 the bound is a round
    1e-9, as scalar functions are approximated there; it does not hold where none of the ``inputs`` is in float64, as the outputs
    were only converted to it then; for half precision 2e-2, since the runtime may keep float32
    between layers while torch rounds each. Integers and booleans must be equal except for one entry in a thousand: where they
    come from comparing real numbers, as the largest class of each pixel does, rounding decides a tie.
    """
    if not dtype.is_floating_point:
        return FLIPPED
    if dtype == torch.float64 and (not inputs or any(tensor.dtype == torch.float64 for tensor in inputs)):
        return 1e-9
    if dtype in (torch.float32, torch.float64):
        return 2.0**12 * torch.finfo(torch.float32).eps
    return 2e-2


def check_parity(
    model: nn.Module,
    onnx: Path | OnnxModel,
    inputs: Inputs,
    *,
    batch: int | None = None,
    meanings: Mapping[str, Meaning] = NOTHING,
    free: Sequence[str] = (),
) -> Parity:
    """Run torch and onnxruntime on the same inputs and compare every output that is not ignored.

    A file with a dynamic batch is run at a second batch size as well: 1, or 2 where the inputs hold one example; one with further
    ``free`` axes, by their names, also at twice the size of each. A
    file with a fixed batch, or one that is known to take only ``batch`` examples, is run on as many of ``inputs`` at a time.

    ``meanings`` are those of the outputs, as in :class:`RunningParity`.

    Raises VerificationError if names, number or shapes of the outputs differ.
    """
    runtime = onnx if isinstance(onnx, OnnxModel) else OnnxModel(onnx)
    running = RunningParity("onnxruntime", meanings, inputs=inputs)
    batches = _parity_batches(inputs, batch or runtime.batch)
    with eval_mode(model):
        for given in (*batches, *(doubled(batches[0], name) for name in free)):
            expected, _ = outputs_of(model, given)
            found, _ = outputs_of(runtime, given)
            running.add(expected, found, runtime.where)
    return running.result()


def wrong_for_one(model: nn.Module, path: Path, inputs: Inputs) -> str | None:
    """Why a file that takes any batch computes something else than its model for a single example, None if it does not: torch may
    take a batch for fixed that a forward computes in a roundabout way. Integers are left to :func:`check_parity`, as rounding
    decides ties, and so is what the model itself does not take, or answers with NaN."""
    one = tuple((tensor[:1] if tensor.ndim else tensor).clone() for tensor in inputs)
    try:
        with eval_mode(model):
            expected, _ = outputs_of(model, one)
    except Exception:  # a model may raise anything
        return None
    real = {name: tensor for name, tensor in expected.items() if tensor.is_floating_point()}
    if any(bool(tensor.isnan().any()) for tensor in real.values()):
        return None
    running, file = RunningParity("onnxruntime", inputs=inputs), OnnxModel(path)
    try:
        found, _ = outputs_of(file, one)
        running.add(real, {name: tensor for name, tensor in found.items() if name in real})
    except ConvRewriteError:
        return "the exported graph does not run for one example"
    wrong = [output.name for output in running.result().outputs if not output.passed]
    return f"the exported graph computes another {wrong[0]} for one example" if wrong else None


def check_free_axes(model: nn.Module, path: Path, inputs: Inputs, names: Sequence[str]) -> None:
    """Run model and file at twice the size along every axis of these names. Raises ExportError where one of them does not run so,
    or where they do not compute the same."""
    if not names:
        return
    where, file = type(model).__name__, OnnxModel(path)
    file.where = "the ONNX file"  # which has no place yet
    for name in names:
        running, given = RunningParity("onnxruntime", inputs=inputs), doubled(inputs, name)
        try:
            with eval_mode(model):
                expected, _ = outputs_of(model, given)
        except Exception as error:  # a model may raise anything
            raise ExportError(
                f"{where}: --free-axes: does not run itself at another {name}, on inputs of {shapes_of(given)}: "
                f"{one_line(error, 200)}; leave {name} out"
            ) from error
        try:
            running.add(expected, outputs_of(file, given)[0], file.where)
            require_parity(running.result())
        except ConvRewriteError as error:
            raise ExportError(f"{where}: --free-axes: at another {name}: {error}; leave {name} out") from error


def check_target(
    expected: Mapping[str, Tensor],
    program: Program,
    inputs: Inputs,
    target: Target,
    *,
    threads: int = 1,
    meanings: Mapping[str, Meaning] = NOTHING,
    listed: Sequence[str] = (),
) -> tuple[OutputParity, ...]:
    """A program run by a target, against the outputs that are ``expected`` on the same inputs, in their order, or in that of
    those that its file has ``listed``; the rest is as in :func:`check_parity`. Raises VerificationError where the target cannot
    run it, or gives other outputs in number or shape."""
    with eval_mode(program.module), target.at_work(threads):
        arrays = compiled(program, inputs, target, threads)()
    running = RunningParity(target.name, meanings, inputs=inputs)
    running.add_arrays(expected, arrays, listed)
    return running.result().outputs


def require_parity(parity: Parity) -> None:
    """Raise VerificationError, naming the worst output, unless every output is within its tolerance."""
    failed = [output for output in parity.outputs if not output.passed]
    if failed:
        worst = max(failed, key=lambda output: output.relative_error)
        raise VerificationError(
            f"output {worst.name!r}: expected {worst.runtime} within {worst.tolerance:.1e} of torch (relative), found "
            f"{worst.relative_error:.3g} (largest difference {worst.max_abs_difference:.3g}); "
            f"{'the ONNX file' if worst.runtime == 'onnxruntime' else 'the result there'} does not compute what the model does, "
            "do not deploy it (if it is meant to approximate another model, compare them with --expect fidelity)"
        )


def output_parity(
    name: str, expected: Tensor, found: Tensor, meaning: Meaning = ANY, inputs: Sequence[Tensor] = ()
) -> OutputParity:
    """One output of torch against the same one of onnxruntime; ``inputs`` are as in :func:`tolerance_for`."""
    if not expected.is_floating_point():
        return _discrete_parity(name, expected.detach().cpu(), found)
    return _worst(name, _with_batch([], expected, found, meaning), tolerance_for(expected.dtype, inputs))


def _with_batch(parts: list[_RealPart], expected: Tensor, found: Tensor, meaning: Meaning) -> list[_RealPart]:
    """The parts of a real output with one more batch, in place."""
    wanted, given = meaning.parts(expected), meaning.parts(found)
    for index in range(len(parts), len(wanted)):
        bounded = (
            meaning.kind in ("probabilities", "multilabel") or index > 0
        )  # behind the large numbers come the shares
        parts.append(_RealPart(UNIT_SCALE if bounded else torch.finfo(torch.float32).tiny))
    for part, one, other in zip(parts, wanted, given, strict=False):  # a batch of another size may be in one part
        part.add(one, other)
    return parts


def _worst(name: str, parts: Sequence[_RealPart], tolerance: float) -> OutputParity:
    worst = max(parts, key=lambda part: part.relative)
    return OutputParity(name, worst.difference, worst.relative, tolerance, worst.relative <= tolerance)


def _largest_difference(expected: Tensor, found: Tensor) -> float:
    a, b = expected.detach().cpu().double(), found.double()
    # Equal infinities are equal, though their difference is not a number; a NaN equals nothing, not even itself.
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def _scale_of(expected: Tensor) -> float:
    """The largest finite element of a real output, or the least positive number where there is none."""
    finite = expected.detach()[expected.isfinite()].abs()
    return max(float(finite.max()) if finite.numel() else 0.0, torch.finfo(torch.float32).tiny)


def _discrete_parity(name: str, expected: Tensor, found: Tensor) -> OutputParity:
    differ = expected != found
    largest = float((expected.double() - found.double()).abs().max()) if expected.numel() else 0.0
    share = float(differ.double().mean()) if expected.numel() else 0.0
    return OutputParity(name, largest, share, FLIPPED, share <= FLIPPED, 1 - share)


def _parity_batches(inputs: Inputs, fixed: int | None) -> list[Inputs]:
    if fixed is not None:
        return list(in_batches_of((inputs,), fixed)) or [inputs]
    if inputs[0].shape[0] == 1:
        return [inputs, tuple(torch.cat([x, x]) for x in inputs)]
    return [inputs, tuple(x[:1] for x in inputs)]
