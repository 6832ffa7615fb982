import inspect

import pytest

import convrewrite
from convrewrite import errors


def test_the_public_names_are_pinned() -> None:
    assert convrewrite.__all__ == [
        "ConvRewriteError",
        "Plan",
        "Recovery",
        "Result",
        "RewriteConvolutions",
        "Settings",
        "Sweep",
        "analyze",
        "apply",
        "export",
        "export_result",
        "load",
        "optimize",
        "plan",
        "profile",
        "quantise",
        "recover",
        "sweep",
        "verify",
    ]
    assert dir(convrewrite) == sorted(convrewrite.__all__)


@pytest.mark.parametrize("name", convrewrite.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(convrewrite, name)
    assert found.__name__ == name
    assert found.__module__.startswith("convrewrite.")
    assert len(inspect.getdoc(found) or "") > 20


@pytest.mark.parametrize(
    "name", ["analyze", "apply", "export", "export_result", "load", "optimize", "plan", "profile", "quantise", "verify"]
)
def test_public_functions_have_no_open_keyword_arguments(name: str) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(getattr(convrewrite, name)).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert inspect.Parameter.VAR_POSITIONAL not in kinds


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        convrewrite.optimise  # noqa: B018 - looking it up is the test


def test_every_error_has_an_exit_code_and_one_root() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) == 12
    assert all(issubclass(error, convrewrite.ConvRewriteError) for error in found)
    assert {error.exit_code for error in found} == {1, 2, 3}
