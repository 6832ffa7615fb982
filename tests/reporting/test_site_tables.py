"""Tables of sites: one line a site, in the fullest form that fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convrewrite.reporting.site_tables import Column, NotedColumn, cut_names, decisions, site_table, verdicts

MOBILE = ("features.0.0", "features.12.block.1.0", "features.12.block.2.fc1", "features.13.block.1.0")
OPTIONS = ("separable, rank 2, pointwise-first, as branches", "separable, rank 3, pointwise-first, as branches", None)
REASONS = (None, None, "it is the stem")


def cells(told: NotedColumn) -> list[str]:
    return list(told.column.cells)


@pytest.mark.parametrize(
    ("room", "least", "names", "letters"),
    [
        (23, None, MOBILE, None),
        (22, 4, ("feature.0.0", "feature.12.block.1.0", "feature.12.block.2.fc1", "feature.13.block.1.0"), 7),
        (11, 1, ("f.0.0", "f.12.b.1.0", "f.12.b.2.f1", "f.13.b.1.0"), 1),
    ],
)
def test_words_in_names_are_cut_alike_and_numbers_stay(
    room: int, least: int | None, names: tuple[str, ...], letters: int | None
) -> None:
    found = cut_names(MOBILE, room, least)
    assert found is not None and (tuple(found.names), found.letters) == (names, letters)


@pytest.mark.parametrize(("room", "least"), [(22, None), (15, 4), (5, 1)])
def test_names_are_left_whole_where_cutting_them_is_not_enough(room: int, least: int | None) -> None:
    assert cut_names(MOBILE, room, least) is None


@given(st.lists(st.from_regex(r"[a-z]{1,9}(\.([a-z]{1,9}|[0-9]{1,2})){0,4}", fullmatch=True), min_size=1, unique=True))
def test_names_that_differ_still_do(names: list[str]) -> None:
    found = cut_names(names, 20, 1)
    assert found is None or (len(set(found.names)) == len(names) and max(map(len, found.names)) <= 20)


def test_a_decision_has_its_ranks_in_the_table_and_the_rest_below() -> None:
    whole, reasons, ranks, bare = decisions("decision", OPTIONS, REASONS)
    assert cells(whole) == [*OPTIONS[:2], "kept: it is the stem"] and not whole.notes
    assert cells(reasons) == [*OPTIONS[:2], "kept [1]"] and reasons.notes == ("it is the stem",)
    assert cells(ranks) == ["rank 2 [1]", "rank 3 [1]", "kept [2]"]
    assert ranks.notes == ("separable, pointwise-first, as branches", "it is the stem")
    assert cells(bare) == ["[1]", "[2]", "kept [3]"] and bare.notes == (*OPTIONS[:2], "it is the stem")


def test_structures_are_named_where_there_are_several() -> None:
    told = decisions("becomes", ("cp, rank 16", "grouped, groups 4, rank 2", "separable, rank 1, last"), (None,) * 3)
    assert cells(told[2]) == ["cp, rank 16", "grouped, groups 4, rank 2", "separable, rank 1 [1]"]
    alone = decisions("becomes", ("cp, rank 16", "cp, rank 8"), (None, None))[2]
    assert cells(alone) == ["rank 16 [1]", "rank 8 [1]"] and alone.notes == ("cp",)


def test_verdicts_of_rules_are_named_or_counted() -> None:
    applies = [{"a": "yes", "b": "yes"}, {"a": "yes", "b": "no b"}, {"a": "no b", "b": "no b"}]
    names, counts = verdicts(applies)
    assert cells(names) == ["yes: all", "yes: a; no: b [1]", "no: all [1]"] and names.notes == ("no b",)
    assert cells(counts) == ["all", "1 of 2 [1]", "none [2]"]
    assert counts.notes == ("not b: no b", "not a, b: no b")
    (one,) = verdicts([{"a": "yes"}, {"a": "no b"}])
    assert (one.column.header, cells(one)) == ("a", ["yes", "no [1]"])
    assert not any(cell for told in verdicts([{}]) for cell in cells(told)), "no rules, no column"


@pytest.mark.parametrize(
    ("width", "headers", "first", "left_out"),
    [
        (140, ["site", "kind", "geometry", "ratio", "decision"], "features.12.block.1.0", ""),
        (78, ["site", "kind", "geometry", "ratio", "decision"], "features.12.block.1.0", ""),
        (68, ["site", "geometry", "ratio", "decision"], "features.12.block.1.0", "kind"),
        (56, ["site", "geometry", "ratio", "decision"], "featur.12.block.1.0",
         "kind, letters of words in names after the first 6"),
        (46, ["site", "geometry", "decision"], "feat.12.bloc.1.0",
         "kind, param. ratio, letters of words in names after the first 4"),
    ],
)  # fmt: skip
def test_a_table_says_what_fits_and_names_what_it_leaves_out(
    width: int, headers: list[str], first: str, left_out: str
) -> None:
    columns = [
        Column("site", MOBILE[1:]),
        Column("kind", ("standard", "standard", "depthwise")),
        Column("geometry", ("16->16 3x3 p1",) * 3),
        Column("calls", ()),
        Column("param. ratio", ("0.35x", "0.35x", ""), "r"),
    ]
    drawn, below = site_table(columns, decisions("decision", OPTIONS, REASONS), width, ("a legend",)).split("\n\n")
    heads, rows = drawn.split("\n")[:-4], drawn.split("\n")[-3:]
    assert sorted(" ".join(heads).replace("param.", "").split()) == sorted(headers)
    assert rows[0].split()[0] == first and rows[2].endswith("kept [2]" if width < 140 else "kept: it is the stem")
    assert max(map(len, drawn.split("\n"))) <= width
    said = " ".join(below.partition("a legend")[2].split())
    assert said == (f"left out at this width: {left_out}" if left_out else "")


def test_what_does_not_fit_at_all_is_wrapped() -> None:
    columns = [Column("site", ("a.b",)), Column("kind", ("standard",)), Column("geometry", ("word " * 20,))]
    text = site_table(columns, decisions("decision", ("cp, rank 1",), (None,)), 60)
    assert max(map(len, text.split("\n"))) <= 60 and text.count("word") == 20
