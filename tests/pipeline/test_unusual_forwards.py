"""Networks whose forwards, modes or tensors are out of the ordinary: rewritten faithfully, or refused with the cause."""

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import natural, state_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import Result, load, optimize
from convrewrite.errors import ModelLoadError, TraceError
from convrewrite.folders.lasting import FOLDER_VARIABLE
from convrewrite.rules.schema import Protect, Rule
from convrewrite.stored.result_cache import LIMIT_VARIABLE

RULE = Rule(name="r", structures=("channel",), protect=Protect(stem=False, min_channels=0, min_mac_share=0), ratio=0.7)
X = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))

Reshape = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Two convolutions with a body between them, and a linear layer; ``ends`` makes of the scores what is returned."""

    def __init__(self, body: nn.Module | None = None, ends: Reshape = lambda _, scores: scores) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.body = nn.Identity() if body is None else body
        self.scale = nn.Parameter(torch.ones(1, 4))
        self.ends = ends

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.last(self.body(F.relu(self.stem(x)))))
        return self.ends(self, self.head(x.mean((2, 3))))


def rewritten(model: nn.Module, **asked: Any) -> Result:
    asked = {"measure": False, "fast": True, **asked}
    model.eval()
    return optimize(model, X, [RULE], natural(24, 3, 10, 10, torch.float32), **asked)


def reason(result: Result, name: str) -> str:
    return next(row.reason or "" for row in result.report.sites if row.name == name)


def with_gradient(net: Net, scores: Tensor) -> Tensor:
    with torch.enable_grad():
        scores = scores.detach().requires_grad_()
        return torch.autograd.grad(scores.square().sum(), scores)[0]


@pytest.mark.parametrize(
    "ends",
    [
        lambda _, scores: scores[:, 0],
        lambda _, scores: (scores, torch.ones(1).expand(len(scores))),
        lambda net, scores: (scores, net.scale),
        lambda _, scores: torch.fft.rfft(scores),
        with_gradient,
    ],
    ids=["one number of each", "an expanded one", "a parameter", "complex numbers", "a gradient"],
)
def test_outputs_of_any_kind_are_compared(ends: Reshape, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")  # what is kept hangs on outputs, too
    model = Net(ends=ends)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = rewritten(model)
    errors = [row.relative_error for row in result.report.fidelity]
    assert any(row.action == "rewritten" for row in result.report.sites)
    assert max(errors) < 0.5
    others = natural(64, 3, 10, 10, torch.float32)
    first, found = (out[0] if isinstance(out, tuple) else out for out in (model(others), result.model(others)))
    assert float(((first - found).abs().norm() / first.abs().norm()).detach()) < max(0.05, 3 * errors[0])


class Quiet(nn.Conv2d):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Frozen(Net):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_modes_need_not_give_the_module_back() -> None:
    assert rewritten(Frozen()).report.totals.macs.ratio < 1
    assert rewritten(Net(Quiet(8, 8, 1))).report.totals.macs.ratio < 1


def test_scripted_parts_stay_and_scripted_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against it
        model = Net(nn.Sequential(torch.jit.script(nn.SiLU()), torch.jit.trace(nn.Tanh(), torch.ones(1))))
        whole = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3)))
    result = rewritten(model)
    assert {row.name for row in result.report.sites if row.action == "rewritten"} >= {"stem", "last"}
    with pytest.raises(ModelLoadError, match=r"found a TorchScript module.*give the module that it was made from"):
        rewritten(whole)


def test_scripted_convolutions_stay_where_no_graph_shows_the_model() -> None:
    class Asking(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(-x if float(x.sum()) > 1e9 else x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against it
        model = Asking(torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())))
    assert {row.name for row in rewritten(model).report.sites if row.action == "rewritten"} == {"stem", "last"}


def test_a_network_in_the_wrapper_of_several_processes_is_asked_for_itself(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(ModelLoadError, match=r"found it in DistributedDataParallel; give its .module"):
            rewritten(wrapped)
        assert rewritten(wrapped.module).report.totals.macs.ratio < 1
    finally:
        torch.distributed.destroy_process_group()


def test_parameters_before_that_the_original_has_not_are_told() -> None:
    model = Net()
    model.last.bias = model.stem.bias
    result = rewritten(model)
    own, before = sum(p.numel() for p in model.parameters()), result.report.totals.parameters.before
    assert before == own + 8
    assert f"the original has {own:,} parameters, 8 fewer than the report counts before" in " ".join(
        result.report.notes
    )
    assert "fewer than are counted" not in " ".join(rewritten(Net()).report.notes)


def test_a_weight_that_is_no_parameter_stays() -> None:
    for register in (True, False):
        inner = nn.Conv2d(8, 8, 3, padding=1)
        weight = inner.weight.detach().clone()
        del inner.weight
        if register:
            inner.register_buffer("weight", weight)
        else:
            inner.weight = weight
        assert "no parameter" in reason(rewritten(Net(inner)), "body")


def test_a_forward_in_inference_mode_is_counted() -> None:
    class Inference(Net):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)

    found, plain = rewritten(Inference()).report.totals, rewritten(Net()).report.totals
    assert found.macs.before == plain.macs.before


def test_examples_that_are_convolved_one_by_one_stay() -> None:
    class Each(nn.Module):
        def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
            super().__init__()
            self.conv, self.way = nn.Conv2d(8, 8, 3, padding=1), way

        def forward(self, x: Tensor) -> Tensor:
            return self.way(self.conv, x)

    for way in (lambda conv, x: torch.stack([conv(one) for one in x]), lambda conv, x: torch.vmap(conv)(x)):
        result = rewritten(Net(Each(way)))
        assert "no axis for the examples" in reason(result, "body.conv")
        assert any(row.action == "rewritten" for row in result.report.sites)


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: float(torch.rand(()))], ids=["python", "torch"])
def test_a_depth_that_is_drawn_is_the_same_at_every_look(draw: Callable[[], float]) -> None:
    class Skipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x) if draw() < 0.5 else x

    macs = set()
    for seed in range(3):
        random.seed(seed)
        result = rewritten(Net(nn.Sequential(*(Skipped() for _ in range(4)))))
        macs.add(result.report.totals.macs)
    assert len(macs) == 1


def test_what_a_graph_of_a_forward_leaves_out_is_told() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.dropout(x, 0.5, self.training) + 1, self.kernel, padding=1)

    class Counting(Dropping):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return F.conv2d(x + 1, self.kernel, padding=1)

    class Plain(Dropping):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x + torch.ones(1), self.kernel, padding=1)

    told = [
        any("is left out" in note for note in rewritten(Net(kind())).report.notes)
        for kind in (Dropping, Counting, Plain)
    ]
    assert told == [True, True, False]


def test_a_kernel_that_hangs_on_how_large_or_many_inputs_are_is_not_made_a_constant() -> None:
    class Made(nn.Module):
        def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.kernel, self.make = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.2), make

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.make(self.kernel, x), padding=1)

    makes: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda kernel, x: kernel * len(x),
        lambda kernel, x: kernel * (2 if x.amax() > 50 else 1),
        lambda kernel, x: kernel * x.shape[-1],
    ]
    for make in makes:
        assert "body" not in {row.name for row in rewritten(Net(Made(make))).report.sites}
    assert {row.name for row in rewritten(Net(Made(lambda kernel, _: kernel - kernel.mean()))).report.sites} >= {"body"}


class PaddedByItsGeometry(nn.Module):
    """Asks the convolution for its stride, kernel and channels, as networks do that pad as TensorFlow does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        conv, sides = self.conv, list[int]()
        for axis in (1, 0):
            span = (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1
            missing = max(
                (math.ceil(x.shape[2 + axis] / conv.stride[axis]) - 1) * conv.stride[axis] + span - x.shape[2 + axis], 0
            )
            sides += [missing // 2, missing - missing // 2]
        return conv(F.pad(x, sides))[:, : conv.out_channels] * conv.in_channels


def test_a_convolution_whose_geometry_is_read_is_replaced_and_still_shows_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), PaddedByItsGeometry(), nn.ReLU(), nn.Conv2d(8, 4, 3))
    result = rewritten(model)
    assert "2.conv" in {row.name for row in result.report.sites if row.action == "rewritten"}
    folder = result.save(tmp_path / "out")
    with torch.no_grad():
        wanted = result.model(X)
        assert torch.equal(load(folder, model)(X), wanted)
        assert torch.equal(torch.load(folder / "model.pt", weights_only=False)(X), wanted)


def test_a_weight_that_a_mode_of_its_own_merges_into_stays() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def train(self, mode: bool = True) -> "Merging":
            self.conv.weight.data.mul_(1.0)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    result = rewritten(Net(Merging()))
    assert "asks more of it than to be called" in reason(result, "body.conv")
    result.model.train()


def test_what_stays_in_train_mode_is_named() -> None:
    class Always(nn.Dropout):
        def train(self, _mode: bool = True) -> "Always":
            return super().train(True)

    with pytest.raises(TraceError, match="found body in train mode"):
        rewritten(Net(Always()))


def test_a_frozen_kernel_stays_frozen_and_backward_hooks_are_not_lost() -> None:
    model = Net()
    model.stem.weight.requires_grad_(False)
    model.last.register_full_backward_hook(lambda *_: None)
    result = rewritten(model)
    trained = {name: parameter.requires_grad for name, parameter in result.model.named_parameters() if "stem" in name}
    assert not any(wanted for name, wanted in trained.items() if name.endswith("weight"))
    assert any(wanted for name, wanted in trained.items() if name.endswith("bias"))
    assert "backward hooks" in reason(result, "last")


def test_a_fit_is_never_that_of_a_model_that_only_looks_alike(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one class, with the same weights, the same outputs for an example of zeros, and other inputs of their convolutions."""

    class Prepared(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.power = power

        def forward(self, x: Tensor) -> Tensor:
            return x.abs().pow(self.power) if float(x.abs().max()) > 0 else x

    class Unweighted(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Any:
            return super().forward(self.body(x))

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    inputs = natural(24, 3, 10, 10, torch.float32)

    def made(power: int, resume: bool) -> dict[str, bytes]:
        model = Unweighted(Prepared(power)).eval()
        return state_bytes(optimize(model, 0 * X, [RULE], inputs, measure=False, fast=True, resume=resume).model)

    made(1, resume=True)
    assert made(3, resume=True) == made(3, resume=False)


def test_a_class_that_cannot_show_itself_is_rewritten(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unshown(Net):
        def __repr__(self) -> str:
            raise RuntimeError("no")

    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    assert rewritten(Unshown()).report.totals.macs.ratio < 1


@pytest.mark.parametrize("taken", [1, 4])
def test_a_model_that_takes_no_other_batch_is_given_that(taken: int) -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x.view(taken, 3, 10, 10))

    model, inputs = Fixed().eval(), natural(24, 3, 10, 10, torch.float32)
    result = optimize(model, inputs[:taken], [RULE], inputs, any_speed=True)
    assert [row.passed for row in result.report.parity] == [True]
    assert result.report.calibration.fitted_on in (19, 20, 16)
    assert result.report.fidelity[0].relative_error < 0.5


def test_the_wrong_type_of_numbers_is_told() -> None:
    with pytest.raises(TraceError, match=r"of the type it expects, which float64 is not, as x\.to\(torch\.float32\)"):
        optimize(Net().eval(), X.double(), [RULE], measure=False)
    with pytest.raises(TraceError, match=r"which float32 is not, as x\.to\(torch\.float64\)"):
        optimize(Net().double().eval(), X, [RULE], measure=False)
    indices = nn.Sequential(nn.Embedding(8, 4), nn.Conv1d(4, 4, 1)).eval()
    with pytest.raises(TraceError, match=r"float32 is not, as x\.long\(\) .*an example, --input FILE\.py:NAME"):
        optimize(indices, torch.zeros(1, 4), [RULE], measure=False)

    class OwnFloats(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) @ torch.eye(5)

    with pytest.raises(TraceError, match=r"its forward makes numbers of another type: .* as model\.float\(\)$"):
        optimize(OwnFloats().double().eval(), X.double(), [RULE], measure=False)


def test_a_model_that_may_hand_on_something_beside_its_graph_is_said_to_be_run_anew() -> None:
    plain, hooked = Net(), Net()
    seen: list[Tensor] = []
    hooked.body.register_forward_hook(lambda _module, _given, found: seen.append(found))
    told = [[note for note in rewritten(net).report.notes if "beside its graph" in note] for net in (plain, hooked)]
    assert told[0] == [] and len(told[1]) == 1
