"""What is counted by running, and that a site which does not run is not reported as rewritten."""

import copy
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
