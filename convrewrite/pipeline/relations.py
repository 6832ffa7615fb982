"""How two models that are compared are related: the same model, an original and its rewritten form, or strangers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from convrewrite.errors import VerificationError
from convrewrite.meanings import Fidelity
from convrewrite.onnx_files import OnnxModel, Provenance
from convrewrite.planning import Fingerprint


@dataclass(frozen=True, slots=True)
class Relation:
    """What is to be expected of two models, and why; ``stranger``: the message that one was rewritten from another model, if it
    was."""

    expected: Literal["parity", "fidelity"]
    note: str | None = None
    stranger: str | None = None

    @staticmethod
    def require_fidelity(fidelity: Fidelity, agreement: float | None, error: float | None) -> None:
        """Raise VerificationError where an output misses the limits that were given."""
        for output in fidelity.outputs:
            if error is not None and not output.relative_error <= error:
                raise VerificationError(f"{output.name}: relative error {output.relative_error:.6g} exceeds {error:g}")
        if agreement is None:
            return
        if fidelity.least_agreement is None:
            raise VerificationError(
                "--agreement: expected an output of class scores, found none; gate with --error, or say which output they are "
                "(--output NAME=logits)"
            )
        for output in fidelity.outputs:
            if output.top1_agreement is not None and not output.top1_agreement >= agreement:
                raise VerificationError(
                    f"{output.name}: top-1 agreement {output.top1_agreement:.6g} is below {agreement:g}"
                )


def relation_of(a: object, b: object, names: tuple[str, str]) -> Relation:
    """The relation, from what rewritten ONNX files say about themselves and from the weights of modules; otherwise a torch and an
    ONNX model are taken for the same model, and two of one kind for different ones."""
    written = _provenance(a), _provenance(b)
    if written[0] is not None and written[1] is not None:
        made = _one_of_the_other((a, b), (written[0], written[1]), names)
        return made or _of_two_results(written[0], written[1], names)
    for this, other, mine, others in ((b, a, 1, 0), (a, b, 0, 1)):
        provenance = written[mine]
        if provenance is not None and this is not other:
            return _of_one_result(provenance, other, names[mine], names[others])
    same_kind = isinstance(a, OnnxModel) == isinstance(b, OnnxModel)
    return Relation("fidelity" if same_kind else "parity")


def _provenance(runner: object) -> Provenance | None:
    return Provenance.of(runner.metadata) if isinstance(runner, OnnxModel) else None


def _of_one_result(provenance: Provenance, other: object, name: str, other_name: str) -> Relation:
    said = _said(provenance, name)
    made = _made(provenance, other, name, other_name)
    known = _is_file_of(provenance, other)
    if known is not None:
        return made if known else Relation("fidelity", said, _stranger(name, other_name))
    if not isinstance(other, nn.Module) or provenance.file:  # nothing is known of a model from memory either
        return Relation("fidelity", f"{said}: it approximates its original, fidelity is what counts")
    found = str(Fingerprint.of(other))
    if found == provenance.result and provenance.form:
        less = f"in {provenance.precision}, and {other_name} holds its weights as they were"
        return Relation("fidelity", f"{said} {less}: it approximates these, fidelity is what counts")
    if found == provenance.result:
        return Relation("parity", f"{said}, and {other_name} holds the same weights")
    if found == provenance.original:
        return made
    return Relation("fidelity", said, _stranger(name, other_name))


def _is_file_of(provenance: Provenance, other: object) -> bool | None:
    """Whether a result was made from the file that ``other`` was opened from; None where that cannot be known."""
    if not (isinstance(other, OnnxModel) and provenance.file and Path(other.where).is_file()):
        return None
    return provenance.is_made_of(Path(other.where))


def _said(provenance: Provenance, name: str) -> str:
    return f"{name} is a rewritten model (convrewrite {provenance.tool_version})"


def _made(provenance: Provenance, other: object, name: str, other_name: str) -> Relation:
    made = f"{_said(provenance, name)}, made from {other_name}: it approximates it, fidelity is what counts"
    if isinstance(other, OnnxModel) and Path(other.where).is_file() and provenance.leaves_open(Path(other.where)):
        made += f"; the weights beside {other_name} were not compared, as a result of that version does not know them"
    return Relation("fidelity", made)


def _stranger(name: str, other: str) -> str:
    return (
        f"{name}: was rewritten from another model than {other}, whose tensors or weights are others; give the model it "
        "was made from, or say what to expect of the two (--expect fidelity, --expect parity)"
    )


def _one_of_the_other(
    runners: tuple[object, object], written: tuple[Provenance, Provenance], names: tuple[str, str]
) -> Relation | None:
    """The relation of a result and a result that was made from it, by its file or by its weights; None where neither was."""
    for mine, others in ((1, 0), (0, 1)):
        of_weights = written[mine].original == written[others].result != written[mine].result
        if of_weights or _is_file_of(written[mine], runners[others]):
            return _made(written[mine], runners[others], names[mine], names[others])
    return None


def _of_two_results(first: Provenance, second: Provenance, names: tuple[str, str]) -> Relation:
    if first.result == second.result:
        same = f"{names[0]} and {names[1]} are the same rewritten model"
        if not first.form and not second.form:
            return Relation("parity", same)
        return Relation("fidelity", f"{same}, in {first.precision} and in {second.precision}: fidelity is what counts")
    if first.original == second.original:
        return Relation("fidelity", f"{names[0]} and {names[1]} are rewritten from the same model")
    return Relation(
        "fidelity",
        stranger=f"{names[1]}: was rewritten from another model than {names[0]}; say what to expect of the two (--expect "
        "fidelity)",
    )
