"""The commands. A thin layer: each reads its arguments, and shows progress and results; :mod:`.entry` reports errors."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convrewrite.cli import exporting, quantising, timing, verifying
from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.grouped import Commands, command, examples_of
from convrewrite.cli.interrupts import checkpoint_of, tells_what_stands
from convrewrite.cli.looking import compare, report, schema
from convrewrite.cli.options import (
    APPLIED,
    MODEL_HELP,
    PLANNED,
    SWEPT,
    AsJson,
    Model,
    Out,
    Rules,
    Sources,
    Sweeping,
    Towards,
    Trust,
    calibration_of,
    notes_on,
    require_agreeing,
)
from convrewrite.cli.progress import progress_bars, stages_of
from convrewrite.cli.rule_commands import rules_app
from convrewrite.cli.voice import Quiet, Verbose, say, say_json, speaking, width
from convrewrite.errors import VerificationError
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
    epilog=examples_of(
        "convrewrite optimize resnet18.pt --rule balanced --keep 0.98 --calib images/",
        "convrewrite optimize --help",
    ),
    pretty_exceptions_enable=False,
)


app.add_typer(rules_app, name="rules")
command(app, "convrewrite report resnet18-rewritten --open")(report)
command(app, "convrewrite compare half quarter --page both.html")(compare)
command(app, "convrewrite schema report", "convrewrite schema")(schema)


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"convrewrite {tool_version()}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback shows it
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
    no_config: Annotated[  # noqa: ARG001 - grouped.py asks the context for it
        bool, typer.Option("--no-config", help="Read no convrewrite.toml, and no tool.convrewrite of pyproject.toml.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    context.with_resource(speaking(quiet, verbose))


@command(
    app,
    "convrewrite optimize resnet18.pt --rule separable --calib images/",
    "convrewrite optimize net.onnx --rule balanced --budget latency=0.6 -o out",
)
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
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite MODEL by the rules, export and verify the result, and report what was saved."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network
    from convrewrite.rules import resolve

    assert out is not None  # by then it has a default
    require_agreeing(sources, settings, model)
    results.check_writable(out, (model,))
    if settings.int8:
        quantising.require_inputs_and_onnx(sources, settings)
    chosen = resolve(rule or ["separable"])
    network = given_network(model, sources, trust, settings.timeout)
    if settings.int8:
        quantising.require_float32(network.model)
    data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
    with progress_bars(
        *stages_of(settings, sources.calib, "optimize"), *(["int8"] if settings.int8 else [])
    ) as progress:
        result = pipeline.optimize(
            network.model, network.inputs, chosen, data, settings=settings, name=model, notes=network.notes,
            progress=progress,
        )  # fmt: skip
        result = _commanded(result, context)
        result.save(out)
        if settings.int8:
            rows = pipeline.quantise(out, network.model, network.inputs, data, settings=settings, progress=progress)
    if settings.int8 and not as_json:
        say(quantising.told(rows))
    show_result(result.report, out, as_json)


@command(app, "convrewrite plan resnet18.pt --budget macs=0.5 --calib images/ -o plan.json")
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
    require_agreeing(sources, settings)
    results.check_file(out)
    chosen = resolve(rule or ["balanced"])
    network = given_network(model, sources, trust, settings.timeout)
    data = calibration_of(sources, network.model, network.inputs, settings.seed, settings.memory)
    with progress_bars(*stages_of(settings, sources.calib, "plan", several=len(rule or ()) > 1)) as progress:
        made = pipeline.plan(network.model, network.inputs, chosen, data, settings=settings, progress=progress)
    results.save_plan(made, out)
    if as_json:
        say_json(made)
        return
    say(render_plan(made, width=width()))
    for note in (*network.notes, *notes_on(data)):
        say(f"Note: {note}")
    say(f"Written to {out}")


@command(app, "convrewrite apply resnet18.pt plan.json --calib images/ -o out")
@tells_what_stands
@expanded
def apply(
    *,
    context: typer.Context,
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of this model, as `plan` writes it.")],
    out: Out = None,
    sources: Sources,
    settings: Annotated[Settings, Only(*APPLIED)],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Carry out PLAN on MODEL: fit its options, export and verify the result, and report what was saved."""
    from convrewrite import pipeline, results
    from convrewrite.cli.networks import given_network

    assert out is not None  # by then it has a default
    require_agreeing(sources, settings, model)
    results.check_writable(out, (model,))
    followed = results.read_plan(plan_file)
    network = given_network(model, sources, trust, settings.timeout)
    data = calibration_of(sources, network.model, network.inputs, followed.seed, settings.memory)
    with progress_bars(*stages_of(settings, sources.calib, "apply")) as progress:
        result = pipeline.apply(
            network.model, network.inputs, followed, data, settings=settings, name=model, notes=network.notes,
            progress=progress,
        )  # fmt: skip
        result = _commanded(result, context)
        result.save(out)
    show_result(result.report, out, as_json)


@command(app, "convrewrite sweep resnet18.pt --calib images/ --budgets 0.8..0.1 -o sweep")
@tells_what_stands
@expanded
def sweep(
    *,
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=MODEL_HELP)],
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
    from convrewrite.reporting import SweepReport

    assert out is not None  # by then it has a default
    require_agreeing(sources, settings)
    pipeline.Sweep.check(out)
    stages = stages_of(settings, sources.calib, "sweep") if asked.cluster is None else ("survey", "points")
    with progress_bars(*stages) as progress:
        found, words, notes = swept(models, rule or ["balanced"], asked, sources, settings, trust, progress)
        found.save(out, words)
    if as_json:
        # What was written has the commands of its points too.
        say_json(SweepReport.read((out / "sweep.json").read_text(encoding="utf-8")))
        return
    say(str(found))
    for note in notes:
        say(f"Note: {note}")
    _say_written(out)


@command(
    app,
    "convrewrite recover out --data images/ --minutes 5",
    "convrewrite recover out --data images.npy --epochs 3 -o recovered",
)
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
    as_json: AsJson = False,
) -> None:
    """Train the result in OUT towards its original, without labels; it is never worse then on inputs held out."""
    from convrewrite.cli.recovering import RecoverArguments, recovered

    place = towards.new or out
    checkpoint = checkpoint_of(place)
    asked = RecoverArguments(out, data, place, checkpoint, towards, trust)
    with progress_bars("recover", *(["verify"] if settings.measure else [])) as progress:
        result = recovered(asked, sources, settings, progress)
    if result is not None:  # otherwise another process of the run writes and reports
        result = _commanded(result, context)
        result.save(place)
        checkpoint.unlink(missing_ok=True)  # of no use any more
        show_result(result.report, place, as_json)


@command(
    app,
    "convrewrite explain out layer3.0.conv2",
    "convrewrite explain plan.json",
)
def explain(
    source: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, or a plan.")],
    site: Annotated[
        str | None, typer.Argument(metavar="SITE", help="The name of a site; without it, all of them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell why a site became what it is: the options that were measured, their cost, their effect."""
    from convrewrite import results
    from convrewrite.reporting import render_plan

    found = results.read_plan(source / results.PLAN if source.is_dir() else source)
    if as_json:
        say_json(found if site is None else found.site(site))
    else:
        say(render_plan(found, site, width()))


@command(
    app,
    "convrewrite analyze resnet18.pt",
    "convrewrite analyze net.onnx --rule balanced --page net.html",
)
@tells_what_stands
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
    if page is not None:
        results.Analysis(rows, model, network.notes).save_page(page)
    if as_json:
        say_json(rows)
        return
    say(render_sites(rows, width()))
    for note in network.notes:
        say(f"Note: {note}")
    if page is not None:
        say(f"Written to {page}")


command(
    app,
    "convrewrite verify resnet18.pt out/model.onnx --calib images/ --agreement 0.98",
    "convrewrite verify out out/model.onnx",
)(verifying.verify)
command(app, "convrewrite bench resnet18.onnx out/model.onnx --threads 2")(timing.bench)
command(
    app,
    "convrewrite profile resnet18.pt --runtime openvino -o timings.json",
    "convrewrite profile resnet18.pt --graphs graphs",
)(timing.profile)
command(app, "convrewrite quantise out --calib images/")(quantising.quantise)
command(app, "convrewrite export out --to openvino --to half --calib images/")(exporting.export)


def _commanded(result: "Result", context: typer.Context) -> "Result":
    """The result with the command line that led to it in its report."""
    command = shlex.join(["convrewrite", *context.obj])
    report = result.report.model_copy(update={"commands": (*result.report.commands, command)})
    return replace(result, report=report)


def show_result(found: "Report", out: Path, as_json: bool) -> None:
    """Show the report and where it is written. Raises VerificationError for a result that is no success."""
    from convrewrite.reporting import render_text
    from convrewrite.results import read_report

    if as_json:
        say_json(read_report(out))  # which has the digests of what was written
    else:
        say(render_text(found, width=width()))
        _say_written(out)
    if (reason := found.refused or found.unwritten) is not None:
        raise VerificationError(reason)


def _say_written(out: Path) -> None:
    say(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
