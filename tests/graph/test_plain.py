"""Convolutions and BatchNorms that compute something else than their attributes say."""

from collections.abc import Callable
from types import MethodType

import pytest
import torch
from networks import settled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from convrewrite.graph.plain import odd_modules
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import trace
from convrewrite.rewriting.surgery import folded_kernel

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def network(**options: str) -> nn.Sequential:
    return settled(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, **options), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))  # type: ignore[arg-type]
    )


def sites_of(model: nn.Module) -> dict[str, Site]:
    return {site.name: site for site in find_sites(model, (X,), trace(model))}


def tiled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As for textures that repeat to the sides alone."""
    x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return F.conv2d(x, weight, bias)


def with_own_part(model: nn.Sequential) -> None:
    model[0]._conv_forward = MethodType(tiled, model[0])


def padded_later(model: nn.Sequential) -> None:
    model[0].padding = (2, 2)  # type: ignore[assignment]  # a mirrored padding is counted out when the layer is made


def cut(model: nn.Sequential) -> None:
    model[3].weight = nn.Parameter(model[3].weight[:, :, :2, :2].detach())  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        (with_own_part, "0", "computes something else than its attributes say (3->4 3x3 p1 reflect)"),
        (padded_later, "0", "computes something else than its attributes say (3->4 3x3 p2 reflect)"),
        (cut, "3", "its attributes say 4->4 3x3, but its weight is 4 x 4 x 2 x 2"),
    ],
)
def test_a_convolution_that_is_not_what_it_says_stays(
    change: Callable[[nn.Sequential], None], name: str, reason: str
) -> None:
    model = network(padding_mode="reflect")
    change(model)
    sites = sites_of(model)
    assert reason in str(sites[name].refusal)
    assert [site.name for site in sites.values() if site.refusal is None] == [other for other in "03" if other != name]


def test_a_batch_norm_with_another_forward_is_not_folded() -> None:
    model = network()
    assert sites_of(model)["0"].batch_norm == "1"
    model[1].forward = lambda x: 2 * x
    found = sites_of(model)["0"]
    assert (found.batch_norm, found.refusal) == (None, None)


def double_output(module: nn.Module, _args: object, output: Tensor) -> Tensor | None:
    return 2 * output if isinstance(module, nn.Conv2d) else None


def double_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    return (2 * args[0],) if isinstance(module, nn.Conv2d) else None


def test_hooks_of_all_modules_are_seen_where_they_change_something() -> None:
    model = network()
    for register, hook in (
        (register_module_forward_hook, double_output),
        (register_module_forward_pre_hook, double_input),
    ):
        handle = register(hook)  # type: ignore[operator]
        try:
            assert odd_modules(model, (X,), ("0", "1", "3")).keys() == {"0", "3"}
        finally:
            handle.remove()
    assert not odd_modules(model, (X,), ("0", "1", "3"))


PLAIN = (
    nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2, padding_mode="circular"),
    nn.Conv1d(3, 4, 4, padding="same"),
    nn.ConvTranspose1d(3, 6, 3, stride=2, output_padding=1, groups=3),
    nn.Conv2d(3, 6, (2, 3), padding="same", groups=3, padding_mode="replicate"),
    nn.ConvTranspose2d(3, 4, (3, 2), (2, 1), (1, 0), bias=False),
)


@pytest.mark.parametrize("layer", PLAIN, ids=str)
def test_plain_layers_are_what_they_say(layer: nn.Module) -> None:
    x = X if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else X[:, :, 0]
    assert not odd_modules(nn.Sequential(layer), (x,), ("0",))


@pytest.mark.parametrize("gone", ["weight", "bias"])
def test_a_batch_norm_whose_scale_or_offset_was_taken_off_is_folded_as_it_is(gone: str) -> None:
    model = network()
    setattr(model[1], gone, None)
    kernel, bias = folded_kernel(model, sites_of(model)["0"])
    folded = F.conv2d(X.double(), kernel, bias, padding=1)
    torch.testing.assert_close(folded.float(), model[1](model[0](X)))
