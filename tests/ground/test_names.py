"""Names that may stand in source, and everything a model may call by another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import convrewrite
from convrewrite.errors import ConvRewriteError, ModelLoadError
from convrewrite.escaping import printable
from convrewrite.names import is_name, require_names

GOOD = ["conv", "0", "3x3", "_private", "layer-1", "größe", "層"]
BAD = [
    "", "a.b", "a b", 'x" + "', "x'", "x\\", "x\n", "x(", "x;y", "x:y", "x[0]", "x#",
    "x\x1b[31m", "x\u202e", "\ufb01t", "x\u00b2", "__class__", "__init__", 3, None,
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_letters_digits_underscores_and_hyphens_are_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_everything_else_is_none(name: object) -> None:
    assert not is_name(name)


def code(marker: Path) -> str:
    """A name that is code once it stands between double quotes."""
    return f'1" if getattr(__import__("os"), "system")("touch {marker}") else "1'


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers", "__dict__"])
@pytest.mark.parametrize("inside", [False, True])
def test_every_kind_of_name_is_checked_at_every_depth(table: str, inside: bool) -> None:
    model = Holder()
    holder: Any = model.body if inside else model
    value = {"_modules": nn.ReLU(), "_parameters": nn.Parameter(torch.ones(1))}.get(table, torch.ones(1))
    getattr(holder, table)['a"b'] = value
    with pytest.raises(ModelLoadError, match=r"^net\.pt: expected names of letters.*'a\"b' in (body|the model itself)"):
        require_names(model, "net.pt")


def test_modules_that_hold_each_other_end() -> None:
    model = Holder()
    model.body._modules["again"] = model
    require_names(model, "net.pt")
    model.body._modules["no name"] = nn.ReLU()
    with pytest.raises(ModelLoadError, match="no name"):
        require_names(model, "net.pt")


def leaves_out(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return ((name, part) for name, part in nn.Module.named_modules(self, *args, **kwargs) if name != "body.0")


def fails(_self: nn.Module, _name: str = "") -> Any:
    raise KeyError


@pytest.mark.parametrize(
    ("finder", "own", "missed"),
    [
        ("named_modules", leaves_out, "body.0"),
        ("named_modules", lambda self: [], "the module itself"),
        ("modules", lambda self: [self], "first"),
        ("get_submodule", fails, "the module itself"),
    ],
)
def test_methods_by_which_parts_are_found_have_to_give_all(finder: str, own: Any, missed: str) -> None:
    kind = type("Own", (Holder,), {finder: own})
    for model in (kind(), nn.Sequential(kind())):
        with pytest.raises(
            ModelLoadError, match=rf"expected {finder}\(\) .* Own defines itself, .* give {missed}; give that"
        ):
            convrewrite.analyze(model, X)
    same = type("Same", (Holder,), {finder: lambda self, *args, **kw: getattr(nn.Module, finder)(self, *args, **kw)})
    require_names(nn.Sequential(same(), same()), "net.pt")


def test_the_code_of_these_tests_runs_where_nobody_looks(tmp_path: Path) -> None:
    model = nn.Sequential()
    model._modules[code(tmp_path / "executed")] = nn.ReLU()
    with pytest.raises(AttributeError):
        fx.symbolic_trace(model)(torch.ones(1))
    assert (tmp_path / "executed").exists()


X = torch.zeros(1, 3, 8, 8)


def graph_with_names_of(model: nn.Module) -> fx.GraphModule:
    """A graph module that also holds what the model holds, under its names."""
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3)))
    graph._modules.update(model._modules)
    return graph


ENTRIES: dict[str, Callable[[Any], object]] = {
    "optimize": lambda model: convrewrite.optimize(model, X),
    "plan": lambda model: convrewrite.plan(model, X),
    "analyze": lambda model: convrewrite.analyze(model, X),
    "export": lambda model: convrewrite.export(model, X, Path("m.onnx")),
    "RewriteConvolutions": lambda model: convrewrite.RewriteConvolutions(X)(graph_with_names_of(model)),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_way_into_the_package_refuses_it(tmp_path: Path, entry: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    model._modules[code(tmp_path / "executed")] = nn.Conv2d(8, 8, 3)
    with pytest.raises(ModelLoadError, match="expected names of letters"):
        ENTRIES[entry](model)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, äöü 層 ~!", "plain, äöü 層 ~!"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("a\u202eb\u2066c\u200bd", r"a\u202eb\u2066c\u200bd"),
        ("a\rb\x00c\x9bd", r"a\rb\x00c\x9bd"),
        ("a\nb", r"a\nb"),
        ("half \ud800", r"half \ud800"),
    ],
    ids=ascii,
)
def test_control_and_direction_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_message_stays_on_its_lines() -> None:
    error = ConvRewriteError("x\x1b[2J\nconvrewrite: all is well", "second")
    assert str(error) == "x\\x1b[2J convrewrite: all is well\nsecond"
    assert printable("a\nb", keep="\n") == "a\nb"
