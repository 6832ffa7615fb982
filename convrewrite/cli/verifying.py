"""The command ``verify``: two models, as files or result folders, on the same inputs."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from convrewrite import values
from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.options import AsJson, Comparing, Sources, Trust, runners_of
from convrewrite.cli.voice import say, say_json
from convrewrite.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from convrewrite.pipeline import Relation
    from convrewrite.runtime import Verification


@expanded
def verify(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="The original: .pt, .onnx, or a result folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    sources: Annotated[Sources, Only("input", "factory", "calib", "mean", "std", "resize")],
    asked: Annotated[Comparing, Only("expect", "outputs", "agreement", "error", "seed", "timeout")],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Compare the outputs of A and B: parity where they must be the same model, fidelity where one approximates."""
    if asked.expect not in (None, "parity", "fidelity"):
        raise UsageError(f"--expect: expected parity or fidelity, found {values.shown(asked.expect)}")
    from convrewrite import pipeline
    from convrewrite.cli.both_inputs import for_both
    from convrewrite.inputs import examples_in
    from convrewrite.reporting import render_verification

    calib, limited = sources.data, asked.agreement is not None or asked.error is not None
    first, second = runners_of((a, b), sources.factory, trust, asked.timeout)
    both = for_both(first, second, sources, asked.seed, (a, b)).whole_batches()
    outcome, relation = pipeline.verify_related(
        both.first, both.second, both.inputs, (a, b), outputs=asked.outputs, representative=calib is not None
    )
    outcome = replace(outcome, notes=(*outcome.notes, *both.notes))
    wanted = asked.expect or ("fidelity" if limited else relation.expected)
    examples, source = examples_in(both.inputs), "calibration inputs" if calib else "random inputs"
    refused = _refused(outcome, relation, wanted, asked)
    if as_json:
        from convrewrite.cli.json_forms import Verified

        reason = None if refused is None else str(refused)
        say_json(Verified.of(outcome, a=a, b=b, examples=examples, inputs=source, expected=wanted, refused=reason))
    else:
        say("\n".join((render_verification(outcome, examples, source), *outcome.notes)))
        if wanted == "parity" and outcome.parity.passed:
            say("Parity holds.")
    if refused is not None:
        raise refused


def _refused(outcome: "Verification", relation: "Relation", wanted: str, asked: Comparing) -> VerificationError | None:
    """Why the two fail what they had to fulfil; None where they do not fail."""
    from convrewrite import runtime

    try:
        if relation.stranger is not None and asked.expect is None:
            raise VerificationError(relation.stranger)
        if wanted == "parity":
            runtime.require_parity(outcome.parity)
        relation.require_fidelity(outcome.fidelity, asked.agreement, asked.error)
    except VerificationError as error:
        return error
    return None
