"""Whether the files in a result's folder are those that its report describes, by their SHA-256 in the report.

Reports of earlier versions have no digests, and nothing is checked, or only those of weights, and the plan is not checked.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from convrewrite.errors import ModelLoadError
from convrewrite.folders import read_text, write_errors
from convrewrite.onnx_files import digest_of
from convrewrite.reporting import Report

REPORT, PLAN = "report.json", "plan.json"


def with_digests(report: Report, files: Sequence[Path]) -> Report:
    """The report of a result that is in these files."""
    return report.model_copy(update={"digests": {file.name: digest_of(file) for file in files if file.is_file()}})


def require_reported(folder: Path, names: Sequence[str]) -> None:
    """As :func:`require_described`, by the report in the folder; nothing is checked where that is missing or cannot be read."""
    try:
        report = Report.read(read_text(folder / REPORT, ModelLoadError, "a report"))
    except (ModelLoadError, ValueError):
        return
    require_described(folder, report, names)


def require_described(folder: Path, report: Report, names: Sequence[str]) -> None:
    """Raise ModelLoadError where a file of these names in a result's folder, or weights that lie beside it, are not those that
    were measured."""
    if not report.digests:
        return
    beside = [name for name in report.digests if Path(name).name == name and name.startswith(tuple(names))]
    for name in dict.fromkeys((*names, *beside)):
        file = folder / name
        earlier = name == PLAN and name not in report.digests
        if earlier or not file.is_file():
            continue
        with write_errors(folder, "another folder"):
            same = digest_of(file) == report.digests.get(name)
        if not same:
            raise ModelLoadError(
                f"{file}: the folder is not what its report describes; expected the {name} that was measured, found another; "
                "put that back, or make the result anew from its plan (`convrewrite apply`)"
            )


def report_now(folder: Path, place: Path, report: Report) -> Report:
    """The report of a result's ``folder`` as it lies in ``place``, which may tell of further files by now. Raises ModelLoadError
    unless it is of the result that ``report`` was read of."""
    now: Report | None = None
    with suppress(ValueError):
        now = Report.read(read_text(place / REPORT, ModelLoadError, "a report"))
    if now is None or _identity(now) != _identity(report):
        raise ModelLoadError(
            f"{folder}: expected the result that this run began with, found another, which another run has put there meanwhile; "
            "run this again"
        )
    return now


def _identity(report: Report) -> dict[str, str] | str:
    """What differs between the reports of two results, whatever was added to their folders."""
    return report.digests or report.model_dump_json(exclude={"exports"})
