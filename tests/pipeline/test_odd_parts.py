"""Networks with parts that nothing can be done about: quantised ones, names that torch cannot write, examples that never come."""

import warnings

import pytest
import torch
from commands import images
from torch import Tensor, nn

from convrewrite import analyze, optimize
from convrewrite.errors import ConvRewriteError, ExportError, TraceError


def test_a_quantised_network_is_told_to_be_one() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop it
        float_one = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        prepared = quantize_fx.prepare_fx(float_one, get_default_qconfig_mapping("fbgemm"), (torch.zeros(1, 3, 8, 8),))
        prepared(torch.randn(4, 3, 8, 8))
        packed = quantize_fx.convert_fx(prepared)
        with pytest.raises(TraceError, match=r"as it is quantised; give the one that it was made from"):
            analyze(packed, torch.zeros(1, 3, 8, 8))


def test_without_any_convolution_none_is_promised() -> None:
    with pytest.raises(TraceError, match="the model has no convolution; there is nothing to rewrite"):
        analyze(nn.Linear(3, 3), torch.zeros(1, 3))


class ByWord(nn.Module):
    """A part whose name is a word of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"global": nn.Conv2d(3, 8, 3), "local": nn.Conv2d(8, 8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["local"](self.parts["global"](x)).mean((2, 3))


def test_a_name_that_torch_cannot_write_is_named() -> None:
    with pytest.raises(ExportError, match=r"that of parts\.global is a word of the language; rename it, or do without"):
        optimize(ByWord().eval(), images(1), calibration=images(16))
    made = optimize(ByWord().eval(), images(1), ["asymmetric"], images(16), measure=False, fast=True)
    assert [row.name for row in made.report.sites] == ["parts.global", "parts.local"]


class Seldom(nn.Module):
    """A convolution of the bright examples alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bright = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x)
        picked = torch.nonzero(x.mean((1, 2, 3)) > 1e6)[:, 0]
        return found.index_add(0, picked, self.bright(found[picked]))


@pytest.mark.parametrize("examples", [1, 2])
def test_a_convolution_that_gets_no_example_says_what_to_give(examples: int) -> None:
    made = optimize(Seldom().eval(), images(examples), calibration=images(16), measure=False, fast=True)
    reason = {row.name: row.reason or "" for row in made.report.sites}["bright"]
    assert reason.startswith("it is called with a batch of 0")
    assert reason.endswith("give an example input that gets there")


def test_an_exported_program_is_told_to_be_rebuilt() -> None:
    example = images(2)
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (example,))
    with pytest.raises(
        ConvRewriteError, match=r"found ExportedProgram; give convrewrite\.loading\.rebuild\(program\)\.model"
    ):
        optimize(program, example, calibration="weights", measure=False)
    for call in (optimize, analyze):
        with pytest.raises(
            ConvRewriteError, match=r"what ExportedProgram\.module\(\) gives; give convrewrite\.loading\.rebuild"
        ):
            call(program.module(), example)
