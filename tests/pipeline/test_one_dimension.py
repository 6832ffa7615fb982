"""Networks of one-dimensional convolutions: found, fitted, folded, replaced by their like, exported and loaded."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import call
from model_files import forget_modules_below
from networks import relative
from torch import Tensor, nn
from torch.nn import functional as F
from unframed import chains_of, unframed

from convrewrite import analyze, load, optimize
from convrewrite.conv import ConvSpec, canonical_kernel, module_weight, planar
from convrewrite.onnx_files.sessions import open_session
from convrewrite.results.folder import Result
from convrewrite.rewriting.surgery import build_option
from convrewrite.rules.options import allowed_variants
from convrewrite.rules.schema import Match, Rule
from convrewrite.runtime.latency import time_graphs
from convrewrite.structures.algebra import initial_kernels
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import lowerings, make_option

CONVS: dict[str, nn.Module] = {
    "plain": nn.Conv1d(4, 6, 3, padding=1),
    "strided": nn.Conv1d(4, 6, 5, stride=2, padding=2, groups=2, bias=False),
    "dilated": nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    "same": nn.Conv1d(4, 6, 4, padding="same"),
    "circular": nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, output_padding=1, groups=2),
}
every_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


class Wave(nn.Module):
    """A residual network on waves: BatchNorm, a functional convolution, a transposed one, a data-dependent way if asked."""

    def __init__(self, branching: bool = False) -> None:
        super().__init__()
        self.branching = branching
        self.stem = nn.Sequential(nn.Conv1d(2, 16, 7, stride=2, padding=3), nn.BatchNorm1d(16), nn.ReLU())
        self.conv = nn.Conv1d(16, 16, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.kernel = nn.Parameter(torch.randn(24, 16, 3) / 7)
        self.up = nn.ConvTranspose1d(24, 16, 4, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if not self.branching or float(x.detach().mean()) > -1e9:
            x = F.relu(self.norm(self.conv(x)) + x)
        x = F.relu(F.conv1d(x, self.kernel, padding=1))
        return self.head(F.relu(self.up(x)).mean(2))


def waves(count: int) -> Tensor:
    return F.avg_pool1d(torch.randn(count, 2, 132, generator=torch.Generator().manual_seed(1)), 5, 1) * 3


def network(branching: bool = False) -> Wave:
    torch.manual_seed(0)
    made = Wave(branching).train()
    for _ in range(30):
        made(waves(60))
    return made.eval()


def rewritten(model: nn.Module, ratio: float) -> Result:
    rule = Rule(name="r", match=Match(), structures=("channel",), ratio=ratio)
    return optimize(model, waves(1), [rule], waves(80), measure=False)


@every_conv
@torch.no_grad()
def test_the_geometry_is_that_of_a_plane_of_height_one(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    spec, x = ConvSpec.of(conv), torch.randn(2, 4, 11)
    assert (spec.dims, spec.kernel_size[0]) == (1, 1)
    assert spec.output_size((1, 11)) == (1, conv(x).shape[-1])
    assert spec.weight_shape == conv.weight.shape
    kernel = canonical_kernel(conv.weight, spec)
    assert kernel.shape == spec.kernel_shape
    assert torch.equal(module_weight(kernel, spec), conv.weight)
    same = spec.build()
    assert type(same) is type(conv) and ConvSpec.of(same) == spec
    same.load_state_dict(conv.state_dict())
    assert torch.equal(same(x), conv(x))
    flat = replace(spec, dims=2).build()
    flat.load_state_dict({"weight": planar(conv.weight, spec)} | ({} if conv.bias is None else {"bias": conv.bias}))
    torch.testing.assert_close(flat(planar(x, spec)).squeeze(-2), conv(x))


@every_conv
@torch.no_grad()
def test_the_graph_that_is_timed_computes_the_convolution(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    spec, x = ConvSpec.of(conv), torch.randn(1, 4, 11)
    graph = unframed(((spec,),), (1, 11))
    (chain,) = chains_of(graph, ((spec,),))
    (found,) = open_session(graph).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), chain(x), atol=1e-5, rtol=1e-4)
    wide = ConvSpec(8, 8, (1, 3), dims=1)
    assert time_graphs([((wide,),)], (1, 50), rounds=3)[0] > 0


@pytest.mark.parametrize("branching", [False, True], ids=["graph", "no graph"])
@torch.no_grad()
def test_what_is_rewritten_is_made_of_one_dimensional_convolutions(branching: bool) -> None:
    model, x = network(branching), waves(9)
    result = rewritten(model, 0.7)
    rows = {row.name: row for row in result.report.sites}
    assert {name for name, row in rows.items() if row.action == "rewritten"} == {"conv", "kernel", "up"} - (
        {"kernel"} if branching else set()
    )
    found = result.model.get_submodule("conv")
    assert [type(stage) for stage in found.children()] == [nn.Conv1d, nn.Conv1d]
    assert type(result.model.get_submodule("norm")) is (nn.BatchNorm1d if branching else nn.Identity)
    assert relative(result.model(x), model(x)) < 0.1
    assert result.report.totals.parameters.after == sum(p.numel() for p in result.model.parameters())


@every_conv
@pytest.mark.parametrize("name", ["separable", "channel", "grouped", "tucker"])
@torch.no_grad()
def test_at_full_rank_the_outputs_are_the_originals(conv: nn.Module, name: str) -> None:
    structure, conv = discover()[name], copy.deepcopy(conv).double()
    assert isinstance(conv, nn.Conv1d | nn.ConvTranspose1d)
    spec, x = ConvSpec.of(conv), torch.randn(3, 4, 17, dtype=torch.float64)
    kernel, tried = canonical_kernel(conv.weight, spec), 0
    for variant in [] if structure.reject(spec.per_group) else allowed_variants(structure, spec, {}):
        setting = {**variant, "rank": structure.full_rank(spec.per_group, variant)}
        stages = structure.stages(spec.per_group, setting)
        for lowering in lowerings(stages):
            option = replace(make_option(structure, spec, setting), lowering=lowering)
            kernels = initial_kernels(structure, kernel, spec, setting)
            made = build_option(spec, stages, option, kernels, conv.bias, conv.weight)
            assert relative(made(x), conv(x)) < 1e-10, option.describe()
            tried += 1
    assert tried or name == "grouped"


def test_a_kernel_of_one_row_has_nothing_to_split() -> None:
    rows = {row.name: row.applies["asymmetric"] for row in analyze(network(), waves(1), ["asymmetric"])}
    assert rows["conv"] == "the kernel has no second axis to split off"


def test_from_the_command_line_to_onnxruntime_and_back(tmp_path: Path) -> None:
    (tmp_path / "waves_of_user.py").write_text(
        "import sys\nfrom test_one_dimension import Wave, network, waves\n"
        "def make():\n    return network()\n\ndef batches():\n    return [waves(60)]\n"
    )
    where, out = tmp_path / "waves_of_user.py", tmp_path / "out"
    ran = call("optimize", f"{where}:make", "--calib", f"{where}:batches", "--input", "1x2x128", "-o", out)
    forget_modules_below(tmp_path)
    assert ran.code == 0, ran.err
    assert "passed" in ran.out
    model = load(out, network())
    session = open_session(out / "model.onnx")
    for batch in (1, 3):
        (found,) = session.run(None, {session.get_inputs()[0].name: waves(batch).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(waves(batch)).detach(), atol=1e-4, rtol=1e-3)


def test_the_length_of_an_input_is_found(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv1d(2, 16, 5), nn.ReLU(), nn.Conv1d(16, 16, 3)), tmp_path / "m.pt")
    ran = call("analyze", tmp_path / "m.pt")
    assert "input size assumed 1x2x1024" in ran.said
    assert "16->16 3" in ran.said
