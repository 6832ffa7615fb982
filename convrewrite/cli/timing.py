"""The commands that time: two models against each other, and everything that a plan may ask for."""

from pathlib import Path
from typing import Annotated, Any

import typer

from convrewrite.cli.expanded import Only, expanded
from convrewrite.cli.interrupts import tells_what_stands
from convrewrite.cli.options import AsJson, Comparing, Rules, Sources, Trust, runners_of
from convrewrite.cli.progress import progress_bars
from convrewrite.cli.voice import say, say_json, say_json_text
from convrewrite.errors import UsageError
from convrewrite.settings import Settings
from convrewrite.targets import (
    Comparison,
    Profile,
    Program,
    TorchEager,
    is_graphs,
    profile_graphs,
    save_profile,
    target_of,
)
from convrewrite.values import PROBE_SECONDS, counted

PROFILED = (
    "A model, whose options are timed here; or a folder of graphs that --graphs wrote, which takes no torch to time."
)


@expanded
def bench(
    *,
    a: Annotated[str, typer.Argument(metavar="A", help="The reference: .pt, .onnx, or a result folder.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    sources: Annotated[Sources, Only("input", "factory", "calib", "mean", "std", "resize")],
    asked: Annotated[Comparing, Only("threads", "rounds", "timeout", "runtime")],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Time A and B side by side, interleaved; the ratio is the median over rounds of paired ratios."""
    from convrewrite import reporting
    from convrewrite.cli.both_inputs import for_both
    from convrewrite.inputs import shapes_of
    from convrewrite.tables import table

    first, second = runners_of((a, b), sources.factory, trust, asked.timeout)
    both = for_both(first, second, sources, 0, (a, b)).whole_batches()
    inputs, notes = tuple(tensor[: both.batch or 1] for tensor in both.inputs), both.notes
    comparisons = _compared((a, b), (both.first, both.second), inputs, asked)
    if as_json:
        from convrewrite.cli.json_forms import Benched, BenchedRow

        found, shapes = tuple(map(BenchedRow.of, comparisons)), tuple(tuple(tensor.shape) for tensor in inputs)
        say_json(Benched(a=a, b=b, input_shapes=shapes, notes=notes, timings=found))
        return
    rows = [
        (c.runtime, reporting.duration(c.seconds_a), reporting.duration(c.seconds_b), f"{c.ratio:.3f}",
         f"{c.ratio_low:.3f} to {c.ratio_high:.3f}", f"{c.speedup:.2f}x")
        for c in comparisons
    ]  # fmt: skip
    say(table(("runtime", "A", "B", "B / A", "quartiles", "speed-up"), rows, "lrrrrr"))
    say(f"input {shapes_of(inputs)}, {counted(asked.threads, 'thread')}, median of {asked.rounds} interleaved rounds")
    for note in notes:
        say(f"Note: {note}")


def _compared(sources: tuple[str, str], runners: tuple[Any, Any], inputs: Any, asked: Comparing) -> list[Comparison]:
    """The two timed in the runtime that was asked for, and in eager torch too where both are modules."""
    from convrewrite import folders, runtime
    from convrewrite.onnx_files import OnnxModel

    target, (first, second) = target_of(asked.runtime), runners
    modules = not any(isinstance(runner, OnnxModel) for runner in runners)
    how: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds}
    if target.takes == "module":
        if not modules:
            raise UsageError(
                f"--runtime {target.name}: expected two PyTorch models, found an ONNX file; name another runtime"
            )
        return [runtime.compare_programs(Program(module=first), Program(module=second), inputs, target, **how)]
    with folders.temporary() as folder, progress_bars("bench") as progress:
        paths = []
        for index, (source, runner) in enumerate(zip(sources, runners, strict=True)):
            progress("bench", index, 4, f"export {source}")
            if isinstance(runner, OnnxModel):
                runner(*inputs)  # before it is timed, as it may not end
                paths.append(Path(runner.where))
            else:
                paths.append(runtime.export(runner, inputs, folder.path / f"{index}.onnx").path)
        progress("bench", 2, 4, target.name)
        whole = next((runner.feed(inputs) for runner in runners if isinstance(runner, OnnxModel)), inputs)
        found = [runtime.compare_programs(Program(onnx=paths[0]), Program(onnx=paths[1]), whole, target, **how)]
        if modules:
            progress("bench", 3, 4, "torch")
            eager = TorchEager()
            found.append(runtime.compare_programs(Program(module=first), Program(module=second), inputs, eager, **how))
        progress("bench", 4, 4, "done")
    return found


@tells_what_stands
@expanded
def profile(
    *,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=PROFILED)],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File for the times, as timings.json, for --timings elsewhere.")
    ] = None,
    graphs: Annotated[
        Path | None,
        typer.Option("--graphs", help="Time nothing: write the graphs to a new folder, for another machine."),
    ] = None,
    rule: Rules = None,
    sources: Annotated[Sources, Only("input", "factory", "calib")],
    settings: Annotated[Settings, Only("fast", "threads", "timeout", "runtime")],
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Time every option that a plan for MODEL may ask for, in a runtime on this machine; `--timings` plans by it elsewhere."""
    if (out is None) == (graphs is None):
        raise UsageError("profile: expected -o FILE for times, or --graphs FOLDER for another machine, and one of them")
    if graphs is not None and as_json:
        raise UsageError("--json: expected with -o, as --graphs measures nothing that could be printed; leave it out")
    if out is not None:
        Profile.check_place(out)
    idle = _idle(model, graphs, rule, sources, settings, trust)
    if is_graphs(Path(model)):
        if out is None:
            raise UsageError(
                f"--graphs: expected a model to make graphs of, found {model}, which holds graphs; time them, -o FILE"
            )
        found = profile_graphs(Path(model), settings.target, settings.threads, settings.rounds)
        _profiled(found, out, as_json, idle)
        return
    from convrewrite import pipeline
    from convrewrite.cli.networks import given_network

    network = given_network(model, sources, trust, settings.timeout)
    made = pipeline.profile(network.model, network.inputs, rule or ["balanced"], settings=settings, graphs=graphs)
    if made is None:
        for note in idle:
            say(f"Note: {note}")
        say(f"Written to {graphs}; there: convrewrite profile {graphs} --runtime NAME -o timings.json")
        return
    assert out is not None
    _profiled(made, out, as_json, idle)


def _idle(
    model: str, graphs: Path | None, rule: list[str] | None, sources: Sources, settings: Settings, trust: bool
) -> list[str]:
    """A sentence on the options that have no effect, as nothing is timed, or as graphs were made before."""
    if is_graphs(Path(model)):
        given = {
            "--rule": rule, "--input": sources.input, "--factory": sources.factory, "--calib": sources.calib, "--trust": trust,
            "--timeout": settings.timeout != PROBE_SECONDS,
        }  # fmt: skip
        why = f"{model} holds all that is timed"
    else:
        given = {"--threads": settings.threads != 1, "--fast": settings.fast} if graphs is not None else {}
        why = "--graphs times nothing; give it where the graphs are timed"
    idle = [option for option, value in given.items() if value]
    return [f"without effect: {', '.join(idle)}, as {why}"] if idle else []


def _profiled(found: Profile, out: Path, as_json: bool, notes: list[str]) -> None:
    """Write the times, and say so."""
    save_profile(found, out)
    if as_json:
        say_json_text(found.to_json().rstrip())  # as ``Timings``, whose module needs torch, which a device has not
        return
    for note in notes:
        say(f"Note: {note}")
    say(f"{len(found.seconds)} times in {found.describe()}. Written to {out}")
