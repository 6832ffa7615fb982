"""Options of a command from the fields of dataclasses: a field that has a Flag is an option wherever its dataclass is taken."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer

from convrewrite.settings import FLAG, Flag


class Only:
    """In ``Annotated[SomeDataclass, Only("a", "b")]``: the fields that a command takes; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True, slots=True)
class _Group:
    """One parameter of a command, which is a dataclass: its class, and the flags of its fields by their names."""

    made: type
    flags: Mapping[str, Flag]

    def options(self) -> list[inspect.Parameter]:
        """As typer takes them, in the order of the fields."""
        return [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=flag.default,
                annotation=Annotated[flag.kind, typer.Option(*flag.names, callback=_callback(flag), help=flag.help)],
            )
            for name, flag in self.flags.items()
        ]

    def value(self, given: Mapping[str, Any]) -> Any:
        """The dataclass from what was given. An option that was left out and has no default keeps that of its field."""
        named = {name: given[name] for name in self.flags if given[name] is not None}
        return self.made(**{name: self.flags[name].value(text) for name, text in named.items()})


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """The same command as typer takes it: a parameter typed as a dataclass becomes an option for every field with a Flag.

    What the fields of the dataclass refuse is refused when the command is called, before its first line.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: group for name, p in signature.parameters.items() if (group := _group_of(p.annotation)) is not None}
    taken: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        single = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        taken += groups[name].options() if name in groups else [single]

    @wraps(command)
    def run(**given: Any) -> None:
        plain = {name: given[name] for name in signature.parameters if name not in groups}
        command(**plain, **{name: group.value(given) for name, group in groups.items()})

    run.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    return run


def _group_of(annotation: Any) -> _Group | None:
    """What a parameter of this type becomes; None: it is an option, or an argument, already."""
    notes: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *notes = get_args(annotation)
    if not (isinstance(annotation, type) and is_dataclass(annotation)):
        return None
    flags = {field.name: _flag_of(field) for field in fields(annotation) if FLAG in field.metadata}
    for only in (note.names for note in notes if isinstance(note, Only)):
        assert set(only) <= set(flags), f"{annotation.__name__} has no options {set(only) - set(flags)}"
        flags = {name: flag for name, flag in flags.items() if name in only}
    return _Group(annotation, flags)


def _callback(flag: Flag) -> Callable[[Any], Any] | None:
    """The check of a flag as typer takes it, which looks at how many parameters a callback has."""
    check = flag.check
    return None if check is None else lambda value: check(value)


def _flag_of(field: Field[Any]) -> Flag:
    """The flag of a field, with a default: its own, otherwise that of the field."""
    flag: Flag = field.metadata[FLAG]
    return replace(flag, default=field.default) if flag.default is None else flag
