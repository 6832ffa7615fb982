"""Tables and lines for a terminal or a pipe of 80 columns: cells are wrapped until they fit, and columns that do not fit are put
below."""

import re
import textwrap
from collections.abc import Sequence

WIDTH = 80
"""Columns of what is printed: a terminal has them, and a mail, a log or a page of documentation shows them whole."""

GAP = 2
"""Columns between two columns of a table."""

NARROWEST = 10
"""No column of text is narrowed below so many characters; the table is divided instead, as words in less are hard to read."""

STAND_INS = 0xF0000
"""First of the code points, of private use and one column wide, that stand in for letters of other scripts while a table is laid
out. tabulate counts a wide letter as two columns where wcwidth happens to be installed, and a table is the same text
everywhere."""

Rows = Sequence[Sequence[str]]


def table(headers: Sequence[str], rows: Rows, alignment: str, width: int = WIDTH) -> str:
    """A table of at most ``width`` columns; ``alignment`` has ``l`` or ``r`` for every column.

    Headers are wrapped, then cells aligned left, the widest first. Where that is not enough, the columns that do not fit are put
    in a table below, after the first column once more.
    """
    widths = _fitted(headers, rows, alignment, width)
    if widths is not None:
        return _drawn(headers, rows, widths, alignment)
    count = max(2, _columns_that_fit(headers, rows, alignment, width))
    first = [(row[:count]) for row in rows]
    rest = [(row[0], *row[count:]) for row in rows]
    parts = (
        _drawn(headers[:count], first, _narrowed(headers[:count], first, alignment[:count], width), alignment[:count]),
        table((headers[0], *headers[count:]), rest, alignment[0] + alignment[count:], width),
    )
    return "\n\n".join(parts)


def natural_width(headers: Sequence[str], rows: Rows) -> int:
    """Width of a table whose cells are whole, with nothing but its headers wrapped."""
    return _total([_natural(header, [row[i] for row in rows]) for i, header in enumerate(headers)])


def filled(text: str, indent: str = "", first: str = "", width: int = WIDTH) -> str:
    """A paragraph of at most ``width`` columns, except for longer words; ``first`` begins its first line, ``indent`` the
    others."""
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def shortened(text: str, width: int = WIDTH) -> str:
    """The lines; those longer than ``width`` are wrapped, and what follows is indented two columns more than their start."""
    return "\n".join(_shortened(line, width) for line in text.split("\n"))


def _shortened(line: str, width: int) -> str:
    words = line.lstrip()
    indent = line[: len(line) - len(words)]
    return line if len(line) <= width else filled(words, f"{indent}  ", indent, width)


def _fitted(headers: Sequence[str], rows: Rows, alignment: str, width: int) -> list[int] | None:
    """The width of each column; None where they do not fit."""
    widths = _narrowed(headers, rows, alignment, width)
    return widths if _total(widths) <= width else None


def _narrowed(headers: Sequence[str], rows: Rows, alignment: str, width: int) -> list[int]:
    """The width of each column, narrowed as far as needed: first only as far as lines break between words, then within words."""
    columns = [[header, *(row[i] for row in rows)] for i, header in enumerate(headers)]
    widths = [_natural(header, cells) for header, *cells in columns]
    for breaks_words in (False, True):
        least = [
            min(width, max(NARROWEST, 0 if breaks_words else _longest_word(cells))) if letter == "l" else width
            for width, cells, letter in zip(widths, columns, alignment, strict=True)
        ]
        while _total(widths) > width and (wide := [i for i in range(len(widths)) if widths[i] > least[i]]):
            widths[max(wide, key=lambda i: widths[i])] -= 1
    return widths


def _longest_word(cells: Sequence[str]) -> int:
    return max((len(word) for cell in cells for word in cell.split()), default=0)


def _natural(header: str, cells: Sequence[str]) -> int:
    """The width of a column when only its header is wrapped, at spaces."""
    lines = [line for cell in cells for line in cell.split("\n")]
    return max((len(text) for text in (*header.split(), *lines)), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * max(0, len(widths) - 1)


def _columns_that_fit(headers: Sequence[str], rows: Rows, alignment: str, width: int) -> int:
    return max(
        (
            count
            for count in range(1, len(headers))
            if _fitted(headers[:count], [row[:count] for row in rows], alignment[:count], width) is not None
        ),
        default=1,
    )


def _drawn(headers: Sequence[str], rows: Rows, widths: Sequence[int], alignment: str) -> str:
    from tabulate import tabulate  # only where a table is drawn: the command line prints other things without it

    cells = [[_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    names = ["\n".join(textwrap.wrap(header, max(1, width))) for header, width in zip(headers, widths, strict=True)]
    letters = sorted({letter for row in (names, *cells) for cell in row for letter in cell if not letter.isascii()})
    narrow = {ord(letter): chr(STAND_INS + index) for index, letter in enumerate(letters)}
    # Headers go as a row, since tabulate pads those that it knows as headers by two columns.
    text: str = tabulate(
        [[cell.translate(narrow) for cell in row] for row in (names, *cells)],
        tablefmt="plain",
        disable_numparse=True,
        colalign=["right" if letter == "r" else "left" for letter in alignment],
    )
    lines = text.translate({ord(stand_in): chr(letter) for letter, stand_in in narrow.items()}).split("\n")
    height = max(name.count("\n") for name in names) + 1
    lines.insert(height, (" " * GAP).join("-" * width for width in _widths([names, *cells])))
    return "\n".join(line.rstrip() for line in lines)


def _widths(rows: Rows) -> list[int]:
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]


class _Named(textwrap.TextWrapper):
    """Breaks names after their dots, slashes, commas and hyphens."""

    wordsep_simple_re = re.compile(r"(\s+|(?<=[./,-])(?=\S))")


def _wrapped(cell: str, width: int) -> str:
    """A cell in lines of at most ``width``; a word that is longer is broken."""
    wrapped = []
    for line in cell.split("\n"):
        broken = any(len(word) > width for word in line.split())
        wrapper = (_Named if broken else textwrap.TextWrapper)(max(1, width), break_on_hyphens=False)
        wrapped += wrapper.wrap(line) or [""]
    return "\n".join(wrapped)
