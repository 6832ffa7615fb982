"""Two models run on the same inputs: how near their outputs are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from convrewrite.errors import UsageError, VerificationError
from convrewrite.inputs import ExampleInput, Inputs, examples_in, shapes_of
from convrewrite.meanings import (
    Fidelity,
    Meaning,
    Origin,
    RunningFidelity,
    WantedOutputs,
    asked_meanings,
    outputs_and_origins,
    read,
)
from convrewrite.modules import eval_mode, preserved
from convrewrite.onnx_files import OnnxModel, Provenance, Runner, inputs_of, outputs_of
from convrewrite.process import ordinary_mode
from convrewrite.runtime.parity import Parity, output_parity


def measure_fidelity(
    original: Runner, rewritten: Runner, batches: Iterable[Inputs], meanings: Mapping[str, Meaning] | None = None
) -> Fidelity:
    """Run both on every batch and compare their outputs by name; sums are kept in float64, tensors are not kept.

    ``meanings`` of the outputs; None: they are inferred from the original and the first batch. A value that is not a number
    counts as an infinite error. Raises VerificationError if the outputs differ in names or shapes, or if there is no batch.
    """
    comparison: RunningFidelity | None = None
    others: dict[str, None] = {}
    examples = 0
    firsts: dict[str, Tensor] | None = {}
    with eval_mode(original, rewritten):
        for batch in batches:
            expected, skipped = outputs_of(original, batch)
            found, _ = outputs_of(rewritten, batch)
            if comparison is None:
                known = meanings or read(expected, {}, origins=_origins(original, batch), representative=True)
                comparison = RunningFidelity(known)
            comparison.add(expected, found)
            others |= dict.fromkeys(skipped)
            examples += examples_in(batch)
            counted = {name: output for name, output in expected.items() if comparison.meanings[name].counts}
            firsts = _still(firsts, counted, examples_in(batch))
    if comparison is None:
        raise VerificationError("fidelity: expected at least one batch of inputs, found none")
    return Fidelity(comparison.outputs(), examples, tuple(others), comparison.meanings, constant=firsts is not None)


def _still(firsts: dict[str, Tensor] | None, outputs: Mapping[str, Tensor], examples: int) -> dict[str, Tensor] | None:
    """The first example's outputs, if those of all examples so far are the same to the bit; None once any other was seen, and for
    outputs without an axis of examples, of which nothing is known."""
    if firsts is None:
        return None
    for name, output in outputs.items():
        first = firsts.setdefault(name, output[:1].clone() if output.ndim else output)
        if output.ndim == 0 or len(output) != examples or output.shape[1:] != first.shape[1:]:
            return None
        if not bool((output == first).all()):
            return None
    return firsts


@dataclass(frozen=True, slots=True)
class Verification:
    """Two models side by side on the same inputs: are they the same up to rounding, and how near are they? ``notes`` say what
    was compared, and how the two are related."""

    parity: Parity
    fidelity: Fidelity
    notes: tuple[str, ...] = ()


def verify(
    a: Runner,
    b: Runner,
    inputs: ExampleInput,
    *,
    outputs: WantedOutputs | None = None,
    representative: bool = True,
) -> Verification:
    """Compare any two models, each a module or an opened ONNX file; ``a`` counts as the original.

    ``inputs`` are a tensor or a tuple of positional inputs; keyword inputs are bound by the forward of a module among the two, or
    by the names of a file's inputs.
    ``outputs``: what outputs mean, as in :func:`convrewrite.optimize`, where that is not what they look like on the inputs; looks
    are trusted where the inputs are ``representative``, and no noise.

    Nothing is required: :func:`require_parity` raises where the two must be the same. Raises VerificationError if the outputs
    differ in number or shapes, UsageError for outputs that cannot be what they are said to be, and for inputs without an example,
    TraceError where a module does not run on them.
    """
    batch = inputs_of((a, b), inputs)
    if any(tensor.numel() == 0 for tensor in batch):  # what holds for no example says nothing
        raise UsageError(
            f"verify: expected inputs with at least one example, found inputs of {shapes_of(batch)}; give some"
        )
    with ordinary_mode(), preserved(a, b), eval_mode(a, b):
        (expected, skipped), (found, _) = outputs_of(a, batch), outputs_of(b, batch)
        origins = _origins(a, batch) or _origins(b, batch)
    # Another exporter may have given the outputs other names; outputs of the same names may stand in another order.
    if len(expected) == len(found) and expected.keys() != found.keys():
        found = dict(zip(expected, found.values(), strict=True))
        origins = origins if origins.keys() <= expected.keys() else {}
    written = _written(a, expected) | _written(b, expected)
    meanings = read(
        expected, asked_meanings(outputs), known=written, origins=origins,
        input_sizes={tuple(tensor.shape[1:]) for tensor in batch}, representative=representative,
    )  # fmt: skip
    unknown = {name: meaning for name, meaning in written.items() if name not in origins}
    meanings |= {name: _along_its_axis(meanings[name], known, expected[name]) for name, known in unknown.items()}
    comparison = RunningFidelity(meanings, "the second model")
    comparison.add(expected, found)
    compared = [(name, meaning) for name, meaning in meanings.items() if meaning.counts]
    parities = (output_parity(name, expected[name], found[name], meaning, batch) for name, meaning in compared)
    return Verification(
        Parity(tuple(parities), 1), Fidelity(comparison.outputs(), examples_in(batch), skipped, meanings)
    )


def _written(runner: Runner, outputs: Mapping[str, Tensor]) -> dict[str, Meaning]:
    """What a rewritten ONNX file says of its outputs."""
    found = Provenance.of(runner.metadata) if isinstance(runner, OnnxModel) else None
    return {} if found is None else {name: known for name, known in found.outputs.items() if name in outputs}


def _along_its_axis(meaning: Meaning, written: Meaning, output: Tensor) -> Meaning:
    """The meaning with the axis that the file says, if it says one that the output has: a file does not tell what gave it."""
    there = written.axis != 1 and -output.ndim < written.axis < output.ndim and written.axis != 0
    return replace(meaning, axis=written.axis) if there and output.shape[written.axis] > 1 else meaning


def _origins(runner: Runner, batch: Inputs) -> dict[str, Origin]:
    return outputs_and_origins(runner, batch)[1] if isinstance(runner, nn.Module) else {}
