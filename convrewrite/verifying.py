"""Parity and fidelity, measured.

*Parity* asks whether onnxruntime computes what torch computes for one and the same model: it must, up to rounding.
*Fidelity* asks how near a rewritten model's outputs are to the original's: an approximation, judged by the caller.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convrewrite.errors import ConvRewriteError, ModelLoadError, UsageError, VerificationError
from convrewrite.fidelity import Comparison, Fidelity, require_same_outputs
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs
from convrewrite.meanings import Meaning, WantedOutputs, asked_meanings, followed, read
from convrewrite.onnx_files import require_self_contained
from convrewrite.origins import Origin
from convrewrite.outputs import eval_mode, left_out, named_outputs
from convrewrite.probing import SECONDS, require_well_behaved
from convrewrite.process import ordinary_mode
from convrewrite.provenance import Provenance
from convrewrite.sessions import open_session
from convrewrite.state import preserved

Runner = Callable[..., object]
"""A model, an OnnxModel, or anything else that maps input tensors to outputs."""

FLIPPED = 1e-3
"""The part of the entries of an integer or boolean output that may differ from torch's."""

ELEMENT_TYPES = {
    torch.float32: "tensor(float)", torch.float64: "tensor(double)", torch.float16: "tensor(float16)",
    torch.int64: "tensor(int64)", torch.int32: "tensor(int32)", torch.int16: "tensor(int16)",
    torch.int8: "tensor(int8)", torch.uint8: "tensor(uint8)", torch.bool: "tensor(bool)",
}  # fmt: skip


class OnnxModel:
    """An ONNX file, or its bytes, as a callable from tensors to ``name -> tensor``, run by onnxruntime on the CPU."""

    def __init__(
        self, source: Path | bytes, *, threads: int = 1, probe: float | None = None, trust: bool = False
    ) -> None:
        """Open the model; raises VerificationError if onnxruntime cannot. Unless the file is trusted, ModelLoadError for
        operators of a library and for weights outside of its folder.

        ``probe`` is for a file from elsewhere: seconds within which it must open, and run once on its first inputs, in a
        process of its own, before it is used here. ModelLoadError if it does not.
        """
        if isinstance(source, Path) and not trust:
            require_self_contained(source)
        self._where = str(source) if isinstance(source, Path) else "ONNX model"
        self._untried = source if isinstance(source, Path) and probe is not None else None
        self._probe = probe or SECONDS
        self._misfit: type[ConvRewriteError] = VerificationError if probe is None else UsageError
        if self._untried is not None:
            require_well_behaved(self._untried, self._probe)
        try:
            self._session = open_session(source, threads)
            entries, outputs = self._session.get_inputs(), self._session.get_outputs()
            names = tuple(entry.name for entry in entries), tuple(entry.name for entry in outputs)
            metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # onnxruntime's own exceptions share no public base class; text may be no UTF-8
            cause = " ".join(str(error).split())
            raise VerificationError(f"{self._where}: onnxruntime cannot open it: {cause}") from error
        self.input_names: tuple[str, ...] = names[0]
        self.output_names: tuple[str, ...] = names[1]
        self.metadata: dict[str, str] = metadata
        self.input_shapes: tuple[tuple[int | str | None, ...], ...] = tuple(tuple(entry.shape) for entry in entries)
        self._types: tuple[str, ...] = tuple(entry.type for entry in entries)

    @property
    def batch(self) -> int | None:
        """The batch size the model is fixed at; None if it takes any."""
        sizes = [shape[0] for shape in self.input_shapes if shape]
        return next((size for size in sizes if isinstance(size, int)), None)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the model; raises VerificationError (UsageError of a file from elsewhere) if number, shapes or types of the
        inputs do not fit, ModelLoadError if it cannot be run on them or gives something else than tensors."""
        self._check_inputs(inputs)
        if self._untried is not None:
            require_well_behaved(self._untried, self._probe, inputs)
            self._untried = None
        feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(self.input_names, inputs, strict=True)}
        try:
            arrays = self._session.run(None, feed)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            cause = " ".join(str(error).split())[:300]
            raise ModelLoadError(f"{self._where}: onnxruntime cannot run it on these inputs: {cause}") from error
        return {name: self._tensor(name, array) for name, array in zip(self.output_names, arrays, strict=True)}

    def _tensor(self, name: str, array: object) -> Tensor:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiubc":
            found = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ModelLoadError(
                f"{self._where}: expected tensors of numbers as outputs, found that {name!r} is {found}; "
                "leave that output out"
            )
        return torch.as_tensor(array)

    def _check_inputs(self, inputs: Inputs) -> None:
        if len(inputs) != len(self.input_names):
            expected = ", ".join(self.input_names)
            raise self._misfit(
                f"{self._where}: expected {len(self.input_names)} inputs ({expected}), found {len(inputs)}"
            )
        for name, shape, kind, tensor in zip(self.input_names, self.input_shapes, self._types, inputs, strict=True):
            found = tuple(tensor.shape)
            fits = len(found) == len(shape) and all(
                not isinstance(want, int) or want == have for want, have in zip(shape, found, strict=True)
            )
            if not fits:
                shapes = f"expected shape {_text(shape)}, found {_text(found)}"
                raise self._misfit(f"{self._where}: input {name!r}: {shapes}")
            if ELEMENT_TYPES.get(tensor.dtype) != kind:
                raise self._misfit(f"{self._where}: input {name!r}: expected {kind}, found {tensor.dtype}")


@dataclass(frozen=True, slots=True)
class OutputParity:
    """One output, torch against onnxruntime, the worst over all inputs; ``relative_error`` is max |a - b| / max |a|.

    Of integers and booleans it is the share of entries that differ, and ``equal_share`` that of the equal ones.
    """

    name: str
    max_abs_difference: float
    relative_error: float
    tolerance: float
    passed: bool
    equal_share: float | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """Every output's parity; ``inputs_checked`` counts the batches that were run."""

    outputs: tuple[OutputParity, ...]
    inputs_checked: int

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(output.passed for output in self.outputs)


def tolerance_for(dtype: torch.dtype) -> float:
    """The largest relative error that rounding explains, of an output relative to its largest element.

    onnxruntime sums in another order and folds BatchNorm into weights, so every layer adds a few units of rounding, in
    sums of thousands of terms: 2**12 units cover deep networks (5e-4 in float32, where up to 2e-4 was met on correct
    exports of 100 layers, and a wrong weight or attribute shows as 1e-2 and more). For float64 the bound is a round
    1e-9, as scalar functions are approximated there; for half precision 2e-2, since the runtime may keep float32
    between layers while torch rounds each. Integers and booleans must be equal but for one entry in a thousand: where they
    come from comparing real numbers, as the largest class of each pixel does, rounding decides a tie.
    """
    if not dtype.is_floating_point:
        return FLIPPED
    if dtype == torch.float64:
        return 1e-9
    if dtype == torch.float32:
        return 2.0**12 * torch.finfo(torch.float32).eps
    return 2e-2


def check_parity(
    model: nn.Module, onnx_path: Path, inputs: Inputs, *, threads: int = 1, ignored: Collection[str] = ()
) -> Parity:
    """Run torch and onnxruntime on the same inputs and compare every output that is not ``ignored``.

    A file with a dynamic batch is run at a second batch size as well: 1, or 2 where the inputs hold one example. A
    file with a fixed batch is run on the first examples of ``inputs``, as many as it takes.

    Raises VerificationError if names, number or shapes of the outputs differ.
    """
    runtime = OnnxModel(onnx_path, threads=threads)
    worst: dict[str, OutputParity] = {}
    batches = _parity_batches(inputs, runtime.batch)
    with eval_mode(model):
        for batch in batches:
            expected, _ = _run(model, batch)
            found, _ = _run(runtime, batch)
            require_same_outputs(expected, found, str(onnx_path), ignored)
            for name, tensor in expected.items():
                if name in ignored:
                    continue
                parity = _output_parity(name, tensor, found[name])
                if name not in worst or not parity.relative_error <= worst[name].relative_error:
                    worst[name] = parity
    return Parity(tuple(worst.values()), len(batches))


def require_parity(parity: Parity) -> None:
    """Raise VerificationError, naming the worst output, unless every output is within its tolerance."""
    failed = [output for output in parity.outputs if not output.passed]
    if failed:
        worst = max(failed, key=lambda output: output.relative_error)
        raise VerificationError(
            f"output {worst.name!r}: expected onnxruntime within {worst.tolerance:.1e} of torch (relative), found "
            f"{worst.relative_error:.3g} (largest difference {worst.max_abs_difference:.3g}); "
            "the ONNX file does not compute what the model does, do not deploy it (if it is meant to approximate another "
            "model, compare them with --expect fidelity)"
        )


def measure_fidelity(
    original: Runner, rewritten: Runner, batches: Iterable[Inputs], meanings: Mapping[str, Meaning] | None = None
) -> Fidelity:
    """Run both on every batch and compare their outputs by name; sums are kept in float64, tensors are not kept.

    ``meanings`` of the outputs; None: they are told from the original and the first batch. A value that is not a number
    counts as an infinite error. Raises VerificationError if the outputs differ in names or shapes, or if there is no batch.
    """
    comparison: Comparison | None = None
    others: dict[str, None] = {}
    examples = 0
    with eval_mode(original, rewritten):
        for batch in batches:
            expected, skipped = _run(original, batch)
            found, _ = _run(rewritten, batch)
            if comparison is None:
                known = meanings or read(expected, {}, origins=_origins(original, batch), representative=True)
                comparison = Comparison(known)
            comparison.add(expected, found)
            others |= dict.fromkeys(skipped)
            examples += batch[0].shape[0]
    if comparison is None:
        raise VerificationError("fidelity: expected at least one batch of inputs, found none")
    return Fidelity(comparison.outputs(), examples, tuple(others), comparison.meanings)


@dataclass(frozen=True, slots=True)
class Verification:
    """Two models side by side on the same inputs: are they the same up to rounding, and how near are they?"""

    parity: Parity
    fidelity: Fidelity


def verify(
    a: Runner | str | Path,
    b: Runner | str | Path,
    inputs: ExampleInput,
    *,
    outputs: WantedOutputs | None = None,
    representative: bool = True,
) -> Verification:
    """Compare any two models, each a module or the path of an ONNX file; ``a`` counts as the original.

    ``inputs`` are a tensor or a tuple of positional inputs; keyword inputs are bound by the forward of a module among the two.
    ``outputs``: what outputs mean, as in :func:`convrewrite.optimize`, where it is not as they look on the inputs; whose looks
    are believed where these are ``representative``, and no noise.

    Nothing is required: :func:`require_parity` raises where the two must be the same. Raises VerificationError if the
    outputs differ in names, number or shapes, UsageError for outputs that cannot be what they are said to be.
    """
    runner_a, runner_b = (OnnxModel(Path(x), probe=SECONDS) if isinstance(x, str | Path) else x for x in (a, b))
    batch = bind_inputs(next((x for x in (runner_a, runner_b) if isinstance(x, nn.Module)), nn.Identity()), inputs)
    with ordinary_mode(), preserved(runner_a, runner_b), eval_mode(runner_a, runner_b):
        (expected, skipped), (found, _) = _run(runner_a, batch), _run(runner_b, batch)
        origins = _origins(runner_a, batch) or _origins(runner_b, batch)
    if len(expected) == len(found):  # another exporter may have given the outputs other names
        found = dict(zip(expected, found.values(), strict=True))
        origins = origins if origins.keys() <= expected.keys() else {}
    meanings = read(
        expected, asked_meanings(outputs), known=_written(runner_a, expected) | _written(runner_b, expected), origins=origins,
        input_sizes={tuple(tensor.shape[1:]) for tensor in batch}, representative=representative,
    )  # fmt: skip
    comparison = Comparison(meanings, "the second model")
    comparison.add(expected, found)
    compared = [name for name, meaning in meanings.items() if meaning.counts]
    parity = Parity(tuple(_output_parity(name, expected[name], found[name]) for name in compared), 1)
    return Verification(parity, Fidelity(comparison.outputs(), batch[0].shape[0], skipped, meanings))


def _written(runner: Runner, outputs: Mapping[str, Tensor]) -> dict[str, Meaning]:
    """What a rewritten ONNX file says of its outputs."""
    found = Provenance.of(runner.metadata) if isinstance(runner, OnnxModel) else None
    return {} if found is None else {name: known for name, known in found.outputs.items() if name in outputs}


def _origins(runner: Runner, batch: Inputs) -> dict[str, Origin]:
    return followed(runner, batch)[1] if isinstance(runner, nn.Module) else {}


def _run(runner: Runner, inputs: Inputs) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors a model gives, and what else it gives."""
    if isinstance(runner, OnnxModel):
        return runner(*inputs), ()
    with torch.inference_mode():
        # A model may work in place on what it is given, and the next runner needs the same inputs.
        output = runner(*(tensor.clone() for tensor in inputs))
        return named_outputs(output), left_out(output)


def _output_parity(name: str, expected: Tensor, found: Tensor) -> OutputParity:
    if not expected.is_floating_point():
        return _discrete_parity(name, expected.detach().cpu(), found)
    tolerance = tolerance_for(expected.dtype)
    a, b = expected.detach().cpu().double(), found.double()
    # Equal infinities are equal, though their difference is not a number; a NaN equals nothing, not even itself.
    difference = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    largest = float(difference.max()) if difference.numel() else 0.0
    finite = a[a.isfinite()].abs()
    scale = max(float(finite.max()) if finite.numel() else 0.0, torch.finfo(torch.float32).tiny)
    relative = largest / scale
    return OutputParity(name, largest, relative, tolerance, relative <= tolerance)


def _discrete_parity(name: str, expected: Tensor, found: Tensor) -> OutputParity:
    differ = expected != found
    largest = float((expected.double() - found.double()).abs().max()) if expected.numel() else 0.0
    share = float(differ.double().mean()) if expected.numel() else 0.0
    return OutputParity(name, largest, share, FLIPPED, share <= FLIPPED, 1 - share)


def _parity_batches(inputs: Inputs, fixed: int | None) -> list[Inputs]:
    if fixed is not None:
        return [inputs if any(x.shape[:1] < (fixed,) for x in inputs) else tuple(x[:fixed] for x in inputs)]
    if inputs[0].shape[0] == 1:
        return [inputs, tuple(torch.cat([x, x]) for x in inputs)]
    return [inputs, tuple(x[:1] for x in inputs)]


def _text(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
