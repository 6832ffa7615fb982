"""A project's defaults for options: ``convrewrite.toml`` in the working folder, or ``[tool.convrewrite]`` of its pyproject.toml.

What a file says for options that were not given becomes words of the command line, in front of those that were given: it is read,
checked and recorded in the report as if it had been typed. A file comes with a folder, maybe from somebody else, so it can
neither run code, nor say where anything is written or sent.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from convrewrite.errors import UsageError
from convrewrite.folders import read_text
from convrewrite.values import shown

FILE, SHARED_FILE = "convrewrite.toml", "pyproject.toml"
LARGEST = 1 << 20
"""Most bytes of either file."""

RUNS_CODE = ("trust", "factory", "augment", "metric", "model")
"""Options that run code, or name a model, which may be code."""

MAY_NAME_CODE = ("input", "calib", "data")
"""Options whose value runs code where it is FILE.py:NAME or pkg.mod:NAME."""

MAY_SEND = {"cluster": re.compile(r"local(:[0-9]+)?")}
"""Options whose value may name a machine that a model and its inputs are sent to, with the values that name none."""

ONE_RUN = ("out", "page", "graphs", "open")
"""Options that say what one run writes and where, or what it opens."""

RIVALS = {"minutes": "epochs", "epochs": "minutes", "quiet": "verbose", "verbose": "quiet"}
"""Options that are not given together: one on the command line takes the place of the other in the file, and one in the table of
the command that of the other for all commands."""

OF_INPUTS = ("mean", "std", "resize")
"""Options that say how calibration inputs are read, and mean nothing to a run without any."""

OF_FILES = ("runtime", "timings", "opset", "free-axes", "half", "int8")
"""Options that need an ONNX file or its times, and mean nothing to a run without any (``--no-onnx``)."""

AROUND = "correct it, or call convrewrite --no-config"


@dataclass(frozen=True, slots=True)
class CommandOption:
    """An option of a command: its name without dashes, its words, and what it takes. ``no``: the word that turns a flag off."""

    name: str
    word: str
    no: str | None
    kind: type
    several: bool
    counted: bool

    @property
    def expected(self) -> str:
        """What a file has to give, in words."""
        if self.counted:
            return "0, 1 or 2"
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        text = names.get(self.kind, "text, written as on the command line")
        return f"{text}, or a list of such" if self.several else text

    def words(self, value: object) -> list[str] | None:
        """A value of a file as words of the command line; None where it is of another type."""
        if self.counted:
            return [self.word] * value if type(value) is int and 0 <= value <= 2 else None
        if self.several and isinstance(value, list):
            each = [self.words(one) if not isinstance(one, list) else None for one in value]
            return None if None in each else [word for words in each for word in words or ()]
        if self.kind is bool:
            return None if type(value) is not bool else [self.word] if value else [self.no] if self.no else []
        fitting = {int: (int,), float: (int, float)}.get(self.kind, (str,))
        return [f"{self.word}={value}"] if type(value) in fitting else None


@dataclass(frozen=True, slots=True)
class Project:
    """What a file says, by command and option; ``name`` is how messages call the file."""

    name: str
    common: Mapping[str, Sequence[str]]
    tables: Mapping[str, Mapping[str, Sequence[str]]]

    def words(self, command: str, options: Iterable[str], given: Mapping[str, object]) -> dict[str, Sequence[str]]:
        """The words for options of a command that were not ``given``, by the names of the options."""
        table = self.tables.get(command, {})
        common = {key: words for key, words in self.common.items() if key in options and RIVALS.get(key) not in table}
        own = common | dict(table)
        found = {
            key: words for key, words in own.items() if key not in given and RIVALS.get(key) not in given and words
        }
        calib = given.get("calib", *found.get("calib", ["weights"]))
        if "calib" in options and calib in ("weights", "--calib=weights"):
            found = {key: words for key, words in found.items() if key not in OF_INPUTS}
        if given.get("onnx") is False:
            found = {key: words for key, words in found.items() if key not in OF_FILES}
        return found


def read_project(folder: Path, commands: Mapping[str, Mapping[str, CommandOption]]) -> Project | None:
    """The project's file in a folder, every key of it checked; None where there is none.

    Raises UsageError, with file, key and the nearest name that is known.
    """
    for name, path in ((FILE, ()), (f"{SHARED_FILE} [tool.convrewrite]", ("tool", "convrewrite"))):
        place = folder / name.partition(" ")[0]
        if not place.exists():
            continue
        table: Any = _read(place)
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict):
            return _checked(name, table, commands)
        if table is not None:
            raise UsageError(f"{name}: expected a table, found {shown(table)}")
    return None


def options_of(command: Any) -> dict[str, CommandOption]:
    """The options of a command as typer made it, by their names."""
    annotations = {
        name: p.annotation for name, p in inspect.signature(command.callback, eval_str=True).parameters.items()
    }
    found = {}
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name in annotations:
            word = max(parameter.opts, key=len)
            no = max(parameter.secondary_opts, key=len, default=None)
            kind = _kind_of(annotations[parameter.name])
            several, counted = bool(parameter.multiple), bool(getattr(parameter, "count", False))
            found[word[2:]] = CommandOption(word[2:], word, no, kind, several, counted)
    return found


def _kind_of(annotation: Any) -> type:
    """The type of one value: ``list[str] | None`` is text."""
    if get_origin(annotation) is Annotated:
        return _kind_of(get_args(annotation)[0])
    inner = [part for part in get_args(annotation) if part is not NoneType]
    return _kind_of(inner[0]) if inner else annotation


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(read_text(path, UsageError, "a file in TOML", LARGEST))
    except ValueError as error:
        raise UsageError(f"{path.name}: not valid TOML: {error}; {AROUND}") from error
    except RecursionError as error:
        raise UsageError(f"{path.name}: its tables are nested too deeply to be read; {AROUND}") from error


def _checked(name: str, table: Mapping[str, Any], commands: Mapping[str, Mapping[str, CommandOption]]) -> Project:
    everywhere = {key: option for options in commands.values() for key, option in options.items()}
    common: dict[str, list[str]] = {}
    tables: dict[str, dict[str, list[str]]] = {}
    for key, value in table.items():
        named = any(command.partition(" ")[0] == key for command in commands)  # `export` is an option too
        if isinstance(value, dict) and (named or key not in everywhere):
            tables |= dict(_tables(name, key, value, commands))
        elif named and key not in everywhere:
            raise UsageError(f"{name}: {key}: expected the table of that command, as [{key}], found {shown(value)}")
        else:
            common[key] = _words(f"{name}: {key}", key, value, everywhere, [*everywhere])
    return Project(name, common, tables)


def _tables(
    name: str, key: str, table: Mapping[str, Any], commands: Mapping[str, Mapping[str, CommandOption]]
) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """The table of a command, or for a group those of its commands, which are called ``group command``."""
    if key in commands:
        options = commands[key]
        yield key, {k: _words(f"{name}: {key}.{k}", k, value, options, [*options]) for k, value in table.items()}
        return
    if not any(command.startswith(f"{key} ") for command in commands):
        raise UsageError(f"{name}: [{key}]: expected a command{_nearest(key, commands)}; see convrewrite --help")
    for inner, value in table.items():
        whole = f"{key} {inner}"
        if whole not in commands or not isinstance(value, dict):
            names = [command.partition(" ")[2] for command in commands if command.startswith(f"{key} ")]
            raise UsageError(f"{name}: {key}.{inner}: expected the table of a command{_nearest(inner, names)}")
        yield from _tables(name, whole, value, commands)


def _words(
    where: str, key: str, value: object, options: Mapping[str, CommandOption], known: Sequence[str]
) -> list[str]:
    """A value of a file as words. Raises UsageError for what a file may not say."""
    if key in RUNS_CODE:
        raise UsageError(
            f"{where}: expected on the command line alone: --{key} runs code, and a file that lies in a folder must not do that "
            "unseen; take it out"
        )
    if key in ONE_RUN:
        raise UsageError(f"{where}: expected on the command line alone, as it is one run's own; take it out")
    if key not in options:
        positive = key.removeprefix("no-")
        near = f", nearest is {positive} = false" if positive != key and positive in options else _nearest(key, known)
        raise UsageError(f"{where}: expected an option that is known there, without its dashes{near}")
    words = options[key].words(value)
    if words is None:
        raise UsageError(f"{where}: expected {options[key].expected}, found {shown(value)}")
    if key in MAY_NAME_CODE and any(":" in word for word in words):
        raise UsageError(
            f"{where}: expected shapes or files, found {shown(value)}, which may name code to run; give it on the command line"
        )
    if key in MAY_SEND and not all(MAY_SEND[key].fullmatch(word.partition("=")[2]) for word in words):
        raise UsageError(
            f"{where}: expected local or local:N, found {shown(value)}, to which the model and its inputs would be sent; give it "
            "on the command line"
        )
    return words


def _nearest(key: str, known: Iterable[str]) -> str:
    """The nearest name that is known, otherwise all that a file may have."""
    import difflib

    near = difflib.get_close_matches(key, known, 1, 0.5)
    return f", nearest is {shown(near[0])}" if near else f" ({', '.join(sorted({*known} - {*RUNS_CODE} - {*ONE_RUN}))})"
