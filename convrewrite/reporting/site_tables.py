"""Tables of sites for a terminal: one line per site, in the fullest form whose lines are not wider than the terminal.

What a form numbers is written out below the table; what it leaves out is named there, and is in the files of the report.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from convrewrite.escaping import printable
from convrewrite.tables import GAP, filled, natural_width, table


@dataclass(frozen=True, slots=True)
class Column:
    """A header, one cell for every site, and the side that they are aligned to, ``l`` or ``r``."""

    header: str
    cells: Sequence[str]
    side: str = "l"

    @property
    def shown(self) -> "Column":
        """The column with control characters written out, before anything is laid out by its length."""
        return replace(self, cells=[printable(cell) for cell in self.cells])


@dataclass(frozen=True, slots=True)
class NotedColumn:
    """A column of words in one of its forms; ``notes``: what its numbers stand for, from 1 on. A last ``resort`` says so little
    that columns are left out first."""

    column: Column
    notes: Sequence[str] = ()
    resort: bool = False


class Layout(NamedTuple):
    """Columns that are left out, and how many letters of each word in a name are kept at least; None: all of them."""

    without: tuple[str, ...] = ()
    letters: int | None = None


KIND, PARAMETERS = "kind", "param. ratio"

LAYOUTS = (Layout(), Layout((KIND,)), Layout((KIND,), 4), Layout((KIND, PARAMETERS), 1))
"""From the fullest to the shortest. The kind is left out first: the geometry says the same, if less plainly. Four letters
distinguish most words, and a ratio of parameters is much like that of MACs."""

LONGEST = 12
"""Most letters of a word in a name, where words are cut at all."""


def site_table(columns: Sequence[Column], forms: Sequence[NotedColumn], width: int, legend: Sequence[str] = ()) -> str:
    """The table in the first pair of a layout and one of the ``forms`` of its last column that takes one line per site; where
    none does, all columns with the last form, wrapped. The first column has names; empty columns are left out. ``legend`` is put
    below the notes."""
    columns, forms = [column.shown for column in columns], [replace(form, column=form.column.shown) for form in forms]
    columns = [column for column in columns if any(column.cells)]
    for layout, told in ((a, b) for a in LAYOUTS for b in forms if not b.resort or a is LAYOUTS[-1]):
        shown = [column for column in columns if column.header not in layout.without]
        shown += [told.column] if any(told.column.cells) else []
        room = width - GAP - natural_width([c.header for c in shown[1:]], _rows(shown[1:]))
        found = cut_names(shown[0].cells, room, layout.letters)
        if found is not None:
            shown[0] = replace(shown[0], cells=found.names)
            left_out = [column.header for column in columns if column.header in layout.without]
            cut = [] if found.letters is None else [f"letters of words in names after the first {found.letters}"]
            return _drawn(shown, told.notes, width, [*legend, *_left_out([*left_out, *cut])])
    return _drawn([*columns, forms[-1].column], forms[-1].notes, width, legend)


class Cut(NamedTuple):
    """Names, and how many letters their words were cut to, if they were."""

    names: Sequence[str]
    letters: int | None


def cut_names(names: Sequence[str], room: int, least: int | None) -> Cut | None:
    """Names of at most ``room`` columns. Words in them are cut, to ``least`` letters if need be: numbers stay, and names that
    differ still do. None where that is not enough."""
    if max(map(len, names), default=0) <= room:
        return Cut(names, None)
    for letters in range(LONGEST, (least or LONGEST + 1) - 1, -1):
        cut = [re.sub(rf"([^\W\d_]{{{letters}}})[^\W\d_]+", r"\1", name) for name in names]
        if max(map(len, cut)) <= room and len(set(cut)) == len(set(names)):
            return Cut(cut, letters)
    return None


def decisions(header: str, options: Sequence[str | None], reasons: Sequence[str | None]) -> tuple[NotedColumn, ...]:
    """What became of each site: its option, as :meth:`Option.describe` puts it, or the reason why it was kept.

    Four forms: in full; with reasons numbered; with options numbered too, except for their ranks, and their structures where
    there are several; and with nothing but numbers.
    """
    sites = list(zip(options, map(str, reasons), strict=True))
    several = len({option.split(", ")[0] for option in options if option}) > 1
    whole, ranks, bare = Notes(), Notes(), Notes()
    return (
        NotedColumn(Column(header, [option or f"kept: {reason}" for option, reason in sites])),
        _noted(header, [option or f"kept {whole[reason]}" for option, reason in sites], whole),
        _noted(header, [_short(o, ranks, several) if o else f"kept {ranks[reason]}" for o, reason in sites], ranks),
        _noted(header, [bare[o] if o else f"kept {bare[reason]}" for o, reason in sites], bare, resort=True),
    )


def verdicts(applies: Sequence[dict[str, str]]) -> tuple[NotedColumn, ...]:
    """What rules say of each site: ``yes``, or the reason why not. One rule has a column of its name; several share a column
    ``rules``, in two forms: by their names, and by how many they are."""
    rules = list(dict.fromkeys(rule for row in applies for rule in row))
    names, counts = Notes(), Notes()
    if len(rules) == 1:
        (rule,) = rules
        return (_noted(rule, ["yes" if row[rule] == "yes" else f"no {names[row[rule]]}" for row in applies], names),)
    return (
        _noted("rules", [_by_name(row, names) for row in applies], names),
        _noted("rules", [_by_count(row, counts) for row in applies], counts),
    )


class Notes(dict[str, str]):
    """Texts and their numbers, as ``[1]``; a new one gets the next."""

    def __missing__(self, text: str) -> str:
        self[text] = f"[{len(self) + 1}]"
        return self[text]


def _noted(header: str, cells: Sequence[str], notes: Notes, *, resort: bool = False) -> NotedColumn:
    return NotedColumn(Column(header, cells), tuple(notes), resort)


def _short(option: str, notes: Notes, several: bool) -> str:
    """``separable, rank 2 [1]``, where a note says the rest; without the structure where it is always the same."""
    structure, *parts = option.split(", ")
    numbers = [part for part in parts if re.fullmatch(r"\w+ \d+", part)]
    rest = [part for part in parts if part not in numbers]
    begins = ", ".join([*([structure] if several or not numbers else []), *numbers])
    return f"{begins} {notes[', '.join([structure, *rest])]}" if rest or not several else begins


def _by_name(row: dict[str, str], notes: Notes) -> str:
    """``yes: a, b; no: c [1]``, or ``yes: all``."""
    taken = [rule for rule, verdict in row.items() if verdict == "yes"]
    refused = [f"{rule} {notes[verdict]}" for rule, verdict in row.items() if verdict != "yes"]
    if len(taken) == len(row) > 1:
        return "yes: all"
    if len(refused) == len(row) > 1 and len(set(row.values())) == 1:
        return f"no: all {notes[next(iter(row.values()))]}"
    return "; ".join(f"{word}: {', '.join(rules)}" for word, rules in (("yes", taken), ("no", refused)) if rules)


def _by_count(row: dict[str, str], notes: Notes) -> str:
    """``2 of 3 [1]``, where a note says which do not; ``all``; ``none [1]``."""
    refusing: dict[str, list[str]] = {}
    for rule, verdict in row.items():
        if verdict != "yes":
            refusing.setdefault(verdict, []).append(rule)
    if not refusing:
        return "all" if row else ""
    taken = sum(verdict == "yes" for verdict in row.values())
    number = notes["; ".join(f"not {', '.join(rules)}: {reason}" for reason, rules in refusing.items())]
    return f"{taken} of {len(row)} {number}" if taken else f"none {number}"


def _left_out(parts: Sequence[str]) -> Iterator[str]:
    if parts:
        yield f"left out at this width: {', '.join(parts)}"


def _rows(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in columns), strict=True))


def _drawn(columns: Sequence[Column], notes: Sequence[str], width: int, legend: Sequence[str]) -> str:
    sites = table([c.header for c in columns], _rows(columns), "".join(c.side for c in columns), width)
    told = [filled(f"[{number}] {note}", "    ") for number, note in enumerate(notes, 1)]
    return "\n\n".join(part for part in (sites, "\n".join((*told, *map(filled, legend)))) if part)
