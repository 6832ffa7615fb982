"""The commands. A thin layer: each reads its arguments, and shows progress and results; :mod:`.entry` tells errors."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convrewrite import values
from convrewrite.cli import quantising, timing
from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.interrupts import tells_what_stands
from convrewrite.cli.looking import compare, report, schema
from convrewrite.cli.options import (
    MODEL_HELP,
    PLANNED,
    SWEPT,
    AsJson,
    Besides,
    Commands,
    Comparing,
    Model,
    Out,
    Rules,
    Sources,
    Sweeping,
    Towards,
    Trust,
    calibration_of,
    progress_bars,
    runner_of,
    say,
    say_json,
)
from convrewrite.cli.rule_commands import rules_app
from convrewrite.errors import UsageError, VerificationError
from convrewrite.settings import Recovery, Settings
from convrewrite.version import tool_version

if TYPE_CHECKING:
    from convrewrite.reporting import Report
    from convrewrite.results import Result

app = typer.Typer(
    name="convrewrite",
    help="Rewrite the convolutions of a trained CNN (PyTorch, ONNX) into smaller, faster ones that still compute the same.",
    no_args_is_help=True,
    add_completion=True,
    cls=Commands,
    pretty_exceptions_enable=False,
)


app.add_typer(rules_app, name="rules")
for _command in (report, compare, schema):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"convrewrite {tool_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@tells_what_stands
@expanded
def optimize(
    *,
    context: typer.Context,
    model: Model,
    out: Out = None,
    rule: Rules = None,
    sources: Sources,
    settings: Settings,
    besides: Besides,
    trust: Trust = False,
) -> None:
    """Rewrite MODEL by the rules, export and verify the result, and report what was saved."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network
    from convrewrite.rules import resolve

    assert out is not None  # by then it has a default
    results.check_writable(out, (model,))
    chosen = resolve(rule or ["separable"])
    network = given_network(model, sources, trust, settings.timeout)
    data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
    with progress_bars() as progress:
        result = pipeline.optimize(
            network.model, network.inputs, chosen, data, settings=settings, name=model, notes=network.notes,
            progress=progress,
        )  # fmt: skip
        result = _commanded(result, context)
        result.save(out)
        if besides.int8:
            rows = pipeline.quantise(out, network.model, network.inputs, data, settings=settings, progress=progress)
    if besides.int8 and not besides.json:
        say(quantising.table(rows))
    show_result(result.report, out, besides.json)


@app.command()
@tells_what_stands
@expanded
def plan(
    *,
    model: Model,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File for the plan; MODEL-plan.json without it.")
    ] = None,
    rule: Rules = None,
    sources: Sources,
    settings: Annotated[Settings, Only(*PLANNED)],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Only choose what each convolution of MODEL becomes, and write it down; `apply` carries it out."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network
    from convrewrite.reporting import render_plan
    from convrewrite.rules import resolve

    assert out is not None  # by then it has a default
    results.check_file(out)
    chosen = resolve(rule or ["balanced"])
    network = given_network(model, sources, trust, settings.timeout)
    data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
    with progress_bars() as progress:
        made = pipeline.plan(network.model, network.inputs, chosen, data, settings=settings, progress=progress)
    results.save_plan(made, out)
    if as_json:
        say_json(made)
        return
    say(render_plan(made))
    for note in network.notes:
        say(f"Note: {note}")
    say(f"Written to {out}")


@app.command()
@tells_what_stands
@expanded
def apply(
    *,
    context: typer.Context,
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of this model, as `plan` writes it.")],
    out: Out = None,
    sources: Sources,
    settings: Annotated[
        Settings, Only("outputs", "refine", "threads", "memory", "timeout", "measure", "resume", "runtime", "timings")
    ],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Carry out PLAN on MODEL: fit its options, export and verify the result, and report what was saved."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network

    assert out is not None  # by then it has a default
    results.check_writable(out, (model,))
    followed = results.read_plan(plan_file)
    network = given_network(model, sources, trust, settings.timeout)
    data = calibration_of(sources, network.model, network.inputs, followed.seed, settings.memory)
    with progress_bars() as progress:
        result = pipeline.apply(
            network.model, network.inputs, followed, data, settings=settings, name=model, notes=network.notes,
            progress=progress,
        )  # fmt: skip
        result = _commanded(result, context)
        result.save(out)
    show_result(result.report, out, as_json)


@app.command()
@tells_what_stands
@expanded
def sweep(
    *,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for the sweep; MODEL-sweep without it.")
    ] = None,
    rule: Rules = None,
    asked: Sweeping,
    sources: Sources,
    settings: Annotated[Settings, Only(*SWEPT)],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what each of several budgets leaves of the fidelity of MODEL: the frontier, a plan for every point, a page."""
    from convrewrite import pipeline
    from convrewrite.cli.sweeping import swept

    assert out is not None  # by then it has a default
    pipeline.Sweep.check(out)
    with progress_bars() as progress:
        found, words = swept(models, rule or ["balanced"], asked, sources, settings, trust, progress)
        found.save(out, words)
    if as_json:
        say_json(found.report)
        return
    say(str(found))
    say(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


@app.command()
@tells_what_stands
@expanded
def recover(
    *,
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, which the recovered result replaces.")],
    data: Annotated[
        str, typer.Option("--data", help="Inputs without labels: .npy, .npz, .pt, a folder of images, or FILE.py:NAME.")
    ],
    towards: Towards,
    sources: Annotated[Sources, Only("input", "factory", "mean", "std", "resize")],
    settings: Recovery,
    trust: Trust = False,
) -> None:
    """Train the result in OUT towards its original, without labels; it is never worse then on inputs held out."""
    from convrewrite.cli.recovering import Asked, checkpoint_of, recovered

    place = towards.new or out
    checkpoint = checkpoint_of(place)
    asked = Asked(out, data, place, checkpoint, towards, trust)
    with progress_bars() as progress:
        result = recovered(asked, sources, settings, progress)
    if result is not None:  # else another process of the run writes and tells
        result = _commanded(result, context)
        result.save(place)
        checkpoint.unlink(missing_ok=True)  # of no use any more
        show_result(result.report, place)


@app.command()
def explain(
    source: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, or a plan.")],
    site: Annotated[
        str | None, typer.Argument(metavar="SITE", help="The name of a site; without it, all of them.")
    ] = None,
) -> None:
    """Tell why a site became what it is: the options that were measured, their cost, their effect."""
    from convrewrite import results
    from convrewrite.reporting import render_plan

    found = results.read_plan(source / results.PLAN if source.is_dir() else source)
    say(render_plan(found, site))


@app.command()
@expanded
def analyze(
    *,
    model: Model,
    rule: Rules = None,
    sources: Annotated[Sources, Only("input", "factory")],
    settings: Annotated[Settings, Only("timeout")],
    page: Annotated[
        Path | None, typer.Option("--page", help="An HTML file for the same as a page to look through.")
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show every convolution of MODEL: kind, geometry, parameters, MACs, and which rules would take it or why not."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network
    from convrewrite.reporting import render_sites

    if page is not None:
        results.check_page(page)
    network = given_network(model, sources, trust, settings.timeout)
    rows = pipeline.analyze(network.model, network.inputs, rule)
    if as_json:
        say_json(*rows)
        return
    say(render_sites(rows))
    for note in network.notes:
        say(f"Note: {note}")
    if page is not None:
        say(f"Written to {results.Analysis(rows, model, network.notes).save_page(page)}")


@app.command()
@expanded
def verify(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="The original: .pt, .onnx, or a result folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    sources: Annotated[Sources, Only("input", "factory", "calib", "mean", "std", "resize")],
    asked: Annotated[Comparing, Only("expect", "outputs", "agreement", "error", "seed", "timeout")],
    trust: Trust = False,
) -> None:
    """Compare the outputs of A and B: parity where they must be the same model, fidelity where one approximates."""
    if asked.expect not in (None, "parity", "fidelity"):
        raise UsageError(f"--expect: expected parity or fidelity, found {values.shown(asked.expect)}")
    from convrewrite import pipeline, runtime
    from convrewrite.cli import example_inputs
    from convrewrite.reporting import render_verification

    calib, limited = sources.calib, asked.agreement is not None or asked.error is not None
    first, second = (runner_of(source, sources.factory, trust, asked.timeout) for source in (a, b))
    inputs = example_inputs.for_both(first, second, sources, asked.seed)
    relation = pipeline.relation_of(first, second, (a, b))
    outcome = pipeline.verify(
        first, second, inputs, outputs=asked.outputs, representative=calib is not None, names=(a, b)
    )
    wanted = asked.expect or ("fidelity" if limited else relation.expected)
    say(render_verification(outcome, inputs[0].shape[0], "calibration inputs" if calib else "random inputs"))
    for note in outcome.notes:
        say(note)
    if relation.stranger is not None and asked.expect is None:
        raise VerificationError(relation.stranger)
    if wanted == "parity":
        runtime.require_parity(outcome.parity)
        say("Parity holds.")
    relation.require_fidelity(outcome.fidelity, asked.agreement, asked.error)


app.command()(timing.bench)
app.command()(timing.profile)
app.command()(quantising.quantise)


def _commanded(result: "Result", context: typer.Context) -> "Result":
    """The result with the command line that led to it in its report."""
    command = shlex.join(["convrewrite", *context.obj])
    report = result.report.model_copy(update={"commands": (*result.report.commands, command)})
    return replace(result, report=report)


def show_result(found: "Report", out: Path, as_json: bool = False) -> None:
    """The report and where it is written. Raises VerificationError for a result that is no success."""
    from convrewrite.reporting import render_text

    if as_json:
        say_json(found)
    else:
        say(render_text(found))
        say(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if found.refused is not None:
        raise VerificationError(found.refused)
