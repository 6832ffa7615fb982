"""The folder a run leaves: written aside and put in its place whole, and read again.

``weights.safetensors`` holds the whole state of the rewritten model, so that its plan, these weights and any instance of
the original architecture give the model back without running code from a file.
"""

import copy
import errno
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.escaping import printable
from convrewrite.exports import Written, file_names, kinds_of_exports
from convrewrite.folders import (
    Scratch,
    given_path,
    made_aside,
    remove,
    require_idle,
    require_replaceable,
    require_room,
    require_room_beside,
    resolved,
    temporary,
    unwritable,
    write_errors,
)
from convrewrite.modules import copy_model, put_on
from convrewrite.onnx_files import is_weights_of
from convrewrite.onnx_graph import is_graph
from convrewrite.places import PROCESSOR, place_of_model
from convrewrite.planning import Plan
from convrewrite.reporting import Report, render_html, render_markdown, render_summary
from convrewrite.results.digests import PLAN, REPORT, report_now, with_digests
from convrewrite.results.weights import warn_of, write_weights

WEIGHTS = "weights.safetensors"
ONNX, INT8 = "model.onnx", "model.int8.onnx"
MODEL, MARKDOWN, PAGE = "model.pt", "report.md", "report.html"
FILES = (MODEL, ONNX, PLAN, WEIGHTS, REPORT, MARKDOWN, PAGE)

REPORTS = frozenset({REPORT, MARKDOWN, PAGE})
"""A folder with no other files than these, and a plan of ours, may be replaced. Any other file may be someone's only copy, and
counts as part of a result only where a plan and a report of ours are beside it: a plan alone may lie beside the model that it was
made of."""

PLAN_START = re.compile(rb'"model"\s*:\s*\{\s*"geometry"')

REPORT_START = re.compile(rb'"schema_version"\s*:\s*\d+\s*,\s*"tool_version"')

STARTS_WITHIN = 1 << 16
"""The patterns that identify a plan and a report, even one of another version or a broken one, and within how many bytes they
must be."""


def check_writable(folder: Path, inputs: Sequence[str] = ()) -> None:
    """Raise UsageError unless results can be put into ``folder``: called before any long work.

    ``inputs`` name what the run reads; names of no existing file do not count. What runs that have ended left beside it is
    cleared.
    """
    with write_errors(folder, "another folder with -o"):
        place = resolved(folder)
        if place.exists():
            _check_replaceable(folder, place, inputs)
        require_room_beside(place)


def _check_replaceable(folder: Path, place: Path, inputs: Sequence[str]) -> None:
    """Only an earlier result is replaced, or an empty folder, and nothing that is in use."""
    if not place.is_dir():
        raise UsageError(f"{folder}: expected a folder for the results, found a file; name another with -o")
    require_idle(folder, place)
    names, known = {path.name for path in place.iterdir()}, {*FILES, INT8, *file_names()}
    ours = {name for name in names if name in known or is_weights_of(name, ONNX)}
    planned = (place / PLAN).is_file() and _holds(place / PLAN, PLAN_START)
    reported = (place / REPORT).is_file() and _holds(place / REPORT, REPORT_START)
    earlier = planned and (reported or ours <= {PLAN, *REPORTS})
    strangers = sorted(names - ours) or sorted(() if earlier else ours - REPORTS)
    if strangers:
        raise UsageError(
            f"{folder}: holds {', '.join(strangers[:3])}, which would be lost; name a new folder, or an earlier result"
        )
    require_replaceable(folder, place, "another folder with -o")
    read = [name for name in inputs if os.path.exists(name) and Path(os.path.realpath(name)).parent == place]
    if read:
        raise UsageError(
            f"{folder}: holds {read[0]}, which this run reads and would replace; name another folder with -o"
        )


def check_file(path: Path) -> None:
    """Raise UsageError unless a plan can be written to ``path``: called before any long work."""
    with write_errors(path, "another file with -o"):
        place = resolved(path)
        if place.is_dir():
            raise UsageError(f"{path}: expected a file for the plan, found a folder; name one in it, as {path / PLAN}")
        if place.exists() and not place.is_file():
            raise UsageError(f"{path}: expected a file for the plan, found a pipe or a device; name a file with -o")
        if place.exists() and not _holds(place, PLAN_START):
            raise UsageError(
                f"{path}: holds something else than a plan, which would be lost; name another file with -o"
            )
        if place.exists() and not os.access(place, os.W_OK):
            raise unwritable(path, os.strerror(errno.EACCES), "another file with -o")
        require_room_beside(place)


def _holds(place: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether a file may be replaced by another of its kind: it is empty, or begins as one of that kind."""
    with place.open("rb") as file:
        start = file.read(STARTS_WITHIN)
    return not start.strip() or pattern.search(start) is not None


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan aside and put it in its place. Raises UsageError when that fails."""
    with made_aside(path, "another file with -o") as made:
        made.write_text(plan.to_json(), encoding="utf-8")


def save(
    folder: Path, model: nn.Module, plan: Plan, report: Report, onnx: Path | None, further: Sequence[Path] = ()
) -> Path:
    """Write everything aside and put it in its place in one step; an earlier result there is replaced, unless the model that the
    report names lies in it.

    Raises UsageError when that fails, and then ``folder`` is as it was.
    """
    check_writable(folder, (report.model,))
    _require_there((*onnx_files(onnx), *further))
    if place_of_model(model).type != PROCESSOR:  # the files are for any machine
        model = put_on(torch.device(PROCESSOR), copy_model(model, as_it_is=True))
    with made_aside(folder, "another folder with -o") as made:
        made.mkdir()
        copy_into(
            made, (*onnx_files(onnx), *further)
        )  # after a recovery without gain, the earlier ONNX file is among them
        _write(made, model, plan, report)
    return folder


def add_exports(folder: Path, plan: Plan, report: Report, written: Sequence[Written]) -> Report:
    """Put further forms into a result's folder, in one step, and return the report that tells of them, which is in it then; all
    else in it stays, except the files of forms that the report says were refused. ``plan``, ``report``: what was there when the
    work began.

    Raises UsageError when that fails, ModelLoadError where another run has replaced the result; then ``folder`` stays as it is.
    """
    check_addable(folder)
    files = [path for form in written for path in form.files]
    with made_aside(folder, "another folder") as made:
        place = resolved(folder)
        before = _content_of(place)
        shutil.copytree(place, made, symlinks=True, copy_function=_linked)
        found = report_now(folder, made, report).with_exports(written)
        refused = {row.name for row in found.exports if row.refused is not None}
        gone = [name for form, export in kinds_of_exports().items() if form in refused for name in export.files]
        for name in (*REPORTS, *gone, *(path.name for path in files)):
            remove(made / name)  # only this name: the file may have another elsewhere
        copy_into(made, files)
        _write_reports(made, plan, found)
        if _content_of(place) != before:
            raise ModelLoadError(f"{folder}: another run has changed it while files were added to it; run this again")
    return found


def _content_of(place: Path) -> tuple[int, int]:
    """What differs as soon as a folder is exchanged for another, or a file in it added, replaced or removed."""
    found = os.stat(place)
    return found.st_ino, found.st_mtime_ns


def check_addable(folder: Path) -> None:
    """Raise UsageError unless files can be added to a result's folder: called before any long work."""
    with write_errors(folder, "another folder"):
        place = resolved(folder)
        require_replaceable(folder, place, "another folder")
        require_room_beside(place)


def _linked(source: str, place: str) -> None:
    """The same file under another name where the file system can, otherwise a copy; its old folder is removed once this one
    replaces it."""
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place, follow_symlinks=False)


def onnx_files(onnx: Path | None) -> list[Path]:
    """The ONNX file, and those that hold its weights beside it."""
    return [] if onnx is None else sorted({onnx, *onnx.parent.glob(f"{onnx.name}*")})


def _require_there(files: Sequence[Path]) -> None:
    gone = [path for path in files if not path.exists()]
    if gone:
        raise UsageError(f"{gone[0]}: was removed from the temporary files since the run; run it again")


def copy_into(folder: Path, files: Sequence[Path]) -> None:
    """Copies of files, and of folders with all that is in them; links in these stay links, which may lead to a device."""
    for file in files:
        if file.is_dir():
            shutil.copytree(file, folder / file.name, symlinks=True)
        else:
            shutil.copy(file, folder / file.name)


def _write(made: Path, model: nn.Module, plan: Plan, report: Report) -> None:
    """Write all files that are not copied; the report gets the digests of the files that are there by then, copied ones
    included."""
    if not is_graph(model):
        _save_module(model, made / MODEL)
        warn_of(write_weights(model, made / WEIGHTS))
        shutil.copymode(made / MODEL, made / WEIGHTS)  # safetensors writes a file that only its owner can read
    (made / PLAN).write_text(plan.to_json(), encoding="utf-8")
    _write_reports(made, plan, with_digests(report, [made / PLAN, made / WEIGHTS, *onnx_files(made / ONNX)]))


def _write_reports(made: Path, plan: Plan, report: Report) -> None:
    (made / REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (made / MARKDOWN).write_text(render_markdown(report), encoding="utf-8")
    (made / PAGE).write_text(render_html(report, plan), encoding="utf-8")


def _save_module(model: nn.Module, path: Path) -> None:
    """The whole module; for a class that cannot be pickled, or whose pickle makes a model that was not rewritten, its state dict,
    which needs the factory to be loaded."""
    try:
        if any(type(part).__reduce__ is not object.__reduce__ for part in model.modules()):
            copy_model(model)  # as a pickle is read: where a class makes itself anew, it finds other parts than it has
        torch.save(model, path)
        return
    except Exception as error:  # a user's class may refuse in any way
        refused = error
    require_room(path)
    warnings.warn(printable(f"the model cannot be pickled ({refused}); model.pt holds its state dict"), stacklevel=2)
    try:
        torch.save(model.state_dict(), path)
    except RuntimeError:
        require_room(path)
        raise


@dataclass(frozen=True, slots=True)
class Result:
    """The rewritten model, the plan it followed, and the report. It can be copied and pickled; a pickle has its files in it."""

    model: nn.Module
    plan: Plan
    report: Report
    _onnx: Path | None = field(repr=False)
    _folder: Scratch = field(repr=False)
    _further: Sequence[Path] = field(default=(), repr=False)

    @property
    def refused(self) -> str | None:
        """Why this result is no success, though everything ran: it is slower, loses more than was to be kept, or lacks a form
        that was asked for."""
        return self.report.refused or self.report.unwritten

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return render_summary(self.report)

    def save(self, folder: str | Path) -> Path:
        """Write model.pt, model.onnx, plan.json, weights.safetensors, report.json, report.md and report.html, and what else was
        asked for.

        For a model that came as ONNX, model.pt and weights.safetensors are left out: model.onnx is the result. All files are
        written aside and take their place together, in one step. Raises UsageError when the folder cannot be written or holds
        other things; then it is as it was.
        """
        return save(
            given_path(folder, "the folder to write"), self.model, self.plan, self.report, self._onnx, self._further
        )

    def __copy__(self) -> "Result":
        """A result of the same parts; the files last as long as any result that has them."""
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Result":
        """A result with a model of its own; nothing else in a result ever changes."""
        return replace(self, model=copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """What a pickle holds, the contents of the files included. Raises UsageError where the files are gone."""
        roots = (*onnx_files(self._onnx), *self._further)
        _require_there(roots)
        files = [file for root in roots for file in (root, *root.rglob("*")) if file.is_file()]
        contents = {self._name(file): file.read_bytes() for file in files}
        onnx = None if self._onnx is None else self._name(self._onnx)
        return _unpickled, (
            self.model,
            self.plan,
            self.report,
            contents,
            onnx,
            [self._name(path) for path in self._further],
        )

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder.path).as_posix()


def files_held(result: Result) -> tuple[Path | None, list[Path]]:
    """The ONNX file of a result, and its further files, where they lie until it is saved."""
    return result._onnx, list(result._further)


def _unpickled(
    model: nn.Module,
    plan: Plan,
    report: Report,
    contents: Mapping[str, bytes],
    onnx: str | None,
    further: Sequence[str],
) -> Result:
    """A result whose files are temporary ones of this process."""
    folder = temporary()
    with write_errors():
        for name, content in contents.items():
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            (folder.path / name).write_bytes(content)
    onnx_file = None if onnx is None else folder.path / onnx
    return Result(model, plan, report, onnx_file, folder, [folder.path / name for name in further])
