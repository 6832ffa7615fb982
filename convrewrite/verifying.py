"""Parity and fidelity, measured.

*Parity* asks whether onnxruntime computes what torch computes for one and the same model: it must, up to rounding.
*Fidelity* asks how near a rewritten model's outputs are to the original's: an approximation, judged by the caller.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from convrewrite.errors import VerificationError
from convrewrite.inputs import ExampleInput, Inputs, bind_inputs
from convrewrite.latency import open_session
from convrewrite.onnx_files import require_harmless
from convrewrite.outputs import eval_mode, left_out, named_outputs

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

    def __init__(self, source: Path | bytes, *, threads: int = 1, trust: bool = False) -> None:
        """Open the model; raises VerificationError if onnxruntime cannot. Unless the file is trusted, ModelLoadError for
        operators of a library and for weights outside of its folder."""
        if isinstance(source, Path) and not trust:
            require_harmless(source)
        self._where = str(source) if isinstance(source, Path) else "ONNX model"
        try:
            self._session = open_session(source, threads)
        except Exception as error:  # onnxruntime's own exceptions share no public base class
            cause = " ".join(str(error).split())
            raise VerificationError(f"{self._where}: onnxruntime cannot open it: {cause}") from error
        entries = self._session.get_inputs()
        self.input_names: tuple[str, ...] = tuple(entry.name for entry in entries)
        self.output_names: tuple[str, ...] = tuple(entry.name for entry in self._session.get_outputs())
        self.input_shapes: tuple[tuple[int | str | None, ...], ...] = tuple(tuple(entry.shape) for entry in entries)
        self._types: tuple[str, ...] = tuple(entry.type for entry in entries)

    @property
    def batch(self) -> int | None:
        """The batch size the model is fixed at; None if it takes any."""
        sizes = [shape[0] for shape in self.input_shapes if shape]
        return next((size for size in sizes if isinstance(size, int)), None)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the model; raises VerificationError if number, shapes or types of the inputs do not fit."""
        self._check_inputs(inputs)
        feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(self.input_names, inputs, strict=True)}
        arrays = self._session.run(None, feed)
        return {name: torch.as_tensor(array) for name, array in zip(self.output_names, arrays, strict=True)}

    def _check_inputs(self, inputs: Inputs) -> None:
        if len(inputs) != len(self.input_names):
            expected = ", ".join(self.input_names)
            raise VerificationError(
                f"{self._where}: expected {len(self.input_names)} inputs ({expected}), found {len(inputs)}"
            )
        for name, shape, kind, tensor in zip(self.input_names, self.input_shapes, self._types, inputs, strict=True):
            found = tuple(tensor.shape)
            fits = len(found) == len(shape) and all(
                not isinstance(want, int) or want == have for want, have in zip(shape, found, strict=True)
            )
            if not fits:
                shapes = f"expected shape {_text(shape)}, found {_text(found)}"
                raise VerificationError(f"{self._where}: input {name!r}: {shapes}")
            if ELEMENT_TYPES.get(tensor.dtype) != kind:
                raise VerificationError(f"{self._where}: input {name!r}: expected {kind}, found {tensor.dtype}")


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


def check_parity(model: nn.Module, onnx_path: Path, inputs: Inputs, *, threads: int = 1) -> Parity:
    """Run torch and onnxruntime on the same inputs and compare every output.

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
            _require_same_outputs(expected, found, str(onnx_path))
            for name, tensor in expected.items():
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
            "the ONNX file does not compute what the model does, do not deploy it"
        )


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """One output of the rewritten model against the original's, over all examples.

    ``relative_error`` is ||a - b||_F / ||a||_F. Outputs that look like class scores, floating and (N, K >= 2), also
    have ``top1_agreement``, the share of examples with the same largest class, and ``kl``, the mean of
    KL(softmax a || softmax b) in nats. Integers and booleans have ``equal_share``, the share of their entries that are
    equal; their ``relative_error`` is the share that differ, as the distance of two indices means nothing.
    """

    name: str
    relative_error: float
    top1_agreement: float | None = None
    kl: float | None = None
    equal_share: float | None = None


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Every output's fidelity, over ``examples`` examples; ``left_out`` names what the original returns besides tensors."""

    outputs: tuple[OutputFidelity, ...]
    examples: int
    left_out: tuple[str, ...] = ()


def measure_fidelity(original: Runner, rewritten: Runner, batches: Iterable[Inputs]) -> Fidelity:
    """Run both on every batch and compare their outputs by name; sums are kept in float64, tensors are not kept.

    A value that is not a number counts as an infinite error. Raises VerificationError if the outputs differ in names
    or shapes, or if there is no batch.
    """
    sums: dict[str, _Sums] = {}
    others: dict[str, None] = {}
    examples = 0
    with eval_mode(original, rewritten):
        for batch in batches:
            expected, skipped = _run(original, batch)
            found, _ = _run(rewritten, batch)
            _require_same_outputs(expected, found, "the rewritten model")
            others |= dict.fromkeys(skipped)
            for name, tensor in expected.items():
                sums.setdefault(name, _Sums()).add(tensor, found[name])
            examples += batch[0].shape[0]
    if not sums:
        raise VerificationError("fidelity: expected at least one batch of inputs, found none")
    return Fidelity(tuple(total.fidelity(name) for name, total in sums.items()), examples, tuple(others))


def is_class_scores(output: Tensor) -> bool:
    """Whether an output looks like class scores: floating, ``(N, K)`` with at least two classes."""
    return output.is_floating_point() and output.ndim == 2 and output.shape[1] >= 2


def effect_of(pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]) -> float:
    """How far outputs are from the original's, one number: the KL of class scores, else the squared relative error, and
    the mean over the outputs where there are several. ``pairs`` are (original, found), batch by batch.

    Raises VerificationError where outputs differ in names or shapes.
    """
    sums: dict[str, _Sums] = {}
    for original, found in pairs:
        _require_same_outputs(original, found, "the rewritten model")
        for name, tensor in original.items():
            sums.setdefault(name, _Sums()).add(tensor, found[name])
    parts = [total.fidelity(name) for name, total in sums.items()]
    effects = [part.relative_error**2 if part.kl is None else part.kl for part in parts]
    return sum(effects) / len(effects)


@dataclass(slots=True)
class _Sums:
    """Running sums of one output's fidelity."""

    squared_difference: float = 0.0
    squared_original: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    scored: int = 0
    equal: int = 0
    entries: int = 0
    discrete: bool = False

    def add(self, original: Tensor, rewritten: Tensor) -> None:
        if not original.is_floating_point():
            self.discrete = True
            self.equal += int((original.cpu() == rewritten.cpu()).sum())
            self.entries += original.numel()
            return
        a, b = original.double(), rewritten.double()
        # Equal infinities, as masks have them, are equal, though their difference is not a number.
        self.squared_difference += float(torch.where(a == b, 0.0, a - b).square().sum())
        self.squared_original += float(a[a.isfinite()].square().sum())
        if a.ndim == 2 and a.shape[1] >= 2:
            self.scored += a.shape[0]
            self.agreed += int((a.argmax(1) == b.argmax(1)).sum())
            log_p, log_q = a.log_softmax(1), b.log_softmax(1)
            terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
            self.kl += float(terms.sum())

    def fidelity(self, name: str) -> OutputFidelity:
        if self.discrete:
            share = self.equal / self.entries if self.entries else 1.0
            return OutputFidelity(name, 1 - share, equal_share=share)
        error = math.sqrt(self.squared_difference)
        relative = error / math.sqrt(self.squared_original) if self.squared_original else math.inf if error else 0.0
        if not self.scored:
            return OutputFidelity(name, _number(relative))
        # Rounding can leave a sum of equal distributions a little below zero, which no KL is.
        kl = max(_number(self.kl / self.scored), 0.0)
        return OutputFidelity(name, _number(relative), self.agreed / self.scored, kl)


@dataclass(frozen=True, slots=True)
class Verification:
    """Two models side by side on the same inputs: are they the same up to rounding, and how near are they?"""

    parity: Parity
    fidelity: Fidelity


def verify(a: Runner | str | Path, b: Runner | str | Path, inputs: ExampleInput) -> Verification:
    """Compare any two models, each a module or the path of an ONNX file; ``a`` counts as the original.

    ``inputs`` are a tensor or a tuple of positional inputs; keyword inputs are bound by the forward of a module among the two.
    Nothing is required: :func:`require_parity` raises where the two must be the same. Raises VerificationError if the
    outputs differ in names, number or shapes.
    """
    runner_a, runner_b = (OnnxModel(Path(x)) if isinstance(x, str | Path) else x for x in (a, b))
    batch = bind_inputs(next((x for x in (runner_a, runner_b) if isinstance(x, nn.Module)), nn.Identity()), inputs)
    with eval_mode(runner_a, runner_b):
        (expected, skipped), (found, _) = _run(runner_a, batch), _run(runner_b, batch)
    if len(expected) == len(found):  # another exporter may have given the outputs other names
        found = dict(zip(expected, found.values(), strict=True))
    _require_same_outputs(expected, found, "the second model")
    outputs = []
    for name, tensor in expected.items():
        sums = _Sums()
        sums.add(tensor, found[name])
        outputs.append(sums.fidelity(name))
    parity = Parity(tuple(_output_parity(name, expected[name], found[name]) for name in expected), 1)
    return Verification(parity, Fidelity(tuple(outputs), batch[0].shape[0], skipped))


def _run(runner: Runner, inputs: Inputs) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors a model gives, and what else it gives."""
    if isinstance(runner, OnnxModel):
        return runner(*inputs), ()
    with torch.inference_mode():
        # A model may work in place on what it is given, and the next runner needs the same inputs.
        output = runner(*(tensor.clone() for tensor in inputs))
        return named_outputs(output), left_out(output)


def _require_same_outputs(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    if expected.keys() != found.keys():
        raise VerificationError(f"{where}: expected outputs {', '.join(expected)}; found {', '.join(found)}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            shapes = f"expected shape {_text(tuple(tensor.shape))}, found {_text(tuple(found[name].shape))}"
            raise VerificationError(
                f"{where}: output {name!r}: {shapes}; an output whose size depends on the numbers in it, as a list of "
                "detections, cannot be compared: give the part of the model that comes before"
            )


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


def _number(value: float) -> float:
    """NaN compares false with every limit and would pass every gate: let it be infinite."""
    return math.inf if math.isnan(value) else value


def _text(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"
