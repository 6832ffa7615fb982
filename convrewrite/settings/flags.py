"""How the command line takes a field of a dataclass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flag:
    """How the command line takes a field of a dataclass.

    ``kind`` is the type of what is given, which ``read`` turns into the field's value; ``check`` may refuse it while words are
    parsed. ``default`` is shown in the help, and used where the option is left out; None: the field's own default.
    """

    names: tuple[str, ...]
    help: str
    kind: Any = str | None
    check: Callable[[Any], Any] | None = None
    read: Callable[[Any], Any] | None = None
    default: object = None

    def value(self, given: Any) -> Any:
        """The field's value from what was given."""
        return given if self.read is None else self.read(given)


FLAG = "flag"
"""The key of a field's metadata that holds its Flag."""


def flag(*names: str, **said: Any) -> dict[str, Flag]:
    """The metadata of a field that the command line takes by these names; the rest is as in :class:`Flag`."""
    return {FLAG: Flag(names, **said)}
