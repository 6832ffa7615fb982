"""The commands that show and check rules."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from convrewrite.cli.grouped import Commands, command, examples_of
from convrewrite.cli.options import AsJson
from convrewrite.cli.voice import say, say_json
from convrewrite.errors import VerificationError
from convrewrite.values import counted

rules_app = typer.Typer(
    help="The rules that say which convolutions become what.",
    no_args_is_help=True,
    cls=Commands,
    epilog=examples_of("convrewrite rules list", "convrewrite rules check mine.toml"),
)


@command(rules_app, "convrewrite rules list", name="list")
def rules_list(as_json: AsJson = False) -> None:
    """The built-in rules."""
    from convrewrite.rules import builtin_rules, load_rule_file
    from convrewrite.tables import table

    rows = [(name, load_rule_file(path).description) for name, path in builtin_rules().items()]
    if as_json:
        from convrewrite.cli.json_forms import BuiltinRule, BuiltinRules

        say_json(BuiltinRules(rules=tuple(BuiltinRule(name=name, description=text) for name, text in rows)))
        return
    say(table(("rule", "what it does"), rows, "ll"))


@command(rules_app, "convrewrite rules show balanced > mine.toml", name="show")
def rules_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in rule or a rule file.")],
    as_json: AsJson = False,
) -> None:
    """A rule file as it stands, comments and examples included; as JSON with every default."""
    from convrewrite.rules import builtin_rules, load_rule_file, resolve

    resolve([name])
    path = builtin_rules().get(name, Path(name))
    if as_json:
        say_json(load_rule_file(path))
    else:
        say(path.read_text(encoding="utf-8-sig"), as_it_is=True)


@command(rules_app, "convrewrite rules check mine.toml", name="check")
def rules_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A rule file.")], as_json: AsJson = False
) -> None:
    """Check a rule file: its keys, its values, and the examples it carries."""
    from convrewrite.rules import check, load_rule_file
    from convrewrite.structures import discover

    structures, rules = discover(), load_rule_file(file)
    findings = check(rules, lambda name, spec: structures[name].reject(spec.per_group), structures)
    if as_json:
        from convrewrite.cli.json_forms import CheckedExample, CheckedRules

        examples = tuple(CheckedExample(**asdict(finding)) for finding in findings)
        say_json(CheckedRules(file=str(file), passed=all(one.passed for one in examples), examples=examples))
    for finding in findings if not as_json else ():
        say(f"{'ok  ' if finding.passed else 'FAIL'} {finding.rule}: {finding.example}: {finding.text}")
    # Names in a rule that no structure has are findings too, besides those of its examples.
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        raise VerificationError(f"{file}: {len(failed)} of {len(findings)} checks fail")
    if not as_json:
        say(f"{file}: valid; {counted(len(findings), 'example')} {'holds' if len(findings) == 1 else 'hold'}")
