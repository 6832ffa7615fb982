"""What a sweep writes and replaces: every model's plans under their own names, commands that make the points, no one's files."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import call
from networks import natural, settled
from torch import Tensor, nn

from convrewrite import Plan, Settings, Sweep, sweep
from convrewrite.cli import main
from convrewrite.cli.options import Sources
from convrewrite.cli.sweeping import _words
from convrewrite.errors import UsageError
from convrewrite.reporting import SweepReport
from convrewrite.reporting.sweep_report import SweptModel
from convrewrite.rules.schema import Protect, Rule

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.5)
INPUTS = natural(24, 3, 8, 8, torch.float32)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return settled(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)))


def swept(seed: int, name: str, inputs: Tensor = INPUTS) -> Sweep:
    return sweep(network(seed), inputs[:1], [RULE], inputs, (0.6,), measure=False, fast=True, name=name)


@pytest.fixture(scope="module")
def pair() -> tuple[Sweep, Sweep]:
    return swept(0, "first/net.pt"), swept(1, "second/net.pt")


def test_models_of_one_name_keep_their_own_plans(pair: tuple[Sweep, Sweep], tmp_path: Path) -> None:
    both = pair[0].joined(pair[1])
    place = both.save(tmp_path / "sweep", ["--calib", "images"])
    report = SweepReport.model_validate_json((place / "sweep.json").read_text())
    for model, alone in zip(report.models, pair, strict=True):
        (point,), (plan,) = model.points, alone.plans.values()
        assert Plan.from_json((place / "plans" / str(point.plan)).read_text(), "") == plan
    commands = [str(model.points[0].command) for model in report.models]
    assert [" -o net-0.6 " in commands[0], " -o 2-net-0.6 " in commands[1]] == [True, True]
    assert both.report.rules == pair[0].report.rules
    of_others = replace(pair[1], report=pair[1].report.model_copy(update={"rules": ("another",)}))
    assert pair[0].joined(of_others).report.rules == (*pair[0].report.rules, "another")
    for name, value in (("resource", "params"), ("metric", "accuracy")):
        unlike = replace(pair[1], report=pair[1].report.model_copy(update={name: value}))
        with pytest.raises(
            UsageError, match=f"expected another one with the {name} .*, found {value}; keep them apart"
        ):
            pair[0].joined(unlike)
    again = both.joined(pair[1]).joined(pair[0])  # the same plan under the same name needs no other one
    assert len(again.plans) == 2 and len(again.report.models) == 4
    assert pair[0].joined(swept(1, "Net.pt")).plans.keys() == {"net-macs-0.6.json", "2-Net-macs-0.6.json"}


def test_a_name_whose_bytes_are_no_text_is_written_out(pair: tuple[Sweep, Sweep], tmp_path: Path) -> None:
    (model,) = pair[0].report.models
    named = SweptModel.model_validate({**dict(model), "name": "caf\udce9.pt"})
    odd = replace(pair[0], report=pair[0].report.model_copy(update={"models": (named,)}))
    place = odd.save(tmp_path / "sweep", ["--calib", "caf\udce9"])
    (told,) = SweepReport.model_validate_json((place / "sweep.json").read_text()).models
    assert told.name == r"caf\udce9.pt" and r"--calib 'caf\udce9'" in str(told.points[0].command)


def test_a_fidelity_to_keep_and_a_budget_are_refused_beside_budgets() -> None:
    with pytest.raises(UsageError, match="keep: expected budgets alone"):
        sweep(network(0), INPUTS[:1], [RULE], INPUTS, settings=Settings(keep=0.9, measure=False))
    with pytest.raises(UsageError, match="budget: expected budgets and a resource"):
        sweep(network(0), INPUTS[:1], [RULE], INPUTS, settings=Settings(budget={"params": 0.9}, measure=False))


def test_the_basis_of_several_models_is_that_of_each(pair: tuple[Sweep, Sweep]) -> None:
    unmet, more = (
        Sweep(pair[0].report.model_copy(update={"basis": basis}), pair[0].plans)
        for basis in ("not measured", "measured on 9")
    )
    own = pair[0].report.basis
    assert unmet.joined(pair[0]).report.basis == pair[0].joined(unmet).report.basis == own
    assert pair[0].joined(pair[1]).report.basis == own and unmet.joined(unmet).report.basis == "not measured"
    assert pair[0].joined(more).joined(more).report.basis == f"{own}, or measured on 9"


def test_a_sweep_of_a_model_that_python_made_names_no_command(pair: tuple[Sweep, Sweep], tmp_path: Path) -> None:
    place = pair[0].save(tmp_path / "sweep")
    assert '"command": null' in (place / "sweep.json").read_text() and "What makes a point" not in (
        place / "page.html"
    ).read_text(encoding="utf-8")


def own_plans(place: Path) -> Path:
    (place / "plans").mkdir(parents=True)
    return place / "plans" / "mine.json"


def own_page(place: Path) -> Path:
    place.mkdir()
    return place / "page.html"


def own_sweep(place: Path) -> Path:
    place.mkdir()
    return place / "sweep.json"


@pytest.mark.parametrize("made", [own_plans, own_page, own_sweep])
def test_what_no_sweep_wrote_is_not_replaced(
    pair: tuple[Sweep, Sweep], tmp_path: Path, made: Callable[[Path], Path]
) -> None:
    mine = made(tmp_path / "sweep")
    mine.write_text("mine")
    with pytest.raises(UsageError, match="expected a new folder or an earlier sweep"):
        pair[0].save(tmp_path / "sweep")
    assert mine.read_text() == "mine"


def test_a_file_that_was_put_beside_its_plans_is_not_replaced(pair: tuple[Sweep, Sweep], tmp_path: Path) -> None:
    place = pair[0].save(tmp_path / "sweep")
    pair[1].save(place)
    (place / "plans" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"found plans/notes\.txt"):
        pair[0].save(place)
    (place / "plans" / "notes.txt").unlink()
    (place / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match=r"found page\.html"):
        pair[0].save(place)


def test_the_folder_that_is_worked_in_is_not_replaced(
    pair: tuple[Sweep, Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="worked in, cannot be replaced"):
        pair[0].save(".")
    assert Path(os.curdir).samefile(tmp_path)


def test_the_commands_of_points_say_what_the_sweep_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network(0), "net.pt")
    torch.save(INPUTS, "inputs.pt")
    Path("r.toml").write_text(
        'schema = 1\n[[rule]]\nname = "r"\nstructures = ["channel"]\n'
        "protect = { stem = false, min_channels = 0, min_mac_share = 0.0 }\n"
    )
    words = [
        "--rule",
        "r.toml",
        "--budgets",
        "0.6",
        "--calib",
        "inputs.pt",
        "--mean",
        "0.12345678,0,0",
        "--std",
        "1,1,1",
    ]
    asked = ["--device", "cpu", "--timeout", "20", "--refine", "--no-onnx", "--fast"]
    ran = call("sweep", "net.pt", *words, *asked, "-o", "out", "--json")
    assert ran.code == 0 and json.loads(ran.out) == json.loads(Path("out/sweep.json").read_text())
    report = SweepReport.model_validate_json(Path("out/sweep.json").read_text())
    command = str(report.models[0].points[0].command)
    assert "--mean 0.12345678,0.0,0.0" in command and "--device cpu --timeout 20" in command
    assert command.endswith("--no-onnx --refine")
    assert main(command.split()[1:]) in (0, 1)
    assert _words(Sources(), Settings(runtime="torch"), trust=False) == ["--runtime", "torch"]
