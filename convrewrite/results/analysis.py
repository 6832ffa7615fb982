"""What an analysis leaves: the sites of a model as a value, and as a page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from convrewrite.errors import UsageError
from convrewrite.folders import made_aside, require_room_beside, resolved, write_errors
from convrewrite.reporting import AnalysisRow, render_analysis, render_rows

PAGE_START, PAGE_TITLE = b"<!DOCTYPE html>", b": its convolutions</title>"

TITLED_WITHIN = 1 << 14
"""How a page of an analysis begins, the end of its title, and within how many bytes both are: other pages are someone's own."""

OTHER = "another file with --page"


class Analysis(tuple[AnalysisRow, ...]):
    """The sites of a model, one row each. ``model`` is its name, ``notes`` are those of its loading."""

    model: str
    notes: tuple[str, ...]

    def __new__(cls, rows: Iterable[AnalysisRow], model: str = "model", notes: Sequence[str] = ()) -> "Analysis":
        """A tuple of the rows, with a name."""
        made = super().__new__(cls, rows)
        made.model, made.notes = model, tuple(notes)
        return made

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return render_rows(self.model, self)

    def save_page(self, path: str | Path) -> Path:
        """Write the page that shows it, one HTML file; an earlier page there is replaced. Raises UsageError where that fails."""
        path = Path(path)
        check_page(path)
        with made_aside(path, OTHER) as made:
            made.write_text(render_analysis(self.model, self, self.notes), encoding="utf-8")
        return path


def check_page(path: Path) -> None:
    """Raise UsageError unless a page can be written to ``path``: called before any long work."""
    with write_errors(path, OTHER):
        place = resolved(path)
        if place.exists() and not (place.is_file() and _holds_page(place)):
            raise UsageError(
                f"{path}: holds something else than a page of an analysis, which would be lost; name {OTHER}"
            )
        require_room_beside(place)


def _holds_page(place: Path) -> bool:
    with place.open("rb") as file:
        start = file.read(TITLED_WITHIN)
    return not start or (start.startswith(PAGE_START) and PAGE_TITLE in start)
