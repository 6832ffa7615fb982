"""Files that an earlier commit wrote, before its modules moved into wings, are read as they were.

``tests/data/earlier`` holds a network of two convolutions and a dynamic one, and the result folder that
``convrewrite optimize original.pt --input 2x4x12x12 --calib weights --no-onnx`` left with a rule that asks for
depthwise-first stages as branches: its model has a SumOfBranches, a DynamicChain and a ConvSpec.
"""

from pathlib import Path

import pytest
import torch
from commands import call
from safetensors.torch import load_file
from torch import nn

import convrewrite
from convrewrite.conv import ConvSpec
from convrewrite.layers import DynamicConv2d, SumOfBranches
from convrewrite.layers.dynamic_chain import DynamicChain
from convrewrite.loading.files import load_model
from convrewrite.reporting.report import Report

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
RESULT = EARLIER / "result"
INPUT = ("--input", "2x4x12x12")
NUMBERS = load_file(EARLIER / "outputs.safetensors")
"""``input``, and what the commit that wrote the files computed of it: the first ``output``, and that of the ``original``."""


def original() -> nn.Module:
    return load_model(str(EARLIER / "original.pt")).model


def require_same_numbers(model: nn.Module, name: str = "output") -> None:
    with torch.no_grad():
        found = model(NUMBERS["input"])[:1]
    assert torch.allclose(found, NUMBERS[name], rtol=1e-4, atol=1e-5)


def test_a_model_loads_without_trust_and_computes_the_same() -> None:
    model = load_model(str(RESULT / "model.pt")).model
    types = [type(module) for module in model.modules()]
    assert types.count(SumOfBranches) == 2
    [chain] = [module for module in model.modules() if isinstance(module, DynamicChain)]
    assert isinstance(chain.spec, ConvSpec)
    require_same_numbers(model)


def test_a_model_with_a_layer_of_ours_loads() -> None:
    model = original()
    assert any(isinstance(module, DynamicConv2d) for module in model.modules())
    require_same_numbers(model, "original")


def test_a_result_folder_loads_into_a_fresh_instance() -> None:
    fresh = original()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    require_same_numbers(convrewrite.load(RESULT, fresh))


def test_a_plan_is_carried_out_again() -> None:
    plan = convrewrite.Plan.from_json((RESULT / "plan.json").read_text(encoding="utf-8"), "plan.json")
    result = convrewrite.apply(original(), NUMBERS["input"], plan, "weights", measure=False)
    assert result.plan == plan
    require_same_numbers(result.model)


def test_a_report_is_read() -> None:
    report = Report.model_validate_json((RESULT / "report.json").read_text(encoding="utf-8"))
    assert [site.action for site in report.sites] == ["rewritten"] * 3


@pytest.mark.parametrize("source", [RESULT, RESULT / "plan.json"], ids=["folder", "plan"])
def test_explain(source: Path) -> None:
    whole, site = call("explain", source), call("explain", source, "5")
    assert (whole.code, site.code) == (0, 0)
    assert whole.out.count("rank ") == 3 and "depthwise-first, as branches" in whole.out
    assert "dynamic" in site.out


def test_analyze() -> None:
    ran = call("analyze", RESULT / "model.pt", *INPUT)
    assert ran.code == 0
    rows = [line.split()[:2] for line in ran.out.splitlines()]
    assert ["0.0.0", "depthwise"] in rows
    assert ["5.features.0.0", "depthwise"] in rows
    assert ["5#0", "dynamic"] in rows, "the mixture of the last stage"


def test_optimize(tmp_path: Path) -> None:
    """The rewritten model once more, where pointwise convolutions of many channels become two of fewer."""
    rule = tmp_path / "again.toml"
    rule.write_text(
        "schema = 1\n[[rule]]\nname = 'again'\nmatch = { kind = 'pointwise' }\nstructures = ['channel']\nratio = 0.9\n"
        "protect = { stem = false, min_channels = 1, min_mac_share = 0.0 }\n"
    )
    ran = call(
        "optimize",
        RESULT / "model.pt",
        "-o",
        tmp_path / "out",
        *INPUT,
        "--rule",
        rule,
        "--calib",
        "weights",
        "--no-onnx",
    )
    assert ran.code == 0, ran.err
    again = load_model(str(tmp_path / "out" / "model.pt")).model
    assert sum(parameter.numel() for parameter in again.parameters()) < sum(
        parameter.numel() for parameter in load_model(str(RESULT / "model.pt")).model.parameters()
    )
