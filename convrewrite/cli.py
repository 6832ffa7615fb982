"""The command line. A thin layer: it reads arguments, shows progress and results, and turns errors into exit codes."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convrewrite import arguments
from convrewrite.cli_options import (
    Budget,
    Calib,
    Factory,
    Fast,
    Input,
    Keep,
    Mean,
    Memory,
    Model,
    Onnx,
    Resize,
    Rules,
    Seed,
    Std,
    Threads,
    Trust,
    calibration_of,
    load,
    progress_bars,
    say,
)  # fmt: skip
from convrewrite.errors import ConvRewriteError, ModelLoadError, UsageError, VerificationError
from convrewrite.escaping import printable

if TYPE_CHECKING:
    from convrewrite.reporting.model import Report

app = typer.Typer(
    name="convrewrite",
    help="Rewrite the convolutions of a trained PyTorch CNN into smaller, faster ones that still compute the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
rules_app = typer.Typer(help="The rules that say which convolutions become what.", no_args_is_help=True)
app.add_typer(rules_app, name="rules")

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@app.command()
def optimize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")],
    rule: Rules = None,
    input_: Input = None,
    factory: Factory = None,
    calib: Calib = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    budget: Budget = None,
    keep: Keep = None,
    fast: Fast = False,
    threads: Threads = 1,
    seed: Seed = 0,
    memory: Memory = 4.0,
    onnx: Onnx = True,
    trust: Trust = False,
) -> None:
    """Rewrite MODEL by the rules, export and verify the result, and report what was saved."""
    from convrewrite import example_inputs, pipeline, storing
    from convrewrite.rules import resolve

    storing.check_writable(out)
    chosen = resolve(rule or ["separable"])
    asked, kept = arguments.budget(budget or []), arguments.keep(keep)
    loaded = load(model, factory, trust)
    inputs, notes = example_inputs.for_model(loaded, input_ or (), calib)
    data = calibration_of(calib, loaded.model, inputs, seed, mean, std, resize)
    with progress_bars() as progress:
        result = pipeline.optimize(
            loaded.model, inputs, chosen, data, asked, seed, keep=kept, fast=fast,
            threads=threads, memory=int(memory * 2**30), measure=onnx, name=model, notes=(*loaded.notes, *notes),
            progress=progress,
        )  # fmt: skip
        result.save(out)
    show_result(result.report, out)


@app.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="File for the plan, as plan.json.")],
    rule: Rules = None,
    input_: Input = None,
    factory: Factory = None,
    calib: Calib = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    budget: Budget = None,
    keep: Keep = None,
    fast: Fast = False,
    threads: Threads = 1,
    seed: Seed = 0,
    memory: Memory = 4.0,
    onnx: Onnx = True,
    trust: Trust = False,
) -> None:
    """Only choose what each convolution of MODEL becomes, and write it down; `apply` carries it out."""
    from convrewrite import example_inputs, pipeline, storing
    from convrewrite.reporting.plans import render_plan
    from convrewrite.rules import resolve

    storing.check_file(out)
    chosen = resolve(rule or ["balanced"])
    asked, kept = arguments.budget(budget or []), arguments.keep(keep)
    loaded = load(model, factory, trust)
    inputs, notes = example_inputs.for_model(loaded, input_ or (), calib)
    data = calibration_of(calib, loaded.model, inputs, seed, mean, std, resize)
    with progress_bars() as progress:
        made = pipeline.plan(
            loaded.model, inputs, chosen, data, asked, seed, keep=kept, fast=fast,
            threads=threads, memory=int(memory * 2**30), measure=onnx, progress=progress,
        )  # fmt: skip
    storing.save_plan(made, out)
    say(render_plan(made))
    for note in (*loaded.notes, *notes):
        say(f"Note: {note}")
    say(f"Written to {out}")


@app.command()
def apply(
    model: Model,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of this model, as `plan` writes it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the results.")],
    input_: Input = None,
    factory: Factory = None,
    calib: Calib = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    threads: Threads = 1,
    memory: Memory = 4.0,
    onnx: Onnx = True,
    trust: Trust = False,
) -> None:
    """Carry out PLAN on MODEL: fit its options, export and verify the result, and report what was saved."""
    from convrewrite import example_inputs, pipeline, storing

    storing.check_writable(out)
    followed = storing.read_plan(plan_file)
    loaded = load(model, factory, trust)
    inputs, notes = example_inputs.for_model(loaded, input_ or (), calib)
    data = calibration_of(calib, loaded.model, inputs, followed.seed, mean, std, resize)
    with progress_bars() as progress:
        result = pipeline.apply(
            loaded.model, inputs, followed, data, threads=threads, memory=int(memory * 2**30), measure=onnx, name=model,
            notes=(*loaded.notes, *notes), progress=progress,
        )  # fmt: skip
        result.save(out)
    show_result(result.report, out)


@app.command()
def explain(
    source: Annotated[Path, typer.Argument(metavar="OUT", help="A result folder, or a plan.")],
    site: Annotated[
        str | None, typer.Argument(metavar="SITE", help="The name of a site; without it, all of them.")
    ] = None,
) -> None:
    """Tell why a site became what it is: the options that were measured, their cost, their effect."""
    from convrewrite import storing
    from convrewrite.reporting.plans import render_plan, render_site

    found = storing.read_plan(source / storing.PLAN if source.is_dir() else source)
    say(render_plan(found) if site is None else render_site(found.site(site)))


@app.command()
def analyze(
    model: Model,
    rule: Rules = None,
    input_: Input = None,
    factory: Factory = None,
    trust: Trust = False,
) -> None:
    """Show every convolution of MODEL: kind, geometry, parameters, MACs, and which rules would take it or why not."""
    from convrewrite import example_inputs, pipeline
    from convrewrite.reporting import render_sites

    loaded = load(model, factory, trust)
    inputs, notes = example_inputs.for_model(loaded, input_ or (), None)
    rows = pipeline.analyze(loaded.model, inputs, rule)
    say(render_sites(rows))
    for note in (*loaded.notes, *notes):
        say(f"Note: {note}")


@app.command()
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="The original: .pt, .onnx, or a result folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    input_: Input = None,
    factory: Factory = None,
    calib: Calib = None,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect", help="'parity' (the same numbers) or 'fidelity'; by default parity of torch with ONNX."
        ),
    ] = None,
    agreement: Annotated[float | None, typer.Option("--agreement", help="Least top-1 agreement, as 0.98.")] = None,
    error: Annotated[float | None, typer.Option("--error", help="Largest relative output error, as 0.05.")] = None,
    seed: Seed = 0,
    trust: Trust = False,
) -> None:
    """Compare the outputs of A and B: parity where they must be the same model, fidelity where one approximates."""
    from convrewrite import example_inputs, verifying

    if expect not in (None, "parity", "fidelity"):
        raise UsageError(f"--expect: expected parity or fidelity, found {expect}")
    first, second = _runner(a, factory, trust), _runner(b, factory, trust)
    inputs = example_inputs.for_both(first, second, input_ or (), calib, seed)
    outcome = verifying.verify(first, second, inputs)
    by_default = (
        "parity" if isinstance(first, verifying.OnnxModel) != isinstance(second, verifying.OnnxModel) else "fidelity"
    )
    wanted = expect or ("fidelity" if agreement is not None or error is not None else by_default)
    _show_verification(outcome, inputs[0].shape[0], "the calibration inputs" if calib else "random inputs")
    if wanted == "parity":
        verifying.require_parity(outcome.parity)
        say("Parity holds.")
    _require_fidelity(outcome.fidelity, agreement, error)


@app.command()
def bench(
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: .pt, .onnx, or a result folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    input_: Input = None,
    factory: Factory = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Interleaved rounds.")] = 25,
    trust: Trust = False,
) -> None:
    """Time A and B side by side, interleaved; the ratio is the median over rounds of paired ratios."""
    import tempfile

    from tabulate import tabulate

    from convrewrite import example_inputs, exporting, latency, verifying
    from convrewrite.reporting import figures

    first, second = _runner(a, factory, trust), _runner(b, factory, trust)
    inputs = example_inputs.for_both(first, second, input_ or (), None, 0)
    inputs = tuple(tensor[:1] for tensor in inputs)
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="convrewrite-") as folder, progress_bars() as progress:
        paths = []
        for index, (source, runner) in enumerate(((a, first), (b, second))):
            is_onnx = isinstance(runner, verifying.OnnxModel)
            progress("bench", index, 4, f"export {source}")
            paths.append(
                Path(source) if is_onnx else exporting.export(runner, inputs, Path(folder) / f"{index}.onnx").path
            )
        progress("bench", 2, 4, "onnxruntime")
        comparisons.append(latency.compare_onnx(paths[0], paths[1], inputs, threads=threads, rounds=rounds))
        if not isinstance(first, verifying.OnnxModel) and not isinstance(second, verifying.OnnxModel):
            progress("bench", 3, 4, "torch")
            comparisons.append(latency.compare_torch(first, second, inputs, threads=threads, rounds=rounds))
    rows = [
        (c.runtime, figures.duration(c.seconds_a), figures.duration(c.seconds_b), f"{c.ratio:.3f}",
         f"{c.ratio_low:.3f} to {c.ratio_high:.3f}", f"{c.speedup:.2f}x")
        for c in comparisons
    ]  # fmt: skip
    say(tabulate(rows, ("runtime", "A", "B", "B / A", "quartiles", "speed-up")))
    shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
    say(f"input {shapes}, {threads} thread(s), median of {rounds} interleaved rounds")


@rules_app.command("list")
def rules_list() -> None:
    """The built-in rules."""
    from tabulate import tabulate

    from convrewrite.rules import builtin_rules, load_rule_file

    rows = [(name, load_rule_file(path).description) for name, path in builtin_rules().items()]
    say(tabulate(rows, ("rule", "what it does"), maxcolwidths=[None, 85]))


@rules_app.command("show")
def rules_show(name: Annotated[str, typer.Argument(help="A built-in rule or a rule file.")]) -> None:
    """A rule file as it stands, comments and examples included."""
    from convrewrite.rules import builtin_rules, resolve

    resolve([name])
    path = builtin_rules().get(name, Path(name))
    say(path.read_text(encoding="utf-8"))


@rules_app.command("check")
def rules_check(file: Annotated[Path, typer.Argument(help="A rule file.")]) -> None:
    """Check a rule file: its keys, its values, and the examples it carries."""
    from convrewrite.rules import check, load_rule_file
    from convrewrite.structures import discover

    structures = discover()
    findings = check(load_rule_file(file), lambda name, spec: structures[name].reject(spec.per_group))
    for finding in findings:
        say(f"{'ok  ' if finding.passed else 'FAIL'} {finding.rule}: {finding.example}: {finding.text}")
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        raise VerificationError(f"{file}: {len(failed)} of {len(findings)} examples fail")
    say(f"{file}: valid; {len(findings)} examples hold")


def show_result(report: "Report", out: Path) -> None:
    """The report and where it is written. Raises VerificationError for a result that is no success."""
    from convrewrite.reporting import render_text

    say(render_text(report))
    say(f"Written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if report.refused is not None:
        raise VerificationError(report.refused)


def _runner(source: str, factory: str | None, trust: bool) -> Any:
    """A module, or an ONNX file as a callable. A result folder gives its model."""
    from convrewrite import storing
    from convrewrite.verifying import OnnxModel

    path = Path(source)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise ModelLoadError(f"{source}: no such file; expected an ONNX file, a PyTorch model or a result folder")
        try:
            return OnnxModel(path, trust=trust)
        except VerificationError as error:  # exit code 1 says that two models differ, and this is none
            raise ModelLoadError(f"{error}; export it again") from error
    if (path / storing.PLAN).is_file() and factory is not None:
        return storing.load(path, load(factory, None, trust).model)
    return load(str(path / "model.pt") if path.is_dir() else source, factory, trust).model


def _show_verification(outcome: Any, examples: int, source: str) -> None:
    from tabulate import tabulate

    rows = [
        (p.name, f"{p.max_abs_difference:.2g}", f"{p.relative_error:.2g}", f"{p.tolerance:.0e}",
         "yes" if p.passed else "no", f"{f.relative_error:.3%}" if f.equal_share is None else "",
         _share(f.top1_agreement), "" if f.kl is None else f"{f.kl:.3g}", _share(f.equal_share))
        for p, f in zip(outcome.parity.outputs, outcome.fidelity.outputs, strict=True)
    ]  # fmt: skip
    headers = (
        "output", "max. diff.", "max. / max.", "tolerance", "the same", "rel. error", "top-1 agreement", "KL",
        "equal entries",
    )  # fmt: skip
    shown = len(headers) - all(f.equal_share is None for f in outcome.fidelity.outputs)
    say(tabulate([row[:shown] for row in rows], headers[:shown], disable_numparse=True))
    say(f"on {examples} of {source}")
    if outcome.fidelity.left_out:
        say(f"not compared, as they are no tensors: {', '.join(outcome.fidelity.left_out)}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _require_fidelity(fidelity: Any, agreement: float | None, error: float | None) -> None:
    for output in fidelity.outputs:
        if error is not None and output.relative_error > error:
            raise VerificationError(f"{output.name}: relative error {output.relative_error:.4f} exceeds {error:g}")
    if agreement is None:
        return
    scored = [output for output in fidelity.outputs if output.top1_agreement is not None]
    if not scored:
        raise VerificationError(
            "--agreement: expected an output of class scores, (N, K), found none; gate with --error"
        )
    for output in scored:
        if output.top1_agreement < agreement:
            raise VerificationError(f"{output.name}: top-1 agreement {output.top1_agreement} is below {agreement:g}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code. Every error this package raises on purpose is caught here and only here."""
    try:
        # A command returns nothing; a number is the code of typer.Exit, into which typer turns an interrupt as well.
        code = int(app(argv, standalone_mode=False) or 0)
    except ConvRewriteError as error:
        print(f"convrewrite: {error}", file=sys.stderr)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it; typer re-exports no common base
            raise
        if message := error.format_message().rstrip("."):  # without arguments the help is shown, and that is all
            print(f"convrewrite: {printable(message)}; see --help", file=sys.stderr)
        return 2
    if code == INTERRUPTED:
        print("convrewrite: interrupted; nothing was written", file=sys.stderr)
    return code


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
