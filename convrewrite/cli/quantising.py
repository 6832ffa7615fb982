"""The command ``quantise``, and the table of four that ``optimize --int8`` shows too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convrewrite import values
from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.interrupts import INT8, tells_what_stands
from convrewrite.cli.options import AsJson, Sources, Trust, calibration_of, notes_on, require_agreeing
from convrewrite.cli.progress import progress_bars
from convrewrite.cli.voice import say, say_json
from convrewrite.errors import UsageError
from convrewrite.settings import Settings
from convrewrite.worst import Worst

if TYPE_CHECKING:
    from torch import nn

    from convrewrite.pipeline import Int8Row

HEADERS = ("", "bytes", "MACs", "time", "rel. error", "top-1 agreement", "KL", "to its float file", "how")


@tells_what_stands
@expanded
def quantise(
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, which gets model.int8.onnx.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The original; by default the file that OUT's report names.")
    ] = None,
    sources: Sources,
    settings: Annotated[Settings, Only("threads", "memory", "timeout", "runtime")],
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of what is held out; by default that of the result in OUT.")
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Make int8 of the result in OUT, on the calibration inputs, and compare original, rewritten, and int8 of both."""
    from convrewrite import pipeline
    from convrewrite.cli.networks import given_network
    from convrewrite.cli.recovering import named_original
    from convrewrite.results import read_report

    require_agreeing(sources)
    _require_inputs(sources, "quantise")
    report = read_report(out)
    settings = replace(settings, seed=report.seed if seed is None else values.seed(seed))
    source = model or named_original(report.model, out)
    network = given_network(source, sources, trust, settings.timeout, out)
    require_float32(network.model, "quantise", "quantise the result of the float32 model that this was made of")
    data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
    with progress_bars("int8") as progress:
        rows = pipeline.quantise(out, network.model, network.inputs, data, settings=settings, progress=progress)
    written = out / INT8
    if as_json:
        from convrewrite.cli.json_forms import QuantisedModels

        say_json(QuantisedModels.of(rows, written, warnings_on(rows)))
        return
    say(told(rows))
    for note in notes_on(data):
        say(f"Note: {note}")
    say(f"Written to {written}")


def require_inputs_and_onnx(sources: Sources, settings: Settings) -> None:
    """Raise UsageError, before any long work, unless ``--int8`` will have what it needs: an ONNX file, a runtime that runs it,
    and inputs."""
    if not settings.measure:
        raise UsageError("--int8: expected an ONNX file to quantise, found --no-onnx; leave out one of the two")
    settings.require_files_run()
    _require_inputs(sources, "--int8")


def _require_inputs(sources: Sources, where: str) -> None:
    if sources.data is None:
        found = "none" if sources.calib is None else "--calib weights"
        raise UsageError(f"{where}: expected inputs to calibrate on, found {found}; give real ones (--calib)")


_LEFT_OUT = "leave it out, or rewrite the float32 model that this was made of"


def require_float32(model: "nn.Module", where: str = "--int8", instead: str = _LEFT_OUT) -> None:
    """Raise UsageError, before any long work, for a module made of an ONNX graph that onnxruntime's quantiser does not take."""
    from convrewrite.onnx_graph import holds_halves

    if holds_halves(model):
        raise UsageError(
            f"{where}: expected a model in float32, which alone can be quantised, found one in half precision; {instead}"
        )


def told(rows: "Sequence[Int8Row]") -> str:
    """The table, and below it the warnings."""
    return "\n".join((table(rows), *(f"Warning: {warning}" for warning in warnings_on(rows))))


def warnings_on(rows: "Sequence[Int8Row]") -> tuple[str, ...]:
    """What the file that was written, that of the last row, lost beyond what a result may lose."""
    lost = [
        f"{what} of {output.name} {figure:.2%}"
        for output in rows[-1].fidelity.outputs
        for what, figure in (output.lost() | output.unfollowed()).items()
    ]
    if not lost:
        return ()
    return (
        f"the {rows[-1].name} does not compute the same any more as the original: {', '.join(lost)}; use model.onnx, or half "
        "precision (`convrewrite export OUT --to half`)",
    )


def table(rows: "Sequence[Int8Row]") -> str:
    """The four models side by side; of several outputs the worst."""
    from convrewrite.tables import table as drawn

    cells = []
    for row in rows:
        worst = Worst.of(row.fidelity.outputs)
        cells.append((
            row.name, f"{row.bytes:,}", f"{row.macs:,}", f"{row.latency:.2f}x", f"{worst.error:.2%}",
            "" if worst.agreement is None else values.share(worst.agreement), "" if worst.kl is None else f"{worst.kl:.2g}",
            f"{row.float_error:.2%}", row.way,
        ))  # fmt: skip
    return drawn(HEADERS, cells, "lrrrrrrrl")
