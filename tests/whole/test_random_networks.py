"""Properties of the whole way, over drawn networks: exactness, what is left untouched, what is told, and what comes back."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_networks import SIDE, Functional, Layer, Network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import relative, state_bytes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import convrewrite
from convrewrite.inputs import bound_inputs
from convrewrite.layers.dynamic import DynamicConv2d
from convrewrite.modules.outputs import named_outputs
from convrewrite.pipeline.prepare import prepare
from convrewrite.planning.plan import Plan
from convrewrite.planning.planned import make_plan
from convrewrite.results.folder import Result
from convrewrite.rewriting.site_fit import UNREACHED
from convrewrite.rules.schema import Protect, Require, Rule
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import check_parity, require_parity
from convrewrite.settings import Constraints, Settings

pytestmark = pytest.mark.slow

FROM_WEIGHTS = {torch.float64: 1e-10, torch.float32: 1e-4}
FITTED = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Fits compare squares of errors, which rounding hides below 1.5e-8, the root of its unit, at each of up to ten sites."""

EVERYWHERE = Protect(stem=False, min_channels=0, min_mac_share=0)
STRUCTURES = ("separable", "asymmetric", "grouped", "channel", "tucker", "cp")
SAME_SHAPE = ("skip", "skip in place", "reversed skip", "gate in place", "divide in place", "exchange")
CALLS = ("module", "module", "twice", "tied", "parameter", "parameter twice", "buffer", "from input")
RELUS = ("", "module", "in place", "in place on a view", "function", "before", "in place before")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, DynamicConv2d)
SOAK = 1000
ALL_THE_SAME = settings(
    deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


# --- what is drawn


@st.composite
def layers(draw: st.DrawFn, inputs: int, size: int, dims: int, forks: bool) -> Layer:
    """A layer that takes so many channels of this width; sizes stay between 5 and 20. With ``forks`` it may be passed over."""
    kinds = ["standard", "pointwise", "dilated", "depthwise", "separable", "transposed"]
    kinds += ["grouped"] if inputs % 2 == 0 else []
    kinds += ["asymmetric", "dynamic"] if dims == 2 else []
    kind = draw(st.sampled_from(kinds))
    call = "module"
    if kind not in ("separable", "dynamic"):
        call = draw(st.sampled_from(CALLS))
    way = draw(st.sampled_from(["plain", "plain", *SAME_SHAPE, "projection", "concat"]))
    fork = draw(st.sampled_from([None, None, None, -1e9, 0.0])) if forks else None
    same = way in SAME_SHAPE or fork is not None or "twice" in call or call == "tied"
    outputs = inputs if same else draw(st.sampled_from([4, 6, 8]))
    if kind == "depthwise":
        outputs = inputs * (1 if same else draw(st.sampled_from([1, 2])))
    if fork is not None and way == "concat":
        way = "plain"
    groups = 2 if kind == "grouped" else 1
    if kind in ("transposed", "dynamic") and inputs % 2 == outputs % 2 == 0:
        groups = draw(st.sampled_from([1, 2]))
    keeps = way != "plain" or fork is not None
    kernel = 1 if kind == "pointwise" else draw(st.sampled_from([3, 5] if keeps else [3, 5, 2, 4]))
    padding = "zeros"
    if kind != "transposed":
        paddings = ["zeros", "reflect", "replicate", "circular", "same"] + ([] if keeps else ["none"])
        padding = draw(st.sampled_from(paddings))
    stride = 1 if keeps or padding == "same" else draw(st.sampled_from([1, 2]))
    layer = Layer(
        kind, outputs, kernel, stride, padding, groups, draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from(RELUS)), call, way, fork,
    )  # fmt: skip
    return layer if 5 <= layer.after(size) <= 20 else Layer("standard", inputs, padding="same", call="module")


@st.composite
def networks(draw: st.DrawFn, most: int = 5, for_onnx: bool = False) -> Network:
    """Up to so many layers, each of which fits the one before. ONNX has no ways that depend on data, and no float64."""
    dims = draw(st.sampled_from([2, 2, 2, 1]))
    size = start = draw(st.sampled_from([9, 12]))
    channels, chosen = 3, []
    for _ in range(draw(st.integers(1, most))):
        layer = draw(layers(channels, size, dims, bool(chosen) and not for_onnx))
        channels = layer.outputs + (SIDE if layer.way == "concat" else 0)
        size = layer.after(size)
        chosen.append(layer)
    returns = draw(st.sampled_from(["tensor", "scores", "tuple", "dict"]))
    branching, double = (False, False) if for_onnx else draw(st.tuples(st.booleans(), st.booleans()))
    return Network(tuple(chosen), dims, start, returns, branching, double, draw(st.integers(0, 99)))


# --- what is looked at


class _Counting(TorchDispatchMode):
    """Counts multiply-accumulates at the operators below every module and function."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            positions = args[0] if args[6] else output
            self.macs += args[1].numel() * positions[:, :1].numel()
            self.convolutions += 1
        elif name in ("mm", "bmm"):
            self.macs += output.numel() * args[0].shape[-1]
        elif name == "addmm":
            self.macs += output.numel() * args[1].shape[-1]
        return output


def counted(model: nn.Module, x: Tensor) -> _Counting:
    """MACs and convolutions of one run on one example."""
    with torch.no_grad(), _Counting() as counting:
        model(x.clone())
    return counting


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The state, the modes and the structure of a model stay as they are; some modules are in train mode."""
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 1
    names = [(name, id(module), module.training) for name, module in model.named_modules()]
    asked = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    before, hooks = state_bytes(model), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    yield
    assert state_bytes(model) == before
    assert [(name, id(module), module.training) for name, module in model.named_modules()] == names
    assert [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()] == asked
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    model.eval()


def errors(found: nn.Module, original: nn.Module, x: Tensor) -> dict[str, float]:
    with torch.no_grad():
        expected, outputs = named_outputs(original(x.clone())), named_outputs(found(x.clone()))
    assert expected.keys() == outputs.keys()
    for name, tensor in expected.items():
        assert (outputs[name].shape, outputs[name].dtype) == (tensor.shape, tensor.dtype)
    return {name: relative(outputs[name], tensor) for name, tensor in expected.items()}


def called(model: nn.Module, x: Tensor) -> set[nn.Module]:
    """The modules that a run on an input calls."""
    seen: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: seen.add(m)) for m in model.modules()]
    with torch.no_grad():
        model(x.clone())
    for handle in handles:
        handle.remove()
    return seen


def must_be_rewritten(model: nn.Module, x: Tensor) -> set[str]:
    """Names of convolutions, modules and functions on a tensor of their own, that run: "channel" takes any geometry."""
    ran = called(model, x)
    owners = Counter(id(getattr(module, "weight", None)) for module in model.modules())
    return {
        name
        for name, module in model.named_modules()
        if module in ran and isinstance(module, (*CONVOLUTIONS, Functional)) and owners[id(module.weight)] == 1
    }


def check_report(result: Result, model: nn.Module, x: Tensor) -> None:
    """Every convolution has a row, every kept one a reason, and the totals are those of the models as they run."""
    ran = called(model, x)
    convolutions = {m for m in model.modules() if isinstance(m, CONVOLUTIONS)}
    functional = {m for m in ran if isinstance(m, Functional)}
    rows = result.report.sites
    assert len({row.name for row in rows}) == len(rows) == len(convolutions) + len(functional)
    assert all(row.reason and row.reason.strip() and row.reason != "kept" for row in rows if row.action == "kept")
    assert all(row.option and row.reason is None for row in rows if row.action == "rewritten")
    before, after = counted(model, x), counted(result.model, x)
    never = [row for row in rows if row.macs_before == 0]
    assert sum(row.calls for row in rows) - len(never) == before.convolutions
    totals = result.report.totals
    assert (totals.macs.before, totals.macs.after) == (before.macs, after.macs)
    fixed = [f"{lift.module}.{conv.weight}" for lift in result.plan.lifted for conv in lift.convs]
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in fixed)
    assert totals.parameters.before == sum(p.numel() for p in model.parameters()) + buffers
    assert totals.parameters.after == sum(p.numel() for p in result.model.parameters())


def check_keys(result: Result, model: nn.Module) -> None:
    """What was not rewritten has its keys, and under them its numbers."""
    changed = [name for site in result.plan.sites if site.option for name in (site.name, site.batch_norm) if name]
    for lift in result.plan.lifted:
        prefix = f"{lift.module}." if lift.module else ""
        changed += [f"{prefix}{key}" for conv in lift.convs for key in (conv.weight, conv.bias) if key]
    after = state_bytes(result.model)
    for key, value in state_bytes(model).items():
        if not any(key == name or key.startswith(f"{name}.") for name in changed):
            assert after.get(key) == value, key


# --- the properties


def full_rank_plan(model: nn.Module, x: Tensor, pick: int) -> Plan:
    """Every site that any structure takes, at full rank in one of its variants."""
    rule = Rule(name="all", structures=STRUCTURES, protect=EVERYWHERE)
    prepared = prepare(model, bound_inputs(model, x), [rule])
    chosen: list[Any] = []
    for index, space in enumerate(prepared.search_spaces):
        rank_range = space.rank_ranges[(pick + index) % len(space.rank_ranges)] if space.rank_ranges else None
        chosen.append((space.site, rank_range.at(max(rank_range.ranks)) if rank_range else None, space.reason))
    return make_plan(prepared, Constraints({}), Settings(), "test", chosen, None)


def check_exact(net: Network, pick: int, calibration: object) -> None:
    model, x = net.build(), net.inputs(1)
    plan = full_rank_plan(model, x, pick)
    with untouched(model):
        result = convrewrite.apply(model, x, plan, calibration, measure=False)
    rewritten = {row.name for row in result.report.sites if row.action == "rewritten"}
    unreached = {row.name for row in result.report.sites if row.reason == UNREACHED}
    assert rewritten | unreached == {site.name for site in plan.sites if site.option} | unreached
    assert rewritten == {site.name for site in result.plan.sites if site.option}
    for name in must_be_rewritten(model, x):
        assert {name, f"{name}.weight"} & (rewritten | unreached), name
    assert not unreached or (calibration != "weights" and any(layer.fork == 0 for layer in net.layers))
    check_report(result, model, x)
    check_keys(result, model)
    for batch in (net.inputs(1, seed=5), net.inputs(3, seed=6)):
        found = errors(result.model, model, batch)
        assert max(found.values()) < (FROM_WEIGHTS if calibration == "weights" else FITTED)[net.dtype], found


@settings(ALL_THE_SAME, max_examples=8)
@given(net=networks(), pick=st.integers(0, 11))
def test_at_full_rank_from_the_weights_alone_the_outputs_are_the_originals(net: Network, pick: int) -> None:
    check_exact(net, pick, "weights")


@settings(ALL_THE_SAME, max_examples=4)
@given(net=networks(), pick=st.integers(0, 11))
def test_at_full_rank_fitted_to_inputs_the_outputs_are_the_originals(net: Network, pick: int) -> None:
    check_exact(net, pick, net.inputs(12, seed=2))


def smaller(net: Network, model: nn.Module, structures: tuple[str, ...]) -> Result:
    rule = Rule(
        name="small", structures=structures, protect=EVERYWHERE, ratio=0.6, require=Require(min_mac_saving=0.01)
    )
    return convrewrite.optimize(model, net.inputs(1), [rule], net.inputs(12, seed=2), measure=False)


SOME = st.permutations(STRUCTURES).map(lambda names: tuple(names[:2]))


def check_smaller(net: Network, structures: tuple[str, ...]) -> None:
    """It runs, costs what it says, and comes back from a folder."""
    model, x = net.build(), net.inputs(1)
    with untouched(model):
        result = smaller(net, model, structures)
    check_report(result, model, x)
    check_keys(result, model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = convrewrite.load(result.save(Path(folder) / "out"), net.build(seed=100))
    for batch in (net.inputs(1, seed=5), net.inputs(3, seed=6)):
        with torch.no_grad():
            found, again = named_outputs(result.model(batch.clone())), named_outputs(loaded(batch.clone()))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
        assert found.keys() == again.keys()
        assert all(torch.equal(found[name], again[name]) for name in found)


@settings(ALL_THE_SAME, max_examples=5)
@given(net=networks(), structures=SOME)
def test_at_a_part_of_the_cost_it_runs_costs_what_it_says_and_comes_back(
    net: Network, structures: tuple[str, ...]
) -> None:
    check_smaller(net, structures)


@settings(ALL_THE_SAME, max_examples=3)
@given(net=networks(most=4, for_onnx=True), structures=SOME)
def test_onnxruntime_gives_what_the_smaller_network_gives(net: Network, structures: tuple[str, ...]) -> None:
    result = smaller(net, net.build(), structures)
    with tempfile.TemporaryDirectory() as folder:
        exported = export(result.model, (net.inputs(2),), Path(folder) / "model.onnx")
        require_parity(check_parity(result.model, exported.path, (net.inputs(2, seed=5),)))


# --- the same for long


@pytest.mark.soak
@settings(ALL_THE_SAME, max_examples=SOAK)
@given(net=networks(), pick=st.integers(0, 11))
def test_at_full_rank_from_the_weights_alone_for_long(net: Network, pick: int) -> None:
    check_exact(net, pick, "weights")


@pytest.mark.soak
@settings(ALL_THE_SAME, max_examples=SOAK)
@given(net=networks(), pick=st.integers(0, 11))
def test_at_full_rank_fitted_to_inputs_for_long(net: Network, pick: int) -> None:
    check_exact(net, pick, net.inputs(12, seed=2))


@pytest.mark.soak
@settings(ALL_THE_SAME, max_examples=SOAK)
@given(net=networks(), structures=SOME)
def test_at_a_part_of_the_cost_for_long(net: Network, structures: tuple[str, ...]) -> None:
    check_smaller(net, structures)
