import inspect
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from convrewrite.cli.expanded import Only, expanded
from convrewrite.errors import UsageError
from convrewrite.settings import flag


@dataclass(frozen=True)
class Baking:
    minutes: int = field(
        default=90, metadata=flag("--hours", kind=float, read=lambda h: int(60 * h), default=1.5, help="Long.")
    )
    spices: tuple[str, ...] = field(
        default=("salt",), metadata=flag("--spice", kind=list[str] | None, read=tuple, default=None, help="Which.")
    )
    hot: bool = field(default=True, metadata=flag("--hot/--cold", kind=bool, help="How."))
    oven: str = "the one there is"

    def __post_init__(self) -> None:
        if self.minutes < 1:
            raise UsageError("no time to bake")


def ran(command: object, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(expanded(command))  # type: ignore[arg-type]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.output.strip()


def bake(*, cake: str, how: Baking, count: int = 1) -> None:
    """Bake a CAKE."""
    print(cake, how.minutes, how.hot, how.oven, count)


def test_a_command_gets_its_dataclass() -> None:
    assert ran(bake, "plum") == "plum 90 True the one there is 1"
    assert ran(bake, "plum", "--hours", "0.5", "--cold", "--count", "3") == "plum 30 False the one there is 3"
    with pytest.raises(UsageError, match="no time"):
        ran(bake, "plum", "--hours", "0")


def test_options_stand_where_the_dataclass_stood() -> None:
    command = expanded(bake)
    assert list(inspect.signature(command).parameters) == ["cake", "minutes", "spices", "hot", "count"]
    assert command.__doc__ == "Bake a CAKE."


def test_a_command_may_take_some_of_the_fields() -> None:
    def warm(*, how: Annotated[Baking, Only("hot")]) -> None:
        print(how)

    assert list(inspect.signature(expanded(warm)).parameters) == ["hot"]
    assert ran(warm, "--cold") == str(Baking(hot=False))


def test_a_field_that_there_is_not_is_a_fault_of_the_command() -> None:
    def warm(*, how: Annotated[Baking, Only("oven")]) -> None:
        print(how)

    with pytest.raises(AssertionError, match=r"Baking has no options {'oven'}"):
        expanded(warm)
