"""What is counted by running, and that a site which does not run is not reported as rewritten."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import Calls, Chain, NineKinds, Residual, settled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convrewrite.errors import TraceError
from convrewrite.graph.finding import find
from convrewrite.graph.lifting import Lifted
from convrewrite.modules.counting import calls_counted, tally
from convrewrite.rewriting.surgery import counted_as_replaced, settle

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Convolutions of every origin, in three dimensions and one, transposed, and products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.up, self.line = nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.Conv1d(4, 4, 3)
        self.volume, self.head = nn.Conv3d(1, 2, 2), nn.Linear(12, 5)
        self.hidden = [nn.Conv2d(8, 8, 1)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.hidden[0](F.conv2d(x, self.kernel, padding=1)))
        rows = self.line(x.mean(2))
        deep = self.volume(x[:, :1, None].expand(-1, -1, 3, -1, -1)).mean()
        return self.head(rows @ rows.transpose(1, 2) @ rows[..., :12]) + deep


@pytest.mark.parametrize("make", [Mixed, Chain, Residual, NineKinds])
def test_macs_are_those_that_torch_counts(make: type[nn.Module]) -> None:
    model = settled(make())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(X)
    assert tally(model, X if isinstance(X, tuple) else (X,)).macs == counter.get_total_flops() // 2 // len(X)
    with torch.inference_mode():
        assert tally(model, (X,)).macs == counter.get_total_flops() // 2 // len(X)


def test_a_single_convolution_is_counted_by_hand() -> None:
    assert tally(nn.Conv2d(3, 8, 3, padding=1, groups=1), (X,)).macs == 3 * 8 * 9 * 144
    assert tally(nn.Conv2d(3, 6, 3, stride=2, groups=3), (X,)).macs == 6 * 9 * 25
    assert tally(nn.ConvTranspose2d(3, 4, 2, stride=2), (X,)).macs == 3 * 4 * 4 * 144
    assert tally(nn.Linear(12, 5), (X,)).macs == 3 * 12 * 12 * 5


def test_products_with_vectors_count_like_those_with_matrices() -> None:
    x, bilinear = torch.randn(4, 6), nn.Bilinear(6, 6, 5)
    matrix, vector, wide = torch.randn(6, 7), torch.randn(6), torch.randn(4, 6, 7)
    counts: list[tuple[Callable[[Tensor], Tensor], int]] = [
        (lambda x: x @ vector, 6),
        (lambda x: torch.addmv(x.new_zeros(4), x, vector), 6),
        (lambda x: torch.stack([torch.dot(row, vector) for row in x]), 6),
        (lambda x: torch.stack([torch.vdot(row, vector) for row in x]), 6),
        (lambda x: x @ matrix, 6 * 7),
        (lambda x: torch.addbmm(x.new_zeros(3, 7), x[:, None].expand(-1, 3, -1), wide), 3 * 6 * 7),
        (lambda x: bilinear(x, x), 5 * 6 * 6),
        (lambda x: torch.conv_tbc(x.repeat(8, 1, 1), torch.ones(3, 6, 5), torch.zeros(5)), 6 * 3 * 6 * 5),
    ]
    for product, macs in counts:
        assert tally(Calls(lambda _model, x, product=product: product(x)), (x,)).macs == macs


def test_memory_that_is_read_and_calls_are_seen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    used = Calls(lambda m, x: m.parts[0](m.parts[0](x)), parts=model)
    with calls_counted({"first": model[0], "last": model[2]}) as calls:
        seen = tally(used, (X,))
    assert dict(calls) == {"first": 2}
    assert seen.read(model[0].weight)
    assert not seen.read(model[2].weight)
    assert not model[0]._forward_pre_hooks


def rewritten(model: nn.Module) -> tuple[nn.Module, Lifted, list]:  # type: ignore[type-arg]
    lifted, _, sites = find(model, (X,))
    chosen = [replace(site, batch_norm=None) for site in sites if site.name == "last"]
    made = copy.deepcopy(lifted.model)
    made.last = nn.Sequential(nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, (1, 3)))
    return lifted.model, settle(model, lifted, made, chosen), chosen


def test_a_rewritten_site_that_does_not_run_or_whose_kernel_does_is_an_error() -> None:
    model = settled(Calls(lambda m, x: m.last(m.first(x)), first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 8, 3)))
    original, made, sites = rewritten(model)
    after = counted_as_replaced(original, made, sites, (X,))
    assert after == tally(made.model, (X,)).macs < tally(model, (X,)).macs
    (weight,) = made.gone
    made.model.forward = lambda x: F.conv2d(made.model.last(made.model.first(x)), weight)
    with pytest.raises(TraceError, match="last: expected what was put in its place to run as often as it did"):
        counted_as_replaced(original, made, sites, (X,))
    made.model.forward = lambda x: made.model.last(made.model.last(made.model.first(x)))
    with pytest.raises(TraceError, match="last: expected"):
        counted_as_replaced(original, made, sites, (X,))


class Attention(nn.Module):
    """Attention over a sequence, in whichever way torch has it."""

    def __init__(self, attend: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.attend = attend
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self, x)


LENGTH, WIDTH, HEADS = 20, 32, 4
CORE = 2 * LENGTH * LENGTH * WIDTH
PROJECTED = CORE + 4 * LENGTH * WIDTH * WIDTH
LAYER = PROJECTED + 2 * LENGTH * WIDTH * 48


@pytest.mark.parametrize(
    ("model", "macs"),
    [
        (Attention(lambda m, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])), CORE),
        (
            Attention(
                lambda m, x: m.a(x, x, x, need_weights=False)[0],
                a=nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
            ),
            PROJECTED,
        ),
        (
            Attention(lambda m, x: m.a(x), a=nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)),
            LAYER,
        ),
        (
            Attention(
                lambda m, x: m.a(x),
                a=nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, norm_first=True, activation="gelu"),
            ),
            LAYER,
        ),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_attention_counts_its_products_in_whichever_operator(model: nn.Module, macs: int, fast: bool) -> None:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            assert tally(model.eval(), (torch.randn(3, LENGTH, WIDTH),)).macs == macs
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_sequences_of_their_own_lengths_count_as_long_as_they_are() -> None:
    def masked(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        left_out = torch.arange(LENGTH).expand(len(x), LENGTH) >= LENGTH // 2
        found: torch.Tensor = module.a(x, src_key_padding_mask=left_out)  # type: ignore[operator]
        return found

    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True), 1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's nested tensors are a prototype
        found = tally(Attention(masked, a=layers).eval(), (torch.randn(3, LENGTH, WIDTH),)).macs
    half = LENGTH // 2
    assert found == 2 * half * half * WIDTH + 4 * half * WIDTH * WIDTH + 2 * half * WIDTH * 48


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("projected", [0, 4])  # another operator for each
def test_recurrent_layers_count_alike_in_whichever_operator(projected: int) -> None:
    lstm = nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True, proj_size=projected)
    model = Attention(lambda m, x: m.a(x)[0], a=lstm).eval()
    with torch.no_grad():
        found = tally(model, (torch.randn(3, 10, 8),)).macs
    assert found == 10 * sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
