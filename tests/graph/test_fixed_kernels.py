"""Convolutions that compute their kernel at every call, though not from the input, are plain ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import Calls, relative, settled, state_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from convrewrite import apply, load, optimize
from convrewrite.graph.lifting import lift
from convrewrite.graph.sites import find_sites
from convrewrite.graph.tracing import trace
from convrewrite.planning.plan import Plan

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
MakeConv = Callable[..., nn.Module]


class Standardised(nn.Conv2d):
    """Weight standardisation: Qiao et al. 2019."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / torch.sqrt(variance + 1e-5), self.bias)


class Scaled(nn.Module):
    """With a gain, and no subclass of a convolution."""

    def __init__(self, inputs: int, outputs: int, size: int, padding: int = 0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs, size, size) * 0.2)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.normalize(self.kernel, dim=1) * self.gain, None, 1, self.padding)


def normed(norm: Callable[[nn.Module], nn.Module], kind: MakeConv = nn.Conv2d) -> MakeConv:
    return lambda *args, **options: norm(kind(*args, **options))


KINDS: dict[str, MakeConv] = {
    "standardised": Standardised,
    "scaled": Scaled,
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "weight norm by a hook": normed(weight_norm),
    "spectral norm by a hook": normed(spectral_norm),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the model cannot be pickled:UserWarning"),  # torch refuses parametrised modules
]


def network(make: MakeConv) -> nn.Sequential:
    """Three such convolutions, the last one with a BatchNorm."""
    torch.manual_seed(0)
    layers = (make(3, 8, 3), nn.ReLU(), make(8, 16, 3, padding=1), nn.ReLU(), make(16, 16, 3), nn.BatchNorm2d(16))
    return settled(nn.Sequential(*layers))


@every_kind
@torch.no_grad()
def test_they_become_plain_convolutions_of_the_same_numbers(make: MakeConv) -> None:
    model = network(make)
    before, expected = state_bytes(model), model(X)
    lifted = lift(model, (X,))
    assert [type(lifted.model[i]) for i in (0, 2, 4)] == [nn.Conv2d] * 3
    assert not any(lifted.model[i]._forward_pre_hooks for i in (0, 2, 4))
    assert torch.equal(lifted.model(X), expected)
    assert state_bytes(model) == before
    sites = find_sites(lifted.model, (X,), trace(lifted.model), lifted.reasons)
    assert [(site.name, site.refusal, site.batch_norm) for site in sites] == [
        ("0", None, None),
        ("2", None, None),
        ("4", None, "5"),
    ]


@every_kind
@torch.no_grad()
def test_what_is_rewritten_comes_back_and_what_is_kept_is_as_it_was(make: MakeConv, tmp_path: Path) -> None:
    model = network(make)
    images = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    result = optimize(model, X, calibration=images, measure=False)
    actions = {row.name: row.action for row in result.report.sites}
    assert actions == {"0": "kept", "2": "rewritten", "4": "rewritten"}
    assert type(result.model[0]) is type(model[0])
    assert any("became constants: 2, 4" in note for note in result.report.notes)
    error = result.report.fidelity[0].relative_error
    assert 0 < error < 0.9, "it is the network of these kernels that was rewritten"
    folder = result.save(tmp_path / "out")
    again = load(folder, network(make))
    assert torch.equal(again(X), result.model(X))


@torch.no_grad()
def test_the_plan_of_a_result_gives_the_result_again() -> None:
    model = network(KINDS["weight norm"])
    images = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    result = optimize(model, X, calibration=images, measure=False)
    again = apply(model, X, Plan.from_json(result.plan.to_json(), "plan.json"), calibration=images, measure=False)
    assert torch.equal(again.model(X), result.model(X))


def test_of_other_weights_the_kernel_is_another() -> None:
    model, other = network(Standardised), network(Standardised)
    with torch.no_grad():
        other[2].weight.mul_(3).add_(torch.randn_like(other[2].weight))
    first, second = lift(model, (X,)).model[2].weight, lift(other, (X,)).model[2].weight
    assert relative(first, second) > 0.1


# --- what stays as it is


class Own(nn.Module):
    """A kernel, and what a forward makes of it."""

    def __init__(self, forward: Callable[["Own", Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


MORE: dict[str, Callable[[Own, Tensor], Tensor]] = {
    "from the input": lambda m, x: F.conv2d(x, m.kernel * x.mean()),
    "at random": lambda m, x: F.conv2d(x, m.kernel * torch.rand(())),
    "of another input": lambda m, x: F.conv2d(x * 2, m.kernel * 2),
    "with something behind": lambda m, x: F.conv2d(x, m.kernel * 2) + 1,
    "twice": lambda m, x: F.conv2d(F.conv2d(x, m.kernel * 2), m.kernel * 3),
    "as much as it is used": lambda m, x: F.conv2d(x, m.kernel * 2) * m.kernel.sum(),
}


@pytest.mark.parametrize("forward", MORE.values(), ids=MORE.keys())
def test_modules_that_do_more_stay(forward: Callable[[Own, Tensor], Tensor]) -> None:
    model = Calls(lambda m, x: m.own(m.conv(x)), conv=nn.Conv2d(3, 3, 3), own=Own(forward)).eval()
    lifted = lift(model, (X,))
    assert not any(conv.computed for one in lifted.lifts for conv in one.convs)
    assert type(lifted.model.own) is Own


def test_what_was_frozen_stays_frozen() -> None:
    frozen = network(KINDS["weight norm"]).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in lift(frozen, (X,)).model.parameters())
    assert all(parameter.requires_grad for parameter in lift(network(KINDS["weight norm"]), (X,)).model.parameters())


def test_hooks_of_the_user_are_not_lost() -> None:
    model = network(Standardised)
    model[2].register_forward_hook(lambda _module, _args, output: output + 1)
    lifted = lift(model, (X,)).model
    assert [type(lifted[i]) for i in (0, 2, 4)] == [nn.Conv2d, Standardised, nn.Conv2d]


def test_a_module_that_is_given_more_than_an_image_stays() -> None:
    class Gated(Own):
        def forward(self, x: Tensor, on: bool = True) -> Tensor:  # type: ignore[override]
            return F.conv2d(x, self.kernel * 2) if on else x

    model = Calls(lambda m, x: m.own(m.own(x, on=True), on=False), own=Gated(MORE["twice"])).eval()
    assert lift(model, (X,)).model is model or type(lift(model, (X,)).model.own) is Gated
