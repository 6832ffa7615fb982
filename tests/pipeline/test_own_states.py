"""Models whose state is not all of their weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import images, small_network
from torch import Tensor, nn

from convrewrite import apply, load, optimize, plan
from convrewrite.errors import PlanError
from convrewrite.loading.state_dicts import load_weights, widened


class Brief(nn.Module):
    """Gives as its state what was trained last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()
        self.register_buffer("shift", torch.randn(1))

    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **named).items() if "12" in name}

    def forward(self, x: Tensor) -> Any:
        return self.inner(x + self.shift)


class Nested(nn.Module):
    """Gives its state as a trainer's checkpoint, and takes it so; what is no tensor in it is kept, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.classes = small_network(), ["a", "b"]

    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {"model": super().state_dict(*args, **named), "epoch": 3}

    def load_state_dict(self, state_dict: Any, *args: Any, **named: Any) -> Any:
        return super().load_state_dict(state_dict["model"], *args, **named)

    def get_extra_state(self) -> Any:
        return {"classes": self.classes}

    def set_extra_state(self, state: Any) -> None:
        self.classes = state["classes"]

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


KINDS = pytest.mark.parametrize("kind", [Brief, Nested])


@KINDS
def test_all_of_the_state_is_saved_and_loaded_again(kind: type[nn.Module], tmp_path: Path) -> None:
    made = optimize(kind().eval(), images(1), calibration=images(16), measure=False, fast=True)
    assert any(row.action == "rewritten" for row in made.report.sites)
    again = load(made.save(tmp_path / "out"), kind())
    assert torch.equal(again(images(2)), made.model(images(2)))
    assert getattr(again, "classes", ["a", "b"]) == ["a", "b"]


@KINDS
def test_a_plan_belongs_to_all_of_the_weights(kind: type[nn.Module]) -> None:
    model = kind().eval()
    made = plan(model, images(1), ["separable"], images(16), measure=False, fast=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.parameters())).mul_(2)
    with pytest.raises(PlanError, match="with other weights"):
        apply(other, images(1), made, images(16), measure=False)
    other.add_module("further", nn.Linear(2, 2))
    with pytest.raises(PlanError, match="made for another model"):
        apply(other, images(1), made, images(16), measure=False)


def test_a_checkpoint_fills_a_network_that_nests_its_state() -> None:
    one, other = Nested().half(), Nested()
    assert widened(one) == (one, ("stored in half precision, taken in float32",))
    load_weights(other, one.state_dict()["model"], "c.pt", "net.py:Nested")
    assert torch.equal(other.eval()(images(2)), one.eval()(images(2)))


def test_a_part_of_torchscript_is_saved_and_loaded_again(tmp_path: Path) -> None:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises against it
            part = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.PReLU()))
        torch.manual_seed(0)
        first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        return nn.Sequential(first, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), part).eval()

    made = optimize(make(), images(1), calibration=images(16), measure=False, fast=True)
    with pytest.warns(UserWarning, match="cannot be pickled"):
        made.save(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", make())(images(2)), made.model(images(2)))


class Remade(nn.Module):
    """Its pickle makes a new network, which has the convolutions that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def __reduce__(self) -> Any:
        return remade, (self.state_dict(),)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def remade(state: dict[str, Tensor]) -> Remade:
    made = Remade()
    made.load_state_dict(state)
    return made.eval()


def test_a_pickle_that_could_not_be_read_is_none(tmp_path: Path) -> None:
    made = optimize(Remade().eval(), images(1), calibration=images(16), measure=False, fast=True)
    with pytest.warns(UserWarning, match=r"model\.pt holds its state dict"):
        made.save(tmp_path / "out")
    assert torch.load(tmp_path / "out" / "model.pt").keys() == made.model.state_dict().keys()
    assert torch.equal(load(tmp_path / "out", Remade())(images(2)), made.model(images(2)))


class Groups(nn.Module):
    """Gives the parameters that are trained, in groups for an optimizer, and its state under other names than it takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def parameters(self, recurse: bool = True) -> Any:
        return [{"params": list(self.inner[11].parameters(recurse)), "lr": 0.1}]

    def named_parameters(self, *args: Any, **named: Any) -> Any:
        return self.inner[11].named_parameters(*args, **named)

    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {f"net.{name}": value for name, value in super().state_dict(*args, **named).items()}

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def test_a_class_that_gives_some_parameters_is_counted_and_loaded_whole(tmp_path: Path) -> None:
    plain, model = small_network(), Groups().eval()
    asked: dict[str, Any] = {"measure": False, "refine": False}
    found = optimize(model, images(1), ["separable"], images(), **asked)
    expected = optimize(plain, images(1), ["separable"], images(), **asked).report
    assert found.report.totals.parameters == expected.totals.parameters
    assert not any("fewer than the report counts" in note for note in found.report.notes)
    found.save(tmp_path / "out")
    other = Groups().eval()
    for _, parameter in nn.Module.named_parameters(other):
        parameter.data.zero_()
    again = load(tmp_path / "out", other)
    assert torch.equal(again(images(2)), found.model(images(2)))
