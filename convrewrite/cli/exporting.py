"""The command ``export``: a result that lies in a folder, in other forms."""

from pathlib import Path
from typing import Annotated

import typer

from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.interrupts import tells_what_stands
from convrewrite.cli.options import AsJson, Sources, Trust, calibration_of, notes_on, require_agreeing
from convrewrite.cli.progress import progress_bars
from convrewrite.cli.voice import say, say_json
from convrewrite.errors import UsageError, VerificationError
from convrewrite.settings import Settings


@tells_what_stands
@expanded
def export(
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, which gets the further files.")],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="A form: openvino, torch_export, executorch, coreml or half; repeat it for several."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="The original; by default the file that OUT's report names.")
    ] = None,
    sources: Sources,
    settings: Annotated[Settings, Only("memory", "timeout")],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write the result in OUT in other forms, beside it, each held to torch on held-out inputs; its report tells of them."""
    from convrewrite import pipeline
    from convrewrite.cli.networks import given_network
    from convrewrite.cli.recovering import named_original
    from convrewrite.exports import named_exports
    from convrewrite.reporting import render_text
    from convrewrite.results import check_addable, read_report

    if not to:
        raise UsageError("--to: expected a form, as openvino, found none; repeat it for several")
    named_exports(to)
    require_agreeing(sources)
    report = read_report(out)
    check_addable(out)
    network = given_network(model or named_original(report.model, out), sources, trust, settings.timeout, out)
    data = calibration_of(sources, network.model, network.inputs, report.seed, settings.memory)
    with progress_bars("export") as progress:
        found = pipeline.export_result(
            out, network.model, network.inputs, data, to=to, settings=settings, progress=progress
        )
    if as_json:
        say_json(found)
    else:
        say(render_text(found, exports_only=True))
        for note in notes_on(data):
            say(f"Note: {note}")
        names = [name for row in found.exports if row.name in to for name in row.files]
        say(f"Written to {out}: {', '.join(names or ['the report alone'])}")
    failed = next((row for row in found.exports if row.name in to and row.refused is not None), None)
    if failed is not None:
        raise VerificationError(f"export {failed.name}: {failed.refused}")
