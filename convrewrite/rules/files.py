"""Rule files: reading them, finding the built-in ones, and running the examples they carry.

The schema, and how a rule decides, stand in :mod:`convrewrite.rules.schema`.
Unknown keys are errors, and all findings of a file are reported together. Positions in messages count from zero:
``rule[0].match.kind`` is the kind of the first rule.
"""

import json
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from convrewrite import values
from convrewrite.conv import ConvSpec
from convrewrite.errors import RuleFileError
from convrewrite.folders import read_text
from convrewrite.rules.parameters import wrong_parameters
from convrewrite.rules.schema import Example, Refusal, RejectExample, Rule, RuleFile
from convrewrite.structures import Structure
from convrewrite.values import near

Applies = Callable[[str, ConvSpec], str | None]
"""Function (structure name, geometry) -> None when the structure can rewrite it, or why not; KeyError: no such structure."""

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "model_type": "a table",
    "string_type": "text",
    "tuple_type": "a list",
}

_SOURCES = (str, Path, Rule, RuleFile)
_WANTED = 'names of built-in rules, paths of rule files or Rule objects, as ["separable"]'
"""What rules are named by, as types and in words."""

LARGEST = 1 << 20
"""Most bytes of a rule file."""

MOST_FINDINGS = 20
"""Most findings that are reported of one file; thousands would be of no use."""

NONE: Mapping[str, Structure] = MappingProxyType({})

# A convolution to ask a structure about where only its name is in question.
_PROBE = ConvSpec(64, 64, (3, 3), padding=(1, 1))


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one of a rule's own examples, named ``accepts[0]``, ``rejects[1]``, or of its ``structures``."""

    rule: str
    example: str
    passed: bool
    text: str


def load_rule_file(path: Path) -> RuleFile:
    """Read one rule file.

    Raises:
        RuleFileError: the file cannot be read, is no TOML, or breaks the schema; one line per finding.
    """
    try:
        data = tomllib.loads(read_text(path, RuleFileError, "a rule file in TOML", LARGEST))
        return read_table(data, str(path))
    except ValueError as error:  # TOML's errors are ValueErrors; Python raises one for numbers of thousands of digits
        raise RuleFileError(f"{path}: not valid TOML: {error}") from error
    except RecursionError as error:
        raise RuleFileError(f"{path}: not a rule file: its tables are nested too deeply to be read") from error


def read_table(table: Mapping[str, object], source: str) -> RuleFile:
    """A rule file that is already parsed; ``source`` stands at the head of every finding.

    Raises:
        RuleFileError: the table breaks the schema; one line per finding, at most MOST_FINDINGS.
    """
    try:
        return RuleFile.model_validate(table)
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [f"{source}: {_explain(details, table)}" for details in found[:MOST_FINDINGS]]
        lines += (
            [f"{source}: {len(found) - len(lines)} more findings; mend these first"] if len(found) > len(lines) else []
        )
        raise RuleFileError(*lines) from error


def builtin_rules() -> dict[str, Path]:
    """The rules that come with the package, name -> file.

    An installed package holds them in its folder ``_rules``; in a checkout they are the folder ``rules`` beside it.
    """
    package = Path(__file__).parents[1]
    installed = package / "_rules"
    folder = installed if installed.is_dir() else package.parent / "rules"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve(rules: Sequence[str | Path | Rule | RuleFile]) -> tuple[Rule, ...]:
    """Built-in names, paths and objects -> the rules they stand for, in order; a rule given twice counts once. A single one need
    not be in a list.

    Raises:
        RuleFileError: there is none, a name is unknown, a file is not valid, or two different rules have one name.
    """
    if isinstance(rules, _SOURCES):
        rules = [rules]
    if not isinstance(rules, Iterable) or isinstance(rules, Mapping):
        raise RuleFileError(f"rules: expected {_WANTED}, found {values.shown(rules)}; leave them out for the default")
    found: dict[str, Rule] = {}
    for rule in (rule for source in rules for rule in _rules_of(source)):
        if found.setdefault(rule.name, rule) != rule:
            raise RuleFileError(f"two different rules are named {rule.name}; rename one, reports tell rules by name")
    if not found:
        raise RuleFileError(f"rules: expected {_WANTED}, found none; leave them out for the default")
    return tuple(found.values())


def check(file: RuleFile, applies: Applies, structures: Mapping[str, Structure] = NONE) -> list[Finding]:
    """Run every example that a rule file carries, and check that the structures it names exist, and that those in ``structures``
    have the parameters it restricts."""
    found = [finding for rule in file.rule for finding in _check_rule(rule, applies)]
    wrong = ((rule.name, key, text) for rule in file.rule for key, text in wrong_parameters(rule, structures))
    return [*found, *(Finding(name, key, False, text) for name, key, text in wrong)]


def _rules_of(source: str | Path | Rule | RuleFile) -> tuple[Rule, ...]:
    if isinstance(source, Rule):
        return (source,)
    if isinstance(source, RuleFile):
        return source.rule
    if isinstance(source, Path):
        return load_rule_file(source).rule
    if not isinstance(source, str):
        raise RuleFileError(f"rules: expected {_WANTED}, found {values.shown(source)} among them; leave it out")
    builtin = builtin_rules()
    if source in builtin:
        return load_rule_file(builtin[source]).rule
    path = Path(source)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return load_rule_file(path).rule
    raise RuleFileError(
        f"{source}: expected a rule file (NAME.toml) or one of the built-in rules "
        f"{', '.join(builtin)}{near(source, builtin)}"
    )


def _check_rule(rule: Rule, applies: Applies) -> Iterator[Finding]:
    unknown = [name for name in rule.structures if not _exists(name, applies)]
    if unknown:
        text = f"expected names of structures, found {', '.join(unknown)}, which no structure has"
        yield Finding(rule.name, "structures", False, text)
        return
    for index, example in enumerate(rule.accepts):
        refusals, reasons = _refusals(rule, example), _structural_reasons(rule, example, applies)
        against = "; ".join(refusal.text for refusal in refusals)
        if not refusals and len(reasons) == len(rule.structures):
            against = "; ".join(reasons)
        yield Finding(rule.name, f"accepts[{index}]", not against, against or "taken, as expected")
    for index, rejected in enumerate(rule.rejects):
        text = _unexpected(rule, rejected, applies)
        yield Finding(rule.name, f"rejects[{index}]", not text, text or f"refused by {rejected.reason}, as expected")


def _exists(structure: str, applies: Applies) -> bool:
    try:
        applies(structure, _PROBE)
    except KeyError:
        return False
    return True


def _refusals(rule: Rule, example: Example) -> list[Refusal]:
    refusals = rule.refusals(example.subject())
    return [refusal for refusal in refusals if example.name is not None or refusal.key != "name"]


def _structural_reasons(rule: Rule, example: Example, applies: Applies) -> list[str]:
    spec = example.conv.spec()
    reasons = ((name, applies(name, spec)) for name in rule.structures)
    return [f"{name}: {reason}" for name, reason in reasons if reason is not None]


def _unexpected(rule: Rule, example: RejectExample, applies: Applies) -> str:
    """How the outcome differs from the reason the example gives; empty when it does not."""
    expected = f"expected a refusal by {example.reason}"
    refusals = _refusals(rule, example)
    if refusals:
        keys = [refusal.key for refusal in refusals]
        return "" if example.reason in keys else f"{expected}, found one by {', '.join(keys)}: {refusals[0].text}"
    if len(_structural_reasons(rule, example, applies)) < len(rule.structures):
        return f"{expected}, found that the rule takes it"
    return "" if example.reason == "structure" else f"{expected}, found one by structure"


def _explain(details: ErrorDetails, data: object) -> str:
    """One finding of pydantic in this package's words: where, what was expected, what was found."""
    where = _position(details["loc"])
    owner = _owner(details["loc"], data)
    prefix = f"{where}: " if where else ""
    return f"{prefix}{_complaint(details)}{owner}"


def _complaint(details: ErrorDetails) -> str:
    kind, found = details["type"], _shown(details["input"])
    context: Mapping[str, Any] = details.get("ctx") or {}
    if kind == "wrong":
        return details["msg"]
    if kind == "missing":
        return "this key is required, found nothing"
    if kind == "extra_forbidden":
        valid = _keys_at(details["loc"][:-1])
        return f"unknown key; expected one of {', '.join(valid)}{near(str(details['loc'][-1]), valid)}"
    if kind == "expected":
        return f"expected {details['msg']}, found {found}"
    if kind in ("enum", "literal_error"):
        choices = [word.strip("'") for word in str(context["expected"]).replace(" or ", ", ").split(", ")]
        one_of = "one of " if len(choices) > 1 else ""
        return f"expected {one_of}{', '.join(choices)}, found {found}{near(str(details['input']), choices)}"
    return f"expected {_EXPECTED.get(kind, details['msg'])}, found {found}"


def _position(location: Iterable[int | str]) -> str:
    """``("rule", 2, "require")`` -> ``rule[2].require``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _owner(location: Sequence[int | str], data: object) -> str:
    """The name of the rule a finding is in, since a position alone is slow to find in a long file."""
    if len(location) < 2 or not isinstance(data, dict) or not isinstance(location[1], int):
        return ""
    rule = data["rule"][location[1]]
    name = rule.get("name") if isinstance(rule, dict) else None
    return f" (rule {name})" if isinstance(name, str) else ""


def _keys_at(location: Iterable[int | str]) -> list[str]:
    """The valid keys of the table at a position."""
    table: type[BaseModel] = RuleFile
    for part in location:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in table.model_fields.items()}
            table = next(_tables_in(fields[part].annotation))
    return [field.alias or name for name, field in table.model_fields.items()]


def _tables_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _tables_in(argument)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
