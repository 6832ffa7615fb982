"""Forms written, each held to torch on held-out inputs; what fails is left out, with the reason."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convrewrite.axes import doubled
from convrewrite.errors import ConvRewriteError, ExportError, UsageError, VerificationError
from convrewrite.escaping import innermost_cause
from convrewrite.exports.export import Export, Made, Opened, Source
from convrewrite.folders import disk_full, remove, require_room, temporary, unwritable, write_errors
from convrewrite.inputs import Inputs, in_batches_of, in_whole_batches
from convrewrite.meanings import Fidelity, Meaning, RunningFidelity
from convrewrite.modules import eval_mode
from convrewrite.onnx_files import OnnxModel, Runner, outputs_of
from convrewrite.process import FAKE_TENSORS, exporting
from convrewrite.progress import Progress
from convrewrite.runtime import RunningParity

LOG = logging.getLogger(__name__)

EXAMPLES = 256
"""Most held-out examples that a form is run on: they compare top classes to less than half a percent, within seconds."""

FEW = 4
"""Examples that a form is shown at a time: it may hold every value of a graph on them at the same time."""

ONNX = ".onnx"
"""The suffix of forms that are ONNX files."""

NOISY_LOGGERS = (
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torchao",
    "executorch",
    "coremltools",
    "root",
    FAKE_TENSORS,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """What forms are held to: the rewritten model, or its ONNX file where it has no other form; and the original, to which they
    are as near as the result, if all is well. ``batches`` are held-out inputs, to which ``feed`` adds what is the same
    for all examples; ``meanings`` are those of the outputs. ``judged``: what a form that is an ONNX file itself is held to."""

    rewritten: Runner
    original: Runner
    batches: tuple[Inputs, ...]
    meanings: Mapping[str, Meaning]
    feed: Callable[[Inputs], Inputs]
    judged: "Judged | None" = None

    @property
    def told(self) -> str:
        """What the rewritten model is, in a message."""
        return "the result's ONNX file" if isinstance(self.rewritten, OnnxModel) else "torch"


@dataclass(frozen=True, slots=True)
class Judged:
    """The files of result and original, giving the values that detections are chosen from: which are chosen may change with every
    rounding. ``open`` opens a form in the same way."""

    rewritten: OnnxModel
    original: OnnxModel
    open: Callable[[Path], OnnxModel]

    def opened(self, path: Path) -> Opened:
        """The values in float32, which a file in half precision has in float16."""
        model = self.open(path)
        return lambda inputs: [x.float() if x.is_floating_point() else x for x in model(*inputs).values()]


@dataclass(frozen=True, slots=True)
class Written:
    """A form: its files, their bytes, and the ``package`` that wrote them, with its version. ``parity`` is the worst output's
    largest difference to the rewritten model, that relative to its largest element, and its tolerance; ``fidelity`` is to the
    original. Both are None where the form could not be run, as ``notes`` say. ``refused``: why it was left out."""

    name: str
    package: str
    files: tuple[Path, ...] = ()
    size: int = 0
    parity: tuple[float, float, float] | None = None
    fidelity: Fidelity | None = None
    examples: int = 0
    notes: tuple[str, ...] = ()
    refused: str | None = None


def rehearse(exports: Sequence[Export], source: Source) -> None:
    """Write every form of the original and throw it away: before the long work, not after it.

    Raises UsageError for a form that needs a module or a file that is missing, ExportError for one that cannot be made.
    """
    for export in exports:
        _require_form(export, source)
    for export in exports:
        with temporary() as scratch:
            try:
                _write(export, source, scratch.path)
            except Exception as error:  # every package raises its own
                _require_room(error, scratch.path / export.files[0])
                raise ExportError(
                    f"export {export.name}: cannot be made of the original: {innermost_cause(error)}; leave it out"
                ) from error


def write_all(
    exports: Sequence[Export], source: Source, reference: Reference, folder: Path, progress: Progress
) -> tuple[Written, ...]:
    """Write every form into this folder and hold it to torch. One that cannot be written, or computes something else, leaves no
    file and has its reason."""
    found = []
    for index, export in enumerate(exports):
        progress("export", index, len(exports), export.name)
        _require_form(export, source)
        made = _written(export, source, reference, folder)
        LOG.info("export %s: %s", export.name, made.refused or f"{made.size:,} bytes")
        found.append(made)
    if exports:
        progress("export", len(exports), len(exports), "done")
    return tuple(found)


def _require_form(export: Export, source: Source) -> None:
    if export.takes == "module" and source.module is None:
        raise UsageError(f"export {export.name}: expected a PyTorch model, found an ONNX graph; leave it out")
    if source.onnx is None:
        require_no_file((export,))


def require_no_file(exports: Sequence[Export]) -> None:
    """Raise UsageError for forms that are made of an ONNX file, where there will be none."""
    for name in (export.name for export in exports if export.takes == "onnx"):
        raise UsageError(
            f"export {name}: is made of the ONNX file, found none; leave out --no-onnx (in Python measure=False) "
            "where the result is made, or this form"
        )


def _written(export: Export, source: Source, reference: Reference, folder: Path) -> Written:
    package = f"{export.package} {export.version()}"
    try:
        made = _write(export, source, folder)
    except Exception as error:  # every package raises its own
        _require_room(error, folder / export.files[0])
        _leave_out(export, folder)
        return Written(export.name, package, refused=f"cannot be written: {innermost_cause(error)}")
    files = tuple(path for path in (folder / name for name in export.files) if path.exists())
    written = Written(export.name, package, files, sum(map(_bytes, files)), notes=made.notes)
    reason = export.runs_here()
    if reason is not None:
        return replace(written, notes=(*written.notes, f"not compared with torch here: {reason}"))
    try:
        return _held(export, made, reference, written)
    except Exception as error:  # every runtime raises its own, too
        _require_room(error, folder / export.files[0])
        _leave_out(export, folder)
        said = str(error) if isinstance(error, ConvRewriteError) else innermost_cause(error)
        return replace(written, files=(), size=0, refused=said)


def _write(export: Export, source: Source, folder: Path) -> Made:
    with exporting(NOISY_LOGGERS), eval_mode(source.module):
        return export.write(source, folder / export.files[0])


def _require_room(error: Exception, path: Path) -> None:
    """Raise UsageError if the disk is full, which says nothing of a form: what was written in it before stays. Not every package
    tells why it could not write."""
    full = disk_full(error)
    if full is not None:
        raise unwritable(path, full) from error
    if not path.is_dir():
        with write_errors(path):
            require_room(path)


def _held(export: Export, made: Made, reference: Reference, written: Written) -> Written:
    """Raises VerificationError where the file computes something else than the rewritten model."""
    meanings = reference.meanings
    parity = RunningParity(export.name, meanings, export.tolerance, reference.feed(reference.batches[0]))
    fidelity = RunningFidelity(meanings)
    examples, comparable = 0, True
    with exporting(NOISY_LOGGERS), eval_mode(reference.rewritten, reference.original):
        run = export.open(written.files[0])
        if reference.judged is not None and written.files[0].suffix == ONNX:
            run(_copied(reference.feed(_batches(reference.batches, made.batch)[0])))  # as it is, it must run too
            run = reference.judged.opened(written.files[0])
            reference = replace(
                reference,
                rewritten=reference.judged.rewritten,
                original=reference.judged.original,
                feed=lambda batch: batch,  # these hold the rest
            )
        for batch in _batches(reference.batches, made.batch):
            given = reference.feed(batch)
            expected, _ = outputs_of(reference.rewritten, given)
            found = parity.add_arrays(expected, run(_copied(given)), _listed(reference))
            original, _ = outputs_of(reference.original, given)
            comparable = comparable and expected.keys() == original.keys() == meanings.keys()
            if comparable:
                fidelity.add(original, found)
            examples += len(batch[0])
        for given in map(reference.feed, _other_sizes(reference.batches[0], made)):
            parity.add_arrays(outputs_of(reference.rewritten, given)[0], run(_copied(given)), _listed(reference))
    worst = max(parity.result().outputs, key=lambda output: output.relative_error / output.tolerance)
    if not worst.passed:
        raise VerificationError(
            f"output {worst.name!r}: expected {export.name} within {worst.tolerance:.1e} of {reference.told} (relative), "
            f"found {worst.relative_error:.3g} (largest difference {worst.max_abs_difference:.3g}); the file was left out"
        )
    near = Fidelity(fidelity.outputs(), examples, meanings=meanings) if comparable else None
    parted = (worst.max_abs_difference, worst.relative_error, worst.tolerance)
    return replace(written, parity=parted, fidelity=near, examples=examples)


def _listed(reference: Reference) -> tuple[str, ...]:
    """Names of outputs as a file lists them, some of them twice."""
    return reference.rewritten.output_names if isinstance(reference.rewritten, OnnxModel) else ()


def _copied(inputs: Inputs) -> Inputs:
    """Copies, for a program that works on its inputs in place, as its model does."""
    return tuple(tensor.clone() for tensor in inputs)


def _batches(batches: Sequence[Inputs], size: int | None) -> list[Inputs]:
    """At most :data:`EXAMPLES` examples, or one batch, in batches that the file takes."""
    few, left = [], max(EXAMPLES, size or 0)
    for batch in batches:
        if left > 0:
            few.append(tuple(tensor[:left] for tensor in batch))
            left -= len(batch[0])
    if size is None:
        return few
    found = list(in_batches_of(few, size))
    if not found:
        raise VerificationError(
            f"expected at least {size} held-out inputs, as the file takes so many at a time; give more"
        )
    return found


def in_slices(batches: Sequence[Inputs], size: int | None) -> tuple[Inputs, ...]:
    """Inputs in slices of :data:`FEW` examples, the last of a batch maybe shorter; of ``size`` where a graph takes so many at a
    time."""
    if size is not None:
        return in_whole_batches(batches, size)
    return tuple(
        tuple(tensor[start : start + FEW] for tensor in batch)
        for batch in batches
        for start in range(0, len(batch[0]), FEW)
    )


def _other_sizes(batch: Inputs, made: Made) -> list[Inputs]:
    """Inputs of another size along every axis that may have any."""
    few = tuple(tensor[: made.batch or 1] for tensor in batch)
    return [*([few] if made.batch is None else []), *(doubled(few, name) for name in made.beyond)]


def _bytes(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _leave_out(export: Export, folder: Path) -> None:
    for name in export.files:
        remove(folder / name)
