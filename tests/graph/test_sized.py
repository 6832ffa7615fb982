"""Graphs of forwards that ask for the size of their input."""

import logging.handlers
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import Calls, settled
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite import optimize
from convrewrite.graph.checked import _computing_the_same, follow
from convrewrite.graph.sites import find_sites
from convrewrite.graph.sized import trace_sized
from convrewrite.graph.tracing import trace
from convrewrite.rules.schema import Protect, Rule

X = torch.randn(2, 3, 13, 12, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 8, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def cut_to_the_smaller(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    y = model.valid(x)
    if x.size(-1) != y.shape[-1]:
        x = x[..., : y.size(-2), : y.size(-1)]
    return model.last(x + y)


def padded_as_tensorflow_does(model: Calls, x: Tensor) -> Tensor:
    height, width = x.size()[-2:]
    rows, columns = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in (height, width))
    if rows > 0 or columns > 0:
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
    return model.last(model.strided(x))


def every_part(model: Calls, x: Tensor) -> Tensor:
    parts = [part * (index + 1) for index, part in enumerate(model.stem(x).split(3, dim=1))]
    return model.last(torch.cat(parts, 1))


def by_the_number_of_axes(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    return model.last(x) if x.dim() == 4 and len(x.shape) == 4 else x


def by_the_type_of_numbers(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    x = x.masked_fill(x > 1, torch.finfo(x.dtype).min / 1e38)
    return model.last(x[:, :, : round(x.shape[2] * 0.7)])


def row_by_row(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    return model.last(torch.stack([x[:, :, row] * row for row in range(x.shape[2])], 2))


def keeps_what_it_saw(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    if len(x[0]) == 8:
        model.seen = x
    return model.last(x)


def takes_a_number_or_a_tensor(model: Calls, x: Tensor) -> Tensor:
    scale = x.mean((1, 2, 3))
    if not torch.is_tensor(scale) or torch.is_tensor(x.shape):
        scale = torch.tensor([scale])
    return model.last(model.stem(x) * scale[:, None, None, None])


def by_the_class(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    parts = x.split(4, 1)
    if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and isinstance(parts, tuple | list):
        x = torch.cat(list(parts), 1) * 2
    return model.last(x / (3 if isinstance(x.shape[1], int) else 5))


def by_its_attributes(model: Calls, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x = model.stem(x)
    return model.last(x.tensors if hasattr(x, "tensors") else x * x.size(1))


def scaled_by_numpy(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x) / np.sqrt(x.shape[1]) + np.log10(np.maximum(1e-3, 2.0))
    size = np.array(x.shape[2:]) * 2
    return model.last(F.interpolate(x, size=tuple(size.tolist())) * int(np.prod(x.shape[2:])))


def by_the_size_as_text(model: Calls, x: Tensor) -> Tensor:
    scale = {"13x12": 2.0}[f"{x.shape[2]}x{x.shape[3]}"]
    rows, columns = divmod(x.shape[2], 5)
    return model.last(F.pad(model.stem(x) * scale, (0, int(str(columns)), 0, rows)))


def on_its_own_mean(model: Calls, x: Tensor) -> Tensor:
    model.mean = model.mean.type_as(x)
    x = model.last(model.stem(x - model.mean))
    return x + model.mean.sum() if len(x.shape) == 4 else x


FORWARDS: list[Callable[[Calls, Tensor], Tensor]] = [
    cut_to_the_smaller,
    padded_as_tensorflow_does,
    every_part,
    by_the_number_of_axes,
    by_the_type_of_numbers,
    row_by_row,
    keeps_what_it_saw,
    takes_a_number_or_a_tensor,
    by_the_class,
    by_its_attributes,
    scaled_by_numpy,
    by_the_size_as_text,
    on_its_own_mean,
]
every_forward = pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)


def network(forward: Callable[[Calls, Tensor], Tensor]) -> nn.Module:
    if forward is padded_as_tensorflow_does:
        return settled(Calls(forward, strided=nn.Conv2d(3, 8, 3, stride=2), last=conv()))
    layers = {"stem": conv(3), "valid": nn.Conv2d(8, 8, 3), "last": conv()}
    used = ("stem", "valid", "last") if forward is cut_to_the_smaller else ("stem", "last")
    model = settled(Calls(forward, **{name: layers[name] for name in used}))
    if forward is on_its_own_mean:
        model.mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    return model


@every_forward
@torch.no_grad()
def test_the_graph_is_whole_and_takes_any_batch(forward: Callable[[Calls, Tensor], Tensor]) -> None:
    model = network(forward)
    without = trace(model)
    assert without.whole is None or not _computing_the_same(model, {"": without.whole}, (X,)), (
        "otherwise this shows nothing"
    )
    traced = follow(model, (X,))
    assert traced.whole is not None
    more = torch.randn(5, *X.shape[1:])
    assert torch.equal(traced.whole(X), model(X))
    assert torch.equal(traced.whole(more), model(more))


class _PassesAllOn(Calls):
    """Passes what it is called with on, as the networks of ultralytics do."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return self._predict(x, *args, **kwargs)

    def _predict(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale


@torch.no_grad()
def test_arguments_that_are_passed_on_and_not_given_are_none() -> None:
    model = settled(_PassesAllOn(every_part, stem=conv(3), last=conv()))
    assert trace(model).whole is None, "otherwise this shows nothing"
    whole = follow(model, (X,)).whole
    assert whole is not None and torch.equal(whole(X), model(X))
    result = optimize(model, X, calibration=torch.randn(40, *X.shape[1:]), measure=False, rules=["separable"])
    assert result.model(X).shape == model(X).shape


class _OptionalInput(Calls):
    """Every argument has a default, as in networks of transformers; the forward asks for the size of what is given."""

    def forward(self, x: Tensor | None = None, mask: Tensor | None = None, scale: float = 2.0, **_: object) -> Tensor:
        assert x is not None
        if x.shape[1] != 3:
            raise ValueError(f"3 channels, not {x.shape[1]}")
        return super().forward(x) * (scale if mask is None else mask)


@torch.no_grad()
def test_an_input_that_has_a_default_is_what_is_given() -> None:
    model = settled(_OptionalInput(row_by_row, stem=conv(3), last=conv()))
    whole = follow(model, (X,)).whole
    assert whole is not None and torch.equal(whole(X), model(X))


@every_forward
def test_following_leaves_the_model_as_it_was(forward: Callable[[Calls, Tensor], Tensor]) -> None:
    model = network(forward)
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    trace_sized(model, (X,))
    assert all(vars(part) == before[name] for name, part in model.named_modules())


def test_an_error_that_a_forward_catches_is_not_printed() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        try:
            x = model.conv(x) + x[:, :, 1:]
            return x if x.shape[1] > 2 else -x
        except RuntimeError:
            return model.conv(x)

    logger, records = logging.getLogger("torch._subclasses.fake_tensor"), logging.handlers.BufferingHandler(100)
    logger.addHandler(records)
    try:
        follow(Calls(forward, conv=conv(3, 3)).eval(), (X,))
    finally:
        logger.removeHandler(records)
    assert records.buffer == []


class Longer(nn.Conv2d):
    """Passes on an argument that its layer may not take."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@torch.no_grad()
@pytest.mark.parametrize("layer", [nn.Conv2d, Longer])
def test_an_argument_that_a_layer_does_not_take_is_an_error_that_a_forward_may_catch(layer: type[nn.Conv2d]) -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        try:
            return model.conv(x, lengths=None)
        except TypeError:
            return model.conv(x)

    model = settled(Calls(forward, conv=layer(3, 8, 3)))
    whole = follow(model, (X,)).whole
    assert whole is not None and torch.equal(whole(X), model(X))


def test_a_way_that_hangs_on_numbers_is_not_taken() -> None:
    model = settled(Calls(lambda m, x: m.conv(x) if x.mean() > 0 else x, conv=conv(3)))
    traced = trace_sized(model, (X,))
    assert (traced.whole, traced.lost) == (None, ("",))


def test_a_length_that_hangs_on_numbers_is_not_counted() -> None:
    model = settled(
        Calls(lambda m, x: sum(m.conv(x)[0, :, i, j].sum() for i, j in (x > 0)[0, 0].nonzero()), conv=conv(3))
    )
    assert trace_sized(model, (X,)).whole is None


def test_a_graph_for_one_batch_size_is_not_used() -> None:
    model = settled(Calls(lambda m, x: m.conv(torch.stack([x[i] * 2 for i in range(len(x))])), conv=conv(3)))
    sized = trace_sized(model, (X,)).whole
    assert sized is not None and torch.equal(sized(X), model(X))
    assert follow(model, (X,)).whole is None


def test_the_length_of_a_tensor_that_is_computed_is_that_of_any_batch() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        x = model.conv(x)
        return x.view(len(x), 2, 4, -1).permute(0, 3, 1, 2).reshape(len(x), -1, 4)

    model = settled(Calls(forward, conv=conv(3)))
    whole = follow(model, (X,)).whole
    assert whole is not None and torch.equal(whole(X[:1]), model(X[:1]))


@torch.no_grad()
def test_a_graph_for_the_only_batch_size_there_is_is_used() -> None:
    def forward(model: Calls, x: Tensor) -> Tensor:
        first, second = x.unbind(0)
        parts = [model.conv((first * second)[None])[:, part : part + 4] for part in range(0, len(first) + 5, 4)]
        return torch.cat(parts)

    model = settled(Calls(forward, conv=conv(3)))
    assert trace(model).whole is None
    whole = follow(model, (X,)).whole
    assert whole is not None and torch.equal(whole(X), model(X))


def padded_at_even_sizes(model: Calls, x: Tensor) -> Tensor:
    x = model.bn(model.conv(x))
    return x if x.shape[-1] % 2 else F.pad(x, (0, 1))


def with_the_sum_of_large_ones(model: Calls, x: Tensor) -> Tensor:
    x = model.conv(x)
    return model.bn(x) + x if x.shape[-1] > 16 else model.bn(x)


def without_norm_for_one_alone(model: Calls, x: Tensor) -> Tensor:
    x = model.conv(x)
    return model.bn(x) if len(x) > 1 else x


@pytest.mark.parametrize("forward", [padded_at_even_sizes, with_the_sum_of_large_ones, without_norm_for_one_alone])
def test_a_batch_norm_is_folded_only_where_it_follows_at_every_size(forward: Callable[[Calls, Tensor], Tensor]) -> None:
    """What a graph for inputs of one size shows may not hold for another; what a part's own graph shows does."""
    model = settled(Calls(forward, conv=conv(3), bn=nn.BatchNorm2d(8)))
    (site,) = find_sites(model, (X,), follow(model, (X,)))
    assert site.batch_norm is None
    inner = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    around = settled(Calls(forward, conv=nn.Sequential(conv(3), inner), bn=nn.BatchNorm2d(8)))
    sites = find_sites(around, (X,), follow(around, (X,)))
    assert [site.batch_norm for site in sites] == [None, "conv.1.1"]


def test_a_result_of_such_a_model_is_right_at_other_sizes() -> None:
    rule = Rule(
        name="r", structures=("channel",), ratio=0.99, protect=Protect(stem=False, min_channels=0, min_mac_share=0)
    )
    for forward in (with_the_sum_of_large_ones, without_norm_for_one_alone):
        model = settled(Calls(forward, conv=conv(3, 32), bn=nn.BatchNorm2d(32)))
        with torch.no_grad():  # of a rank that loses nothing
            model.conv.weight.copy_((torch.randn(32, 4) @ torch.randn(4, 27)).reshape(32, 3, 3, 3))
        result = optimize(model, X, [rule], torch.randn(40, 3, 13, 12), measure=False)
        assert any(row.action == "rewritten" for row in result.report.sites)
        for shape in ((2, 3, 24, 24), (1, 3, 13, 12)):
            x = torch.randn(shape)
            assert torch.allclose(result.model(x), model(x), atol=1e-3)


def test_such_a_model_is_rewritten_for_its_true_inputs_and_keeps_its_choices() -> None:
    model = network(cut_to_the_smaller)
    images = torch.randn(40, 3, 13, 12, generator=torch.Generator().manual_seed(1))
    result = optimize(model, X, calibration=images, measure=False)
    assert not any("could not be followed" in note for note in result.report.notes)
    assert any(row.action == "rewritten" for row in result.report.sites)
    other = torch.randn(1, 3, 20, 17)
    assert result.model(other).shape == model(other).shape, "the graph is for these sizes; the model is not"


class Rest(nn.Module):
    """Inputs as ``*rest``, and behind them what is given by keyword only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)

    def forward(self, image: Tensor, *rest: Tensor, scale: float = 2.0, **_ignored: object) -> Tensor:
        return torch.cat([self.first(image), *(self.others(tensor) for tensor in rest)], 1) * scale


def test_what_is_given_by_keyword_only_takes_its_default() -> None:
    model = Rest().eval()
    inputs = (torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6), torch.randn(2, 1, 6, 6))
    traced = follow(model, inputs)
    assert traced.whole is not None
    with torch.no_grad():
        assert torch.equal(traced.whole(*inputs), model(*inputs))
