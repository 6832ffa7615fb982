"""Tables and lines keep to 80 columns, and lose nothing by it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convrewrite.tables import WIDTH, filled, shortened, table

WORDS = st.text(st.characters(whitelist_categories=("L", "N"), whitelist_characters="._"), min_size=1, max_size=30)
CELLS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)


def columns(text: str) -> int:
    return max(map(len, text.splitlines()))


def letters(text: str) -> list[str]:
    return sorted(letter for letter in text if not letter.isspace() and letter != "-")


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[str]], str]:
    alignment = draw(st.text("lr", min_size=1, max_size=6))
    headers = draw(
        st.lists(WORDS.filter(lambda word: len(word) <= 12), min_size=len(alignment), max_size=len(alignment))
    )
    cells = [CELLS if side == "l" else st.from_regex(r"[0-9]{1,8} %", fullmatch=True) for side in alignment]
    rows = draw(st.lists(st.tuples(*cells).map(list), max_size=4))
    return headers, rows, alignment


@given(tables())
def test_a_table_fits_and_holds_every_letter(made: tuple[list[str], list[list[str]], str]) -> None:
    headers, rows, alignment = made
    text = table(headers, rows, alignment)
    assert columns(text) <= WIDTH
    blocks = text.count("\n\n") + 1
    repeated = "".join([headers[0], *(row[0] for row in rows)])
    whole = "".join(headers) + "".join(cell for row in rows for cell in row)
    assert blocks > 1 or letters(text) == letters(whole)
    assert blocks == 1 or letters(text) == letters(whole + repeated * (blocks - 1))


def test_what_fits_stays_as_it_is() -> None:
    assert table(("a", "number"), [("x y", "1"), ("é", "22")], "lr").splitlines() == [
        "a    number", "---  ------", "x y       1", "é        22",
    ]  # fmt: skip
    assert table(("a", "b"), [], "lr") == "a  b\n-  -"


def test_lines_are_broken_before_words_and_names_behind_their_dots() -> None:
    sentence = " ".join(["word"] * 30)
    text = table(("name", "what"), [("one.layer.of.a.network", sentence)], "ll")
    assert "one.layer.of.a.network  word word" in text and columns(text) <= WIDTH
    named = table(("name",), [("layers." * 12 + "conv",)], "l").splitlines()[2:]
    assert len(named) == 2 and named[0].endswith("layers.") and named[1].endswith("layers.conv")


def test_columns_without_room_stand_below() -> None:
    headers = [f"figure{index}" for index in range(12)]
    text = table(("site", *headers), [("conv", *(str(index) * 7 for index in range(10)), "x", "y")], "l" + "r" * 12)
    upper, lower = text.split("\n\n")
    assert upper.split()[:2] == ["site", "figure0"] and lower.startswith("site  figure")
    assert set(upper.split()) | set(lower.split()) >= set(headers)


@pytest.mark.parametrize("indent", ["", "    "])
def test_only_long_lines_are_wrapped(indent: str) -> None:
    short, path = f"{indent}a  line with  gaps", indent + "a" * 100
    assert shortened(f"{short}\n\n{path}") == f"{short}\n\n{path}"
    wrapped = shortened(indent + "word " * 30).split("\n")
    assert len(wrapped) > 1 and all(line.startswith(f"{indent}  word") for line in wrapped[1:])
    assert filled("word " * 30, "  ").splitlines()[1].startswith("  word")
