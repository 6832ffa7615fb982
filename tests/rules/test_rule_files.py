"""Rule files: what they take, what they refuse, and what they say when they are wrong."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convrewrite.conv import ConvSpec, classify
from convrewrite.errors import RuleFileError
from convrewrite.rules import files
from convrewrite.rules.schema import Match, Protect, Range, Rule, RuleFile, Subject

STRUCTURES = ("separable", "asymmetric", "grouped", "channel", "tucker", "cp")
RULE = '[[rule]]\nname = "a"\nstructures = ["separable"]\n'
HEAD = "schema = 1\n"


def applies(structure: str, spec: ConvSpec) -> str | None:
    """A stand-in for the structures: spatial ones need a kernel of more than one position."""
    if structure not in STRUCTURES:
        raise KeyError(structure)
    if structure != "channel" and spec.kernel_size == (1, 1):
        return "the kernel has a single position"
    return None


def subject(
    spec: ConvSpec | None = None, name: str = "layer3.0.conv1", stem: bool = False, share: float = 1.0
) -> Subject:
    spec = spec or ConvSpec(64, 64, (3, 3))
    return Subject(name, classify(spec), spec, stem, share)


def write(folder: Path, text: str) -> Path:
    path = folder / "x.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(RuleFileError) as caught:
        files.load_rule_file(write(folder, text))
    message = str(caught.value)
    assert all(line.startswith(f"{folder / 'x.toml'}: ") for line in message.splitlines())
    return message.replace(f"{folder / 'x.toml'}: ", "")


@pytest.mark.parametrize("name", ["separable", "asymmetric", "grouped", "balanced"])
def test_built_in_rules_pass_their_own_examples(name: str) -> None:
    file = files.load_rule_file(files.builtin_rules()[name])
    findings = files.check(file, applies)
    assert file.rule[0].name == name
    assert name in file.description.lower()
    assert len(findings) == sum(len(rule.accepts) + len(rule.rejects) for rule in file.rule) >= 7
    assert [finding for finding in findings if not finding.passed] == []


def test_built_in_rules_are_exactly_the_files_of_the_folder() -> None:
    assert list(files.builtin_rules()) == ["asymmetric", "balanced", "grouped", "separable"]


def test_defaults_are_the_documented_ones(tmp_path: Path) -> None:
    rule = files.load_rule_file(write(tmp_path, HEAD + RULE)).rule[0]
    assert (rule.protect.stem, rule.protect.min_channels, rule.protect.min_mac_share) == (None, None, 0.001)
    assert rule.require.model_dump() == {"min_mac_saving": 0.05, "max_output_error": None, "min_latency_gain": None}
    assert rule.refuse(subject()) is None


@pytest.mark.parametrize(
    ("match", "spec", "key", "text"),
    [
        ({"kind": "standard"}, ConvSpec(64, 64, (3, 3), groups=64), "kind",
         "kind is depthwise, the rule takes standard"),
        ({"kernel_size": [3, 3]}, ConvSpec(64, 64, (5, 5)), "kernel_size", "kernel_size is 5x5, the rule takes 3x3"),
        ({"kernel_size": [[3, 3], [5, 5]]}, ConvSpec(64, 64, (1, 3)), "kernel_size",
         "kernel_size is 1x3, the rule takes 3x3, 5x5"),
        ({"stride": [1, 1]}, ConvSpec(64, 64, (3, 3), (2, 2)), "stride", "stride is 2x2, the rule takes 1x1"),
        ({"dilation": [1, 1]}, ConvSpec(64, 64, (3, 3), dilation=(2, 2)), "dilation",
         "dilation is 2x2, the rule takes 1x1"),
        ({"in_channels": {"min": 65}}, ConvSpec(64, 64, (3, 3)), "in_channels",
         "in_channels is 64, the rule takes 65 or more"),
        ({"out_channels": {"max": 63}}, ConvSpec(64, 64, (3, 3)), "out_channels",
         "out_channels is 64, the rule takes 63 or less"),
        ({"groups": 1}, ConvSpec(64, 64, (3, 3), groups=4), "groups", "groups is 4, the rule takes 1"),
        ({"name": "layer[12].*"}, ConvSpec(64, 64, (3, 3)), "name",
         "the name layer3.0.conv1 does not match layer[12].*"),
    ],
)  # fmt: skip
def test_every_match_key_refuses_with_its_own_sentence(
    match: dict[str, object], spec: ConvSpec, key: str, text: str
) -> None:
    rule = Rule(name="a", structures=("separable",), match=Match.model_validate(match))
    refusal = rule.refuse(subject(spec))
    assert refusal is not None
    assert (refusal.key, refusal.text) == (key, text)


def test_a_name_has_to_match_as_a_whole() -> None:
    rule = Rule(name="a", structures=("separable",), match=Match(name="layer3"))
    assert rule.refuse(subject(name="layer3")) is None
    assert rule.refuse(subject(name="layer30")) is not None


@pytest.mark.parametrize(
    ("look", "key"),
    [
        (subject(stem=True), "protect.stem"),
        (subject(ConvSpec(64, 7, (3, 3))), "protect.min_channels"),
        (subject(ConvSpec(7, 64, (3, 3))), "protect.min_channels"),
        (subject(share=0.0009), "protect.min_mac_share"),
    ],
)
def test_protection_covers_the_stem_and_small_sites_and_can_be_lifted(look: Subject, key: str) -> None:
    protected = Rule(name="a", structures=("separable",))
    open_rule = Rule(name="a", structures=("separable",), protect=Protect(stem=False, min_channels=0, min_mac_share=0))
    refusal = protected.refuse(look)
    assert refusal is not None
    assert refusal.key == key
    assert open_rule.refuse(look) is None


@pytest.mark.parametrize(
    ("share", "told"),
    [(0.0004, "0.04% of the convolutions' MACs, the rule asks for 0.10%"), (0.000998, "0.0998% .*asks for 0.1000%")],
)
def test_a_share_that_narrowly_misses_what_a_rule_asks_for_is_told_in_digits_that_show_it(
    share: float, told: str
) -> None:
    refusal = Rule(name="a", structures=("separable",)).refuse(subject(share=share))
    assert refusal is not None and re.search(told, refusal.text)


@pytest.mark.parametrize("look", [subject(stem=True, share=0.05), subject(ConvSpec(1, 64, (9, 1)), share=0.05)])
def test_of_sites_with_a_tenth_of_what_a_budget_leaves_measured_effects_decide(look: Subject) -> None:
    rule = Rule(name="a", structures=("separable",))
    for left in (None, 0.51):
        refusal = rule.refuse(replace(look, left=left))
        assert refusal is not None
        assert refusal.text.endswith("; it takes part within a budget that leaves 0.5 or less of the MACs")
    told = rule.refuse(replace(look, mac_share=0.01299))
    assert told is not None
    assert told.text.endswith(" that leaves 0.12 or less of the MACs"), "rounded down, or it would not take part there"
    within = replace(look, left=0.5)
    assert rule.refuse(within) is None
    assert rule.refuse(replace(within, left=1.0, mac_share=0.1)) is None
    assert rule.refuse(replace(within, left=0.2, mac_share=0.02)) is None, "0.02 / 0.1 is a little less in binary"
    small = rule.refuse(replace(look, mac_share=0.009))
    assert small is not None
    assert "budget" not in small.text
    as_told = Protect(stem=True, min_channels=8)
    refusal = rule.model_copy(update={"protect": as_told}).refuse(within)
    assert refusal is not None
    assert "budget" not in refusal.text


@given(st.integers(1, 99), st.integers(1, 99), st.integers(1, 99))
def test_a_range_holds_both_its_ends_and_nothing_beyond(low: int, high: int, number: int) -> None:
    low, high = sorted((low, high))
    assert (number in Range(min=low, max=high)) == (low <= number <= high)
    assert (number in Range(min=low)) == (low <= number)
    assert (number in Range(max=high)) == (number <= high)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("require = { min_mac_saving = 1.5 }",
         "rule[0].require.min_mac_saving: expected a number in (0, 1), found 1.5 (rule a)"),
        ("ratio = true", "rule[0].ratio: expected a number in (0, 1), found true (rule a)"),
        ("ratio = nan", "rule[0].ratio: expected a number in (0, 1), found NaN (rule a)"),
        ("rato = 0.5", "rule[0].rato: unknown key; expected one of name, reference, match, structures, parameters, "
         "ratio, protect, require, accepts, rejects; did you mean ratio? (rule a)"),
        ("match = { in_chanels = 3 }", "rule[0].match.in_chanels: unknown key; expected one of kind, kernel_size, "
         "stride, dilation, in_channels, out_channels, groups, name; did you mean in_channels? (rule a)"),
        ("match = { in_channels = { mim = 3 } }",
         "rule[0].match.in_channels.mim: unknown key; expected one of min, max; did you mean min? (rule a)"),
        ("match = { in_channels = { min = 9, max = 3 } }",
         "rule[0].match.in_channels: expected min to be at most max, found min = 9 and max = 3 (rule a)"),
        ("match = { in_channels = 1.5 }", "rule[0].match.in_channels: expected a whole number of at least 1, or a "
         "table { min = .., max = .. }, found 1.5 (rule a)"),
        ("match = { kernel_size = 3 }", "rule[0].match.kernel_size: expected a pair of whole numbers [height, width], "
         "or a list of such pairs, found 3 (rule a)"),
        ("match = { kind = ['standart'] }", "rule[0].match.kind[0]: expected one of standard, pointwise, asymmetric, "
         "dilated, depthwise, grouped, separable, transposed, dynamic, found \"standart\"; did you mean "
         "standard? (rule a)"),
        ("match = { kind = [] }", "rule[0].match.kind: expected a list with at least one entry, found [] (rule a)"),
        ("match = { name = '(' }",
         "rule[0].match.name: expected a regular expression without backreferences and lookarounds (the syntax of RE2), "
         "found \"(\" (rule a)"),
        ("match = 3", "rule[0].match: expected a table, found 3 (rule a)"),
        ("protect = { stem = 1 }", "rule[0].protect.stem: expected true or false, found 1 (rule a)"),
        ("parameters = { grouped = { groups = [4] } }",
         "rule[0]: parameters.grouped: expected one of the rule's structures, separable (rule a)"),
        ("parameters = { separable = { order = [[1]] } }",
         "rule[0].parameters.separable.order[0]: expected a number or text, found [1] (rule a)"),
        ("parameters = { separable = { order = 'depthwise-first' } }",
         "rule[0].parameters.separable.order: expected a list with at least one entry, found "
         "\"depthwise-first\" (rule a)"),
        ("[[rule.accepts]]\nconv = { in_channels = 64, kernel_size = [3, 3] }",
         "rule[0].accepts[0].conv.out_channels: this key is required, found nothing (rule a)"),
        ("[[rule.accepts]]\nconv = { in_channels = 6, out_channels = 6, kernel_size = [3, 3], groups = 4 }",
         "rule[0].accepts[0].conv: expected groups to divide both channel counts, found groups = 4, in_channels = 6 "
         "and out_channels = 6 (rule a)"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named_with_what_was_expected_and_found(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, HEAD + RULE + text) == expected


def test_all_findings_of_a_file_are_reported_together(tmp_path: Path) -> None:
    second = '[[rule]]\nname = "b"\nstructures = []\nratio = 2\n'
    lines = complaint(tmp_path, "schema = 2\n" + RULE + "ratio = 0\n" + second).splitlines()
    assert lines == [
        "schema: expected 1, found 2",
        "rule[0].ratio: expected a number in (0, 1), found 0 (rule a)",
        "rule[1].structures: expected a list with at least one entry, found [] (rule b)",
        "rule[1].ratio: expected a number in (0, 1), found 2 (rule b)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "rule = []", "rule: expected a list with at least one entry, found []"),
        (HEAD, "rule: this key is required, found nothing"),
        (HEAD + RULE + RULE, "expected a different name for every rule, found a more than once"),
        (HEAD + "rule = [3]", "rule[0]: expected a table, found 3"),
    ],
)
def test_a_file_needs_rules_with_different_names(tmp_path: Path, text: str, expected: str) -> None:
    assert complaint(tmp_path, text) == expected


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    message = complaint(tmp_path, HEAD + "name = = 3")
    assert message.startswith("not valid TOML: ")
    assert "line 2" in message


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(RuleFileError, match=r"none\.toml: cannot be read \(No such file"):
        files.load_rule_file(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    with pytest.raises(RuleFileError, match="expected a rule file in TOML, encoded in UTF-8"):
        files.load_rule_file(tmp_path / "latin.toml")


def test_one_rule_alone_is_a_list_of_it() -> None:
    rules = files.resolve(["separable"])
    assert files.resolve("separable") == files.resolve(rules[0]) == rules


@pytest.mark.parametrize(
    ("rules", "found"),
    [(None, "None"), (3, "3"), ({"a": 1}, "{'a': 1}"), ([3], "3 among them"), ([], "none"), ((), "none")],
)
def test_what_names_no_rules_is_refused(rules: Any, found: str) -> None:
    with pytest.raises(
        RuleFileError, match=rf'^rules: expected names of .*, as \["separable"\], found {re.escape(found)}; leave'
    ):
        files.resolve(rules)


def test_resolve_takes_names_paths_and_objects_and_counts_each_rule_once(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + RULE)
    file = files.load_rule_file(path)
    resolved = files.resolve(["separable", path, str(path), file, file.rule[0], "separable"])
    assert [rule.name for rule in resolved] == ["separable", "a"]


def test_resolve_names_the_built_in_rules_and_a_near_match() -> None:
    expected = "seperable: .* built-in rules asymmetric, balanced, grouped, separable; did you mean separable?"
    with pytest.raises(RuleFileError, match=expected):
        files.resolve(["seperable"])
    with pytest.raises(RuleFileError, match=r"seperable\.toml: cannot be read"):
        files.resolve(["seperable.toml"])


def test_resolve_refuses_two_different_rules_of_one_name() -> None:
    one, other = (Rule(name="a", structures=("cp",), ratio=ratio) for ratio in (0.5, 0.4))
    with pytest.raises(RuleFileError, match="two different rules are named a"):
        files.resolve([one, other])


EXAMPLES = """
match = { kind = ["standard", "pointwise"], name = "layer[34].*" }
[[rule.accepts]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }
[[rule.accepts]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }
name = "layer2.0.conv1"
[[rule.accepts]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [1, 1] }
[[rule.rejects]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [1, 1] }
reason = "structure"
[[rule.rejects]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3], groups = 64 }
reason = "stride"
[[rule.rejects]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }
reason = "kind"
[[rule.rejects]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [1, 1] }
reason = "kind"
[[rule.rejects]]
conv = { in_channels = 64, out_channels = 64, kernel_size = [3, 3] }
kind = "dynamic"
reason = "kind"
"""


def test_check_says_which_examples_do_not_hold(tmp_path: Path) -> None:
    findings = files.check(files.load_rule_file(write(tmp_path, HEAD + RULE + EXAMPLES)), applies)
    assert [(finding.example, finding.passed, finding.text) for finding in findings] == [
        ("accepts[0]", True, "taken, as expected"),
        ("accepts[1]", False, "the name layer2.0.conv1 does not match layer[34].*"),
        ("accepts[2]", False, "separable: the kernel has a single position"),
        ("rejects[0]", True, "refused by structure, as expected"),
        ("rejects[1]", False,
         "expected a refusal by stride, found one by kind: kind is depthwise, the rule takes standard, pointwise"),
        ("rejects[2]", False, "expected a refusal by kind, found that the rule takes it"),
        ("rejects[3]", False, "expected a refusal by kind, found one by structure"),
        ("rejects[4]", True, "refused by kind, as expected"),
    ]  # fmt: skip


def test_check_finds_a_structure_that_does_not_exist() -> None:
    file = RuleFile(schema=1, rule=(Rule(name="a", structures=("cp", "winograd")),))
    (finding,) = files.check(file, applies)
    assert not finding.passed
    assert "winograd" in finding.text


def test_rules_survive_json() -> None:
    for path in files.builtin_rules().values():
        file = files.load_rule_file(path)
        assert RuleFile.model_validate_json(file.model_dump_json(by_alias=True)) == file


KEYS = ["schema", "rule", "name", "match", "kind", "kernel_size", "in_channels", "min", "structures", "parameters",
        "ratio", "protect", "stem", "require", "accepts", "rejects", "conv", "padding", "reason", "other"]  # fmt: skip
LEAVES = st.one_of(st.integers(-2, 3), st.floats(), st.booleans(), st.sampled_from(["standard", "separable", "(", ""]))
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner), max_leaves=12
)


@given(st.dictionaries(st.sampled_from(KEYS), TREES))
@settings(max_examples=60)
def test_any_table_is_a_rule_or_an_explained_error(table: dict[str, object]) -> None:
    rule = {"name": "a", "structures": ["separable"]} | table
    lines = []
    try:
        files.read_table({"schema": 1, "rule": [rule]}, "x.toml")
    except RuleFileError as error:
        lines = str(error).splitlines()
    assert len(lines) <= files.MOST_FINDINGS + 1
    assert all(line.startswith("x.toml: rule[0]") for line in lines[: files.MOST_FINDINGS])
    assert bool(lines) or set(table) <= set(Rule.model_fields)


def test_of_very_many_findings_the_first_are_told_and_the_others_counted() -> None:
    for count, more in (
        (files.MOST_FINDINGS, []),
        (files.MOST_FINDINGS + 3, ["x.toml: 3 more findings; mend these first"]),
    ):
        wrong = {f"key{index}": 1 for index in range(count)}
        with pytest.raises(RuleFileError) as told:
            files.read_table({"schema": 1, "rule": [{"name": "a", "structures": ["separable"], **wrong}]}, "x.toml")
        lines = str(told.value).splitlines()
        assert len(lines) == files.MOST_FINDINGS + len(more) and lines[files.MOST_FINDINGS :] == more
        assert all(line.startswith("x.toml: rule[0]") for line in lines[: files.MOST_FINDINGS])


@pytest.mark.parametrize("value", ["true", "1.0", "2", '"1"'])
def test_the_schema_is_the_number_one(tmp_path: Path, value: str) -> None:
    assert complaint(tmp_path, f"schema = {value}\n{RULE}").startswith("schema: expected 1, found ")


def test_a_mark_of_an_editor_at_the_beginning_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(HEAD + RULE, encoding="utf-8-sig")
    assert files.load_rule_file(tmp_path / "x.toml").rule[0].name == "a"
