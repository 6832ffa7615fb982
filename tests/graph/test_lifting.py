"""Functional convolutions become modules: which, under which names, and why some do not."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import Calls, settled, state_bytes
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec, Kind
from convrewrite.graph.lifting import lift
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.rewriting.surgery import replace_site, settle

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


class Mixed(nn.Module):
    """Functional convolutions in every usual way of holding a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.offset = nn.Parameter(torch.randn(4))
        self.register_buffer("blur", torch.rand(4, 1, 3, 3))
        self.conv = nn.Conv2d(4, 4, 3)
        self.many = nn.ParameterList([nn.Parameter(torch.randn(4, 4, 1, 1)) for _ in range(2)])
        self.up = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.unused = nn.Parameter(torch.randn(3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(aten.conv2d(x, self.kernel, self.offset, [2, 2], [self.kernel.shape[-1] // 2] * 2))
        x = F.conv2d(x, self.blur, groups=x.shape[1])
        if mask is not None:
            x = x * mask
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding="same")
        x = torch.conv2d(x, self.many[0]) + F.conv2d(x, self.many[1].square())
        x[:, :1] = torch.ones(x.shape[0], 1, 1, 1)
        return F.conv_transpose2d(x, weight=self.up, stride=2)


def within(part: nn.Module) -> nn.Sequential:
    return settled(nn.Sequential(nn.Conv2d(3, 3, 1), part, nn.ReLU()))


def sites_of(model: nn.Module, x: Tensor = X) -> dict[str, Site]:
    """The sites of the lifted model, which computes the same; the model itself is as it was."""
    before, tables = state_bytes(model), [set(vars(module)) for module in model.modules()]
    lifted = lift(model, (x,))
    with torch.no_grad():
        assert torch.allclose(lifted.model(x), model(x), atol=1e-5)
    assert state_bytes(model) == before
    assert [set(vars(module)) for module in model.modules()] == tables
    found = find_sites(lifted.model, (x,), trace(lifted.model), lifted.reasons)
    return {site.name: site for site in found}


def reason_of(forward: Callable[[Calls, Tensor], Tensor], **modules: nn.Module) -> str:
    """Why the one functional convolution of a model is not lifted; the model is then given back."""
    model = Calls(forward, **modules).eval()
    assert lift(model, (X,)).model is model
    return str(sites_of(model)["#0"].refusal).partition(": ")[2]


def kernel(*shape: int) -> nn.Module:
    """A module that holds one parameter."""
    made = nn.Module()
    made.kernel = nn.Parameter(torch.randn(*shape))
    return made


# --- what is lifted


def test_every_way_of_holding_a_kernel() -> None:
    sites = sites_of(within(Mixed()))
    assert {name: site.refusal for name, site in sites.items()} == {
        "0": None,
        "1.kernel": None,
        "1.blur": None,
        "1.conv": None,
        "1.many_0": None,
        "1#0": "the kernel is no parameter or buffer, but computed at every call or held elsewhere",
        "1.up": None,
    }
    assert sites["1.kernel"].spec == ConvSpec(3, 4, (3, 3), (2, 2), (1, 1))
    assert sites["1.kernel"].batch_norm == "1.norm"
    assert sites["1.blur"].spec == ConvSpec(4, 4, (3, 3), groups=4, bias=False)
    assert sites["1.conv"].spec == ConvSpec(4, 4, (3, 3), padding="same")
    assert (sites["1.up"].kind, sites["1.up"].spec.stride) == (Kind.TRANSPOSED, (2, 2))


class Masked(nn.Conv1d):
    """Of Jasper and QuartzNet: it hides what is behind the end of each example, and hands the lengths on."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        behind = torch.arange(x.size(2)).expand(len(lengths), x.size(2)) >= lengths.unsqueeze(1)
        x = F.conv1d(x.masked_fill(behind[:, None], 0.0), self.weight, self.bias, self.stride, self.padding)
        return x, (lengths + 2 * self.padding[0] - self.kernel_size[0]) // self.stride[0] + 1


def test_a_convolution_that_is_given_the_lengths_of_its_examples_too() -> None:
    model = Calls(lambda m, x: m.conv(x, m.ends[: len(x)])[0], conv=Masked(3, 4, 3, 2)).eval()
    model.register_buffer("ends", torch.tensor([12, 5, 9]))
    for lifted in (lift(model, (X[:, :, 0],)).model, lift(model, (X[:1, :, 0],)).model):
        assert type(lifted.conv.weight) is nn.Conv1d
        for x in torch.randn(4, 3, 14).split([3, 1]):
            assert torch.allclose(lifted(x), model(x), atol=1e-6)


def test_only_the_module_with_the_calls_becomes_a_graph_and_other_keys_stay() -> None:
    model = within(Mixed())
    lifted = lift(model, (X,)).model
    assert [type(module) for module in lifted] == [nn.Conv2d, type(lifted[1]), nn.ReLU]
    assert isinstance(lifted[1], fx.GraphModule)
    before, after = model.state_dict(), lifted.state_dict()
    moved = {
        "1.kernel": "1.kernel.weight",
        "1.offset": "1.kernel.bias",
        "1.blur": "1.blur.weight",
        "1.many.0": "1.many_0.weight",
        "1.up": "1.up.weight",
    }
    assert {moved.get(key, key) for key in before} == set(after)
    assert all(torch.equal(value, after[moved.get(key, key)]) for key, value in before.items())


def test_the_notes_say_what_was_lifted_and_which_keys_moved() -> None:
    made, moved = lift(within(Mixed()), (X,)).notes
    assert made == "functional convolutions became modules: 1.kernel, 1.blur, 1.conv, 1.many_0, 1.up"
    assert moved == (
        "state-dict keys are others now: 1.kernel is 1.kernel.weight, 1.offset is 1.kernel.bias, "
        "1.blur is 1.blur.weight, 1.many.0 is 1.many_0.weight, 1.up is 1.up.weight"
    )


@torch.no_grad()
def test_padding_by_the_size_of_the_input_as_tensorflow_does() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            around: list[int] = []
            height, width = x.size()[-2:]
            for size, k, s in zip((height, width), self.kernel_size, self.stride, strict=True):
                more = max((math.ceil(size / s) - 1) * s + k - size, 0)
                around = [more // 2, more - more // 2, *around]
            return F.conv2d(F.pad(x, around), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    model = within(Same(3, 6, 3, stride=2))
    sites = sites_of(model)
    assert {name: site.refusal for name, site in sites.items()} == {"0": None, "1.weight": None}
    lifted = pickle.loads(pickle.dumps(lift(model, (X,)).model))
    for size in ((12, 12), (13, 9), (7, 16)):
        x = torch.randn(2, 3, *size)
        assert torch.allclose(lifted(x), model(x), atol=1e-6)


def test_a_frozen_parameter_and_a_buffer_stay_frozen() -> None:
    part = Mixed()
    part.kernel.requires_grad_(False)
    lifted = lift(within(part), (X,)).model
    frozen = {name for name, parameter in lifted.named_parameters() if not parameter.requires_grad}
    assert frozen == {"1.kernel.weight", "1.blur.weight"}


def test_a_block_called_twice_has_one_site_with_two_calls() -> None:
    part = kernel(3, 3, 3, 3)
    block = Calls(lambda m, x: F.relu(F.conv2d(x, m.held.kernel, padding=1)), held=part)
    sites = sites_of(Calls(lambda m, x: m.block(F.max_pool2d(m.block(x), 2)), block=block).eval())
    assert {name: site.input_sizes for name, site in sites.items()} == {"block.held.kernel": ((12, 12), (6, 6))}


def test_a_kernel_used_twice_in_one_forward_is_one_site_with_two_calls() -> None:
    forward = lambda m, x: F.conv2d(F.conv2d(x, m.held.kernel), m.held.kernel)  # noqa: E731
    sites = sites_of(Calls(forward, held=kernel(3, 3, 3, 3)).eval())
    assert {name: len(site.input_sizes) for name, site in sites.items()} == {"held.kernel": 2}


class Own(nn.Module):
    """A convolution as people write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing."""


class Padded(nn.Conv2d):
    """A subclass that pads in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 0, 1, 0)))


@pytest.mark.parametrize("part", [Own(), Renamed(3, 4, 3, padding=1)], ids=lambda part: type(part).__name__)
def test_a_forward_that_is_nothing_but_the_call_becomes_the_convolution(part: nn.Module) -> None:
    model = within(part)
    lifted = lift(model, (X,))
    assert type(lifted.model[1]) is nn.Conv2d
    assert list(lifted.model.state_dict()) == list(model.state_dict())
    assert lifted.notes == ("functional convolutions became modules: 1",)
    assert sites_of(model)["1"].refusal is None


def test_a_subclass_with_a_forward_of_its_own_is_followed() -> None:
    sites = sites_of(within(Padded(3, 4, 3)))
    assert {name: site.refusal for name, site in sites.items()} == {"0": None, "1.weight": None}


def test_a_graph_module_of_aten_calls_stays_a_graph_module() -> None:
    whole = trace(within(Mixed())).whole
    assert whole is not None
    lifted = lift(whole, (X,)).model
    assert isinstance(lifted, fx.GraphModule)
    assert {name for name, module in lifted.named_modules() if isinstance(module, nn.Conv2d)} == {
        "0", "1.kernel", "1.blur", "1.conv", "1.many.0",
    }  # fmt: skip


def test_a_model_without_functional_convolutions_is_given_back() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    lifted = lift(model, (X,))
    assert lifted.model is model
    assert (lifted.lifts, lifted.notes) == ((), ())


def test_copies_of_a_lifted_model_have_the_same_state() -> None:
    class Constant(Own):
        """A tensor made on the way, and a buffer that is not saved."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.rand(1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.shift) * torch.full((1,), 2.0)

    lifted = lift(within(Constant()), (X,))
    copied = copy.deepcopy(lifted.model)
    assert list(copied.state_dict()) == list(lifted.model.state_dict())
    assert "1.shift is new" in lifted.notes[1]
    assert torch.equal(copied(X), lifted.model(X))


def test_random_numbers_do_not_hide_that_a_graph_computes_the_same() -> None:
    model = Calls(lambda m, x: F.conv2d(x + torch.randn_like(x), m.held.kernel), held=kernel(3, 3, 3, 3))
    assert list(lift(model, (X,)).model.state_dict()) == ["held.kernel.weight"]


# --- what stays once sites are rewritten


@torch.no_grad()
def test_only_what_was_rewritten_stays_lifted() -> None:
    model = settled(nn.Sequential(Mixed(), Padded(2, 4, 3)))
    lifted = lift(model, (X,))
    copied = copy.deepcopy(lifted.model)
    found = find_sites(copied, (X,), trace(copied), lifted.reasons)
    site = next(site for site in found if site.name == "0.conv")
    replace_site(copied, site, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)))
    left = settle(model, lifted, copied, [site])
    assert [(one.module, [conv.name for conv in one.convs]) for one in left.lifts] == [("0", ["conv"])]
    assert left.notes == ("functional convolutions became modules: 0.conv",)
    assert type(left.model[1]) is Padded
    assert torch.equal(left.model(X), copied(X))
    state = left.model.state_dict()
    assert {"0.kernel", "0.blur", "0.up", "0.conv.0.weight", "0.conv.1.weight"} <= set(state)
    untouched = settle(model, lifted, lifted.model, [])
    assert type(untouched.model[0]) is Mixed
    assert (untouched.lifts, untouched.notes) == ((), ())
    everything = [replace(site, batch_norm=None) for site in found if site.refusal is None]
    assert torch.equal(settle(model, lifted, copied, everything).model(X), copied(X))


# --- what is not, and why


def test_a_kernel_that_is_needed_elsewhere_too() -> None:
    assert (
        reason_of(lambda m, x: F.conv2d(x, m.held.kernel) * m.held.kernel.mean(), held=kernel(3, 3, 3, 3))
        == "the model uses held.kernel for something else too"
    )


def test_a_kernel_that_another_module_uses() -> None:
    weights = kernel(3, 3, 3, 3)
    block = Calls(lambda m, x: x + m.held.kernel.mean(), held=weights)
    model = Calls(lambda m, x: m.block(F.conv2d(x, m.block.held.kernel)), block=block).eval()
    assert "block uses block.held.kernel for something else too" in str(sites_of(model)["#0"].refusal)


def test_a_kernel_under_two_names() -> None:
    first, second = kernel(3, 3, 3, 3), nn.Module()
    second.other = first.kernel
    reason = reason_of(lambda m, x: F.conv2d(x, m.first.kernel), first=first, second=second)
    assert reason == "first.kernel is shared under the names first.kernel, second.other"


def test_a_weight_that_a_called_module_holds() -> None:
    model = Calls(lambda m, x: F.conv2d(m.conv(x), m.conv.weight), conv=nn.Conv2d(3, 3, 3))
    sites = sites_of(model)
    assert "conv uses conv.weight for something else too" in str(sites["#0"].refusal)
    assert "functional call" in str(sites["conv"].refusal)


def test_padding_computed_from_the_input() -> None:
    forward = lambda m, x: F.conv2d(x, m.held.kernel, padding=x.shape[-1] % 5)  # noqa: E731
    assert reason_of(forward, held=kernel(3, 3, 3, 3)) == "the padding is computed at every call"


def test_a_bias_computed_at_every_call() -> None:
    held = kernel(3, 3, 3, 3)
    held.offset = nn.Parameter(torch.randn(3))
    reason = reason_of(lambda m, x: F.conv2d(x, m.held.kernel, m.held.offset.exp()), held=held)
    assert reason == "the bias is computed at every call"
    constant = reason_of(lambda m, x: F.conv2d(x, m.held.kernel, torch.ones(3)), held=kernel(3, 3, 3, 3))
    assert constant == "the bias is computed at every call"


def test_one_kernel_with_different_geometries() -> None:
    forward = lambda m, x: F.conv2d(F.conv2d(x, m.held.kernel), m.held.kernel, dilation=2)  # noqa: E731
    assert reason_of(forward, held=kernel(3, 3, 3, 3)) == "it is called with different geometries"


def data_dependent(model: Calls, x: Tensor) -> Tensor:
    if float(x.mean()) > -1e9:
        x = F.conv2d(x, model.held.kernel)
    return x


def test_a_forward_that_cannot_be_followed() -> None:
    reason = reason_of(data_dependent, held=kernel(3, 3, 3, 3))
    assert reason == "the forward of the model cannot be followed as a graph"


def test_a_part_that_cannot_be_followed_does_not_keep_others_from_being_lifted() -> None:
    block = Calls(data_dependent, held=kernel(3, 3, 3, 3))
    sites = sites_of(nn.Sequential(block, Own()).eval())
    assert {name: site.refusal is None for name, site in sites.items()} == {"0#0": False, "1": True}


def test_a_module_with_hooks() -> None:
    part = Own()
    part.register_forward_hook(lambda *args: None)
    site = sites_of(within(part))["1#0"]
    assert str(site.refusal).endswith("1 has forward hooks, which a graph would lose")


def test_a_module_called_with_different_arguments() -> None:
    class Scaled(Own):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    model = Calls(lambda m, x: m.own(x) + m.own(x, scale=2.0), own=Scaled()).eval()
    assert "own is called with different arguments" in str(sites_of(model)["own#0"].refusal)


def test_a_forward_that_is_another_one_every_time() -> None:
    class Alternating(Own):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * (-1) ** self.calls

    model = Calls(lambda m, x: m.own(x) * 2 + m.own(x), own=Alternating()).eval()
    assert "own does not compute the same as a graph" in str(lift(model, (X,)).reasons["own.weight"])


def test_a_module_whose_attributes_others_read() -> None:
    part = Own()
    part.scale = 2.0
    model = Calls(lambda m, x: m.own(x) * m.own.scale, own=part).eval()
    lifted = lift(model, (X,))
    assert lifted.model is model
    assert lifted.reasons == {"own.weight": "own does not compute the same as a graph"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wrong_branch_is_seen_in_half_precision(dtype: torch.dtype) -> None:
    class Branching(Own):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return 1 - y if type(y) is Tensor else y

    model = within(Branching()).to(dtype)
    lifted = lift(model, (X.to(dtype),))
    assert lifted.model is model
    assert lifted.reasons == {"1.weight": "1 does not compute the same as a graph"}


def test_a_kernel_from_the_input_stays_dynamic() -> None:
    model = Calls(lambda m, x: F.conv2d(x, m.make(x.mean((0, 2, 3))).reshape(4, 3, 1, 1)), make=nn.Linear(3, 12))
    site = sites_of(model.eval())["#0"]
    assert (site.kind, site.refusal) == (Kind.DYNAMIC, "the kernel is computed from the input")
