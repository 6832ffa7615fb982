"""The inputs of every site in both networks, against plain reruns."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from goals import goals_of
from networks import (
    Block,
    Branching,
    CalledTwice,
    Calls,
    Chain,
    NineKinds,
    Residual,
    TwoNames,
    natural,
    relative,
    settled,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F

from convrewrite.conv import Kind
from convrewrite.errors import FitError
from convrewrite.fitting.moments import Accumulator
from convrewrite.fitting.stages import fit
from convrewrite.graph.checked import follow
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import Traced, trace
from convrewrite.inputs import Inputs
from convrewrite.rewriting.propagation import Propagation
from convrewrite.rewriting.samples import Sample
from convrewrite.rewriting.surgery import build_conv, build_option, folded_kernel, replace_site
from convrewrite.structures.discovery import discover
from convrewrite.structures.lowering import make_option

PLENTY = 1 << 30


def conv(inputs: int = 3, outputs: int = 3, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def batches(count: int = 3, size: int = 12) -> list[Inputs]:
    return [(torch.randn(2, 3, size, size, dtype=torch.float64),) for _ in range(count)]


def active_sites(model: nn.Module, inputs: Inputs) -> list[Site]:
    return [site for site in find_sites(model, inputs, trace(model)) if site.refusal is None]


def disturbed(model: nn.Module, site: Site) -> nn.Module:
    """Another convolution of the same shape."""
    kernel, bias = folded_kernel(model, site)
    like = model.get_submodule(site.name).weight
    assert isinstance(like, Tensor)
    return build_conv(site.folded_spec, kernel + 0.3 * kernel.std() * torch.randn_like(kernel), bias + 0.1, like)


def test_a_start_is_gone_through_once_more_whatever_its_length() -> None:
    class Empty(Residual):
        def __len__(self) -> int:
            return 0

    model, start, inputs = settled(Empty().double()), settled(Empty().double()), batches()
    start.stem.weight.data *= 2
    walk = Propagation(model, trace(model), active_sites(model, inputs[0]), inputs, PLENTY, start)
    assert torch.equal(walk.rewritten.get_parameter("stem.weight"), start.stem.weight)


class Normed(nn.Module):
    """A convolution with its BatchNorm, which the caller may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        return self.conv(x) if raw else self.norm(self.conv(x))


def test_a_site_whose_batch_norm_other_inputs_go_around_is_kept() -> None:
    model = settled(Calls(lambda m, x: m.block(x) if x.mean() > 0 else m.block(x, raw=True), block=Normed())).double()
    x = batches(1)[0][0].abs()
    (site,) = active_sites(model, (x,))
    assert site.batch_norm == "block.norm"
    walk = Propagation(model, trace(model), [site], [(x,), (-x,)], PLENTY)
    with pytest.raises(FitError, match="its BatchNorm does not follow it"):
        list(walk.samples(site))


def test_the_two_networks_have_linear_layers_in_common_and_nothing_else() -> None:
    linear = nn.Linear(48, 2)
    layers = (conv(), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear)
    model = settled(nn.Sequential(*layers).double())
    inputs = batches()
    walk = Propagation(model, trace(model), active_sites(model, inputs[0]), inputs, PLENTY)
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = [tensor for tensor in (*walk.rewritten.parameters(), *walk.rewritten.buffers()) if id(tensor) in shared]
    assert [id(tensor) for tensor in found] == [id(linear.weight), id(linear.bias)]
    addresses = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert sum(t.data_ptr() in addresses for t in (*walk.rewritten.parameters(), *walk.rewritten.buffers())) == 2


@torch.no_grad()
def inputs_by_hooks(model: nn.Module, name: str, inputs: Inputs) -> list[Tensor]:
    """What a plain run gives a module, at each of its calls; the model and the inputs are copies."""
    seen: list[Tensor] = []
    model = copy.deepcopy(model)
    model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    model(*copy.deepcopy(inputs))
    return seen


@torch.no_grad()
def outputs_by_hooks(model: nn.Module, site: Site, inputs: Inputs) -> list[Tensor]:
    """What a site gives at each of its calls, its BatchNorm included; of a dynamic one, every kernel's output."""
    if site.spec.kernels > 1:
        kernel, bias = folded_kernel(model, site)
        every = build_conv(site.folded_spec, kernel, bias, kernel)
        return [every(x) for x in inputs_by_hooks(model, site.name, inputs)]
    seen: list[Tensor] = []
    model = copy.deepcopy(model)
    end = model.get_submodule(site.batch_norm or site.name)
    end.register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    model(*copy.deepcopy(inputs))
    return seen


def assert_samples_are_right(found: Sequence[Sample], walk: Propagation, site: Site, data: Sequence[Inputs]) -> None:
    """They are what hooks on the two whole networks see."""
    expected = [
        (index, output, rewritten)
        for index, inputs in enumerate(data)
        for output, rewritten in zip(
            outputs_by_hooks(walk.model, site, inputs), inputs_by_hooks(walk.rewritten, site.name, inputs), strict=True
        )
    ]
    assert len(found) == len(expected)
    for sample, (index, output, rewritten) in zip(found, expected, strict=True):
        assert sample.batch == index
        torch.testing.assert_close(sample.output, output)
        torch.testing.assert_close(sample.rewritten, rewritten)


def pre_activation(model: Calls, x: Tensor) -> Tensor:
    """A ReLU in place before the branch changes what the skip connection carries."""
    x = model.stem(x)
    out = model.second(F.relu(model.first(F.relu(x, inplace=True))))
    return model.last(out + model.pool(x))


def parts_in_place(model: Calls, x: Tensor) -> Tensor:
    """Two names for one piece of memory, changed through one and read through the other, convolutions between."""
    x = model.stem(x)
    left = x[:, :4]
    other = model.side(x)
    left.mul_(0.5)
    return model.last(x + other)


def parts_in_place_behind_another(model: Calls, x: Tensor) -> Tensor:
    """The same, where one of the names is used alone before the change."""
    x = model.stem(x)
    left = x[:, :4]
    other = model.side(x)
    more = model.wide(x) + other
    left.mul_(0.5)
    return model.last(x + more)


def skip_added_to_a_part(model: Calls, x: Tensor) -> Tensor:
    """What follows from a convolution alone is changed by what does not, and read then."""
    skip = model.pool(x)
    y = model.stem(x)
    half = y[:, :3]
    half.add_(skip)
    return model.last(F.relu(y)) + model.side(y)


def changed_and_read(model: Calls, x: Tensor) -> Tensor:
    """What a convolution gives is read, changed in place, and used behind the next one."""
    y = model.stem(x)
    pooled = model.pool(y)
    y.mul_(0.5)
    return model.last(pooled) + y


def pre_activation_by_operators(model: Calls, x: Tensor) -> Tensor:
    relu = torch.ops.aten.relu_.default
    x = model.stem(x)
    out = model.second(relu(model.first(relu(x))))
    return model.last(out + model.pool(x))


def changes_its_input(model: Calls, x: Tensor) -> Tensor:
    return model.last(model.stem(x.sub_(0.5)))


def dense(model: Calls, x: Tensor) -> Tensor:
    first = F.relu(model.stem(x))
    second = F.relu(model.side(first))
    third = torch.cat([first, second], 1)
    return model.last(third) + model.wide(third)


class Cooled(nn.Module):
    """Changes what it is given by its numbers: no convolution in it, and no graph of it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if float(x.detach().mean()) > -1e9:
            x.mul_(0.5)
        y.add_(x)
        return y, x[:, :2]


def opaque_in_place(model: Calls, x: Tensor) -> Tensor:
    """Two tensors are changed by a part that no graph shows, one more time behind a convolution; both are used again."""
    x = model.stem(x)
    y = model.side(x)
    z, view = model.cooled(x, y)
    w = model.last(x + z)
    again, _ = model.cooled(y, w)
    return torch.cat([again + x, view], 1)


def halves_in_place(model: Calls, x: Tensor) -> Tensor:
    """A tuple of views is kept while a convolution runs, and changed then."""
    x = model.stem(x)
    halves = x.chunk(2, 1)
    y = model.side(halves[0])
    y = y + halves[1].mul_(2)
    return model.last(y) + x


def parts_written(model: Calls, x: Tensor) -> Tensor:
    """Entries of what a convolution gives are overwritten behind the next one, and those of a tensor made for that."""
    x = model.stem(x)
    y = torch.zeros(x.shape[0], 8, 12, 12).to(x.dtype)
    y[:, 2:6] = model.side(x)[:, :4]
    x[:, :4] = F.relu(x[:, 4:])
    return model.last(x + y)


def coupled_in_place(model: Calls, x: Tensor) -> Tensor:
    """A half is changed by what the other half gives, and the whole is used again, behind one more convolution."""
    x = model.stem(x)
    first, second = x.chunk(2, 1)
    y = model.side(second)
    first.add_(y)
    y = model.wide(y)
    return model.last(x) + y


def given_room(model: Calls, x: Tensor) -> Tensor:
    """A function is told where to put what it gives."""
    x = model.stem(x)
    room = torch.zeros_like(x)
    y = model.side(x)
    torch.mul(y, 2.0, out=room)
    return model.last(room + x) + model.wide(y)


def sparse_meanwhile(model: Calls, x: Tensor) -> Tensor:
    """A value that has no memory of its own is kept while a convolution runs."""
    x = model.stem(x)
    mask = (x.mean((2, 3)) > 0).to(x.dtype).to_sparse()
    y = model.side(x) * mask.to_dense()[:, :, None, None]
    return model.last(y) + x


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "called twice": CalledTwice,
    "two names": TwoNames,
    "untraceable": Branching,
    "nine kinds": NineKinds,
    "block called twice": lambda: Calls(lambda m, x: m.block(m.block(m.stem(x))), stem=conv(3, 8), block=Block(8, 8)),
    "dense": lambda: Calls(dense, stem=conv(3, 4), side=conv(4, 4), last=conv(8, 4), wide=conv(8, 4, 1)),
    "pre-activation": lambda: Calls(
        pre_activation,
        stem=conv(3, 8),
        first=conv(8, 8),
        second=conv(8, 8),
        pool=nn.AvgPool2d(3, 1, 1),
        last=conv(8, 4),
    ),
    "parts in place": lambda: Calls(parts_in_place, stem=conv(3, 8), side=conv(8, 8), last=conv(8, 4)),
    "parts in place behind another": lambda: Calls(
        parts_in_place_behind_another, stem=conv(3, 8), side=conv(8, 8), wide=conv(8, 8), last=conv(8, 4)
    ),
    "skip added to a part": lambda: Calls(
        skip_added_to_a_part, stem=conv(3, 8), pool=nn.AvgPool2d(3, 1, 1), last=conv(8, 4), side=conv(8, 4)
    ),
    "changed and read": lambda: Calls(changed_and_read, stem=conv(3, 8), pool=nn.AvgPool2d(3, 1, 1), last=conv(8, 8)),
    "pre-activation by operators": lambda: Calls(
        pre_activation_by_operators,
        stem=conv(3, 8),
        first=conv(8, 8),
        second=conv(8, 8),
        pool=nn.AvgPool2d(3, 1, 1),
        last=conv(8, 4),
    ),
    "opaque part in place": lambda: Calls(
        opaque_in_place, stem=conv(3, 8), side=conv(8, 8), cooled=Cooled(), last=conv(8, 8)
    ),
    "parts written": lambda: Calls(parts_written, stem=conv(3, 8), side=conv(8, 8), last=conv(8, 4)),
    "halves in place": lambda: Calls(halves_in_place, stem=conv(3, 8), side=conv(4, 4), last=conv(4, 8)),
    "coupled in place": lambda: Calls(
        coupled_in_place, stem=conv(3, 8), side=conv(4, 4), wide=conv(4, 8), last=conv(8, 8)
    ),
    "given room": lambda: Calls(given_room, stem=conv(3, 8), side=conv(8, 8), wide=conv(8, 8), last=conv(8, 8)),
    "sparse meanwhile": lambda: Calls(sparse_meanwhile, stem=conv(3, 8), side=conv(8, 8), last=conv(8, 8)),
    "changes its input": lambda: Calls(changes_its_input, stem=conv(3, 8), last=conv(8, 4)),
}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


@every_network
@pytest.mark.parametrize("memory", [0, 20_000, PLENTY], ids=["on disk", "partly on disk", "in memory"])
def test_samples_are_what_plain_reruns_show(make: Callable[[], nn.Module], memory: int) -> None:
    model = settled(make().double())
    data = batches()
    before = copy.deepcopy(data)
    sites = active_sites(model, copy.deepcopy(data[0]))
    walk = Propagation(model, trace(model), sites, data, memory)
    try:
        for site in sites:
            assert_samples_are_right(list(walk.samples(site)), walk, site, before)
            walk.replace(site, disturbed(model, site))
    finally:
        walk.close()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, before, strict=True)), "the inputs stay as they were"


@every_network
def test_sites_that_are_left_alone_may_stand_anywhere(make: Callable[[], nn.Module]) -> None:
    model = settled(make().double())
    data = batches(2)
    every = active_sites(model, copy.deepcopy(data[0]))
    for offset in (0, 1):
        walk = Propagation(model, trace(model), every[offset::2], copy.deepcopy(data), PLENTY)
        for site in every[offset::2]:
            assert_samples_are_right(list(walk.samples(site)), walk, site, data)
            walk.replace(site, disturbed(model, site))
        walk.close()


@every_network
@pytest.mark.parametrize("memory", [0, PLENTY], ids=["on disk", "in memory"])
@torch.no_grad()
def test_outputs_are_those_of_the_network_with_the_module_in_it(make: Callable[[], nn.Module], memory: int) -> None:
    """And are so again: what is kept stays as it is."""
    model = settled(make().double())
    data = batches(2)
    sites = active_sites(model, copy.deepcopy(data[0]))
    walk = Propagation(model, trace(model), sites, copy.deepcopy(data), memory)
    try:
        for site in sites:
            trial = copy.deepcopy(walk.rewritten)
            module = disturbed(model, site)
            replace_site(trial, site, module)
            expected = [trial(*copy.deepcopy(inputs)) for inputs in data]
            for _ in range(2):
                torch.testing.assert_close(list(walk.outputs(site, module, range(2))), expected)
            walk.replace(site, module)
    finally:
        walk.close()


def test_a_convolution_in_a_skip_connection_under_two_names() -> None:
    """Its site bears the first name, the graph the other."""

    def forward(model: Calls, x: Tensor) -> Tensor:
        x = model.stem(x)
        out = model.second(F.relu(model.first(x)))
        return model.last(out + model.b_skip(x))

    skip = conv(8, 8, 1)
    layers = {
        "a_skip": skip,
        "stem": conv(3, 8),
        "first": conv(8, 8),
        "second": conv(8, 8),
        "b_skip": skip,
        "last": conv(8, 4),
    }
    model = settled(Calls(forward, **layers).double())
    data = batches()
    sites = active_sites(model, data[0])
    walk = Propagation(model, trace(model), sites, data, PLENTY)
    for site in sites:
        assert_samples_are_right(list(walk.samples(site)), walk, site, data)
        walk.replace(site, disturbed(model, site))
    walk.close()


def test_a_kept_site_may_stand_before_one_that_is_called_twice() -> None:
    model = settled(Calls(lambda m, x: m.c(m.b(torch.tanh(m.b(m.a(x))))), a=conv(), b=conv(), c=conv()).double())
    data = batches()
    sites = active_sites(model, data[0])
    walk = Propagation(model, trace(model), sites, data, PLENTY)
    for site in sites:
        assert_samples_are_right(list(walk.samples(site)), walk, site, data)
        if site.name != "a":
            walk.replace(site, disturbed(model, site))
    walk.close()


# --- what is handed on beside the graph


def with_a_hooked_skip() -> nn.Module:
    """Two hooks on layers of torch make a skip connection, through a dictionary."""
    layers = (nn.Identity(), conv(3, 4), nn.ReLU(), conv(4, 4), nn.Identity(), conv(4, 4))
    model, kept = nn.Sequential(*layers), dict[str, Tensor]()
    model[1].register_forward_hook(lambda _module, _args, output: kept.update(skip=output))
    model[4].register_forward_hook(lambda _module, _args, output: output + kept["skip"])
    return model


def with_a_workspace() -> nn.Module:
    def forward(model: Calls, x: Tensor) -> Tensor:
        model.space.copy_(x)
        return model.last(torch.cat([model.stem(x), model.space], 1))

    model = Calls(forward, stem=conv(3, 4), last=conv(7, 4))
    model.register_buffer("space", torch.zeros(2, 3, 12, 12))
    return model


def with_a_clamping_hook() -> nn.Module:
    model = Calls(lambda m, x: m.last(m.act(y := m.stem(x))) + y, stem=conv(3, 4), act=nn.Identity(), last=conv(4, 4))
    model.act.register_forward_pre_hook(lambda _module, args: (args[0].clamp_(0),))
    return model


@fx.wrap  # type: ignore[untyped-decorator]
def rectify(x: Tensor) -> Tensor:
    return x.clamp_(0)


def with_a_function_of_its_own() -> nn.Module:
    return Calls(lambda m, x: m.last(rectify(y := m.stem(x))) + y, stem=conv(3, 4), last=conv(4, 4))


STATEFUL = [with_a_hooked_skip, with_a_workspace, with_a_clamping_hook, with_a_function_of_its_own]


@pytest.mark.parametrize("make", STATEFUL)
def test_what_is_handed_on_beside_the_graph_is_of_the_same_batch_and_network(make: Callable[[], nn.Module]) -> None:
    model, data = settled(make().double()), batches()
    traced, sites = follow(model, data[0]), active_sites(model, data[0])
    assert traced.whole is not None
    walk = Propagation(model, traced, sites, data, PLENTY)
    for site in sites:
        assert_samples_are_right(list(walk.samples(site)), walk, site, data)
        walk.replace(site, disturbed(model, site))
    walk.close()


# --- the rewritten copy


def test_the_original_is_untouched_and_the_copy_is_rewritten() -> None:
    model = settled(Chain().double())
    data = batches(1)
    expected = model(*data[0])
    sites = active_sites(model, data[0])
    walk = Propagation(model, trace(model), sites, data, PLENTY)
    for site in sites:
        list(walk.samples(site))
        walk.replace(site, disturbed(model, site))
    walk.close()
    assert torch.equal(model(*data[0]), expected)
    assert relative(walk.rewritten(*data[0]), expected) > 1e-3


# --- disk


@pytest.mark.parametrize("memory", [0, 20_000])
def test_nothing_stays_on_disk(memory: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = settled(Residual().double())
    data = batches()
    sites = active_sites(model, data[0])
    walk = Propagation(model, trace(model), sites, data, memory)
    most = 0
    for site in sites:
        list(walk.samples(site))
        most = max(most, len(list(tmp_path.rglob("*.numbers"))))
        walk.replace(site, disturbed(model, site))
    assert most > 0, "so little memory must spill"
    assert most <= 4 * len(data), "what is not used any more is deleted on the way"
    walk.close()
    assert list(tmp_path.iterdir()) == []


def test_enough_memory_needs_no_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = settled(Residual().double())
    data = batches()
    walk = Propagation(model, trace(model), active_sites(model, data[0]), data, PLENTY)
    for site in active_sites(model, data[0]):
        list(walk.samples(site))
    assert list(tmp_path.iterdir()) == []
    walk.close()


@pytest.mark.parametrize("others", [0, 3000, 7000])
def test_activations_take_their_share_and_no_more_than_others_leave(
    others: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = settled(Residual().double())
    data = batches()
    walk = Propagation(model, trace(model), active_sites(model, data[0]), data, 8000)
    walk.make_room(others)
    assert walk._streams is not None
    for site in active_sites(model, data[0]):
        list(walk.samples(site))
        assert walk._streams.store._used <= min(4000, 8000 - others)
    walk.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_go_to_disk_too(dtype: torch.dtype) -> None:
    model = settled(Chain().to(dtype))
    data = [(torch.randn(2, 3, 12, 12).to(dtype),)]
    sites = active_sites(model, data[0])
    walk = Propagation(model, trace(model), sites, data, 0)
    for site in sites:
        assert_samples_are_right(list(walk.samples(site)), walk, site, data)
        walk.replace(site, disturbed(model, site))
    walk.close()


# --- skip connections


def lacking(walk: Propagation, site: Site) -> list[Tensor]:
    """How the wanted output differs from the original's: what the sum behind the site lacks."""
    return [sample.wanted - sample.output for sample in walk.samples(site)]


def joined(model: Calls, x: Tensor) -> Tensor:
    x = model.stem(x)
    side = model.side(x)
    return model.join(model.branch(x), side)


def walk_to_the_branch(model: nn.Module, data: Sequence[Inputs]) -> tuple[Propagation, Site]:
    """With the convolution ``side`` disturbed, standing at ``branch``."""
    sites = {site.name: site for site in active_sites(model, data[0])}
    walk = Propagation(model, trace(model), [sites["side"], sites["branch"]], data, PLENTY)
    list(walk.samples(sites["side"]))
    walk.replace(sites["side"], disturbed(model, sites["side"]))
    return walk, sites["branch"]


class Join(nn.Module):
    """A way to join two tensors."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


def added_in_place(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def halved_before(a: Tensor, b: Tensor) -> Tensor:
    b.mul_(0.5)
    return a + b


def written_before(a: Tensor, b: Tensor) -> Tensor:
    b[:, :2] = 1.0
    return a + b


ADDED = {
    "a + b": lambda a, b: a + b,
    "b + a": lambda a, b: b + a,
    "+=": added_in_place,
    "add_": lambda a, b: a.add_(b),
    "add": lambda a, b: torch.add(a, b),
    "method": lambda a, b: b.add(a),
}
OTHERWISE = {
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a + b, then a": lambda a, b: (a + b) * a,
    "cat": lambda a, b: torch.cat([a, b], 1),
    "relu first": lambda a, b: F.relu(a) + b,
    "alpha": lambda a, b: torch.add(b, a, alpha=0.5),
    "alpha on the skip": lambda a, b: torch.add(a, b, alpha=0.5),
    "a number": lambda a, b: a + 1.0,
    "skip halved before": halved_before,
    "skip written before": written_before,
}


@pytest.mark.parametrize("join", ADDED.values(), ids=ADDED.keys())
@torch.no_grad()
def test_what_the_sum_lacks_is_the_difference_of_the_skips(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = settled(Calls(joined, stem=conv(3, 4), side=conv(4, 4, 1), branch=conv(4, 4), join=Join(join)).double())
    data = batches()
    walk, branch = walk_to_the_branch(model, data)
    for found, inputs in zip(lacking(walk, branch), data, strict=True):
        x = model.stem(*inputs)
        torch.testing.assert_close(found, model.side(x) - walk.rewritten.side(x))
    walk.close()


@pytest.mark.parametrize("join", OTHERWISE.values(), ids=OTHERWISE.keys())
@torch.no_grad()
def test_whatever_is_no_plain_sum_lacks_nothing(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = settled(Calls(joined, stem=conv(3, 4), side=conv(4, 4, 1), branch=conv(4, 4), join=Join(join)).double())
    walk, branch = walk_to_the_branch(model, batches())
    assert all(float(found.abs().max()) == 0 for found in lacking(walk, branch))
    walk.close()


@torch.no_grad()
def test_a_sum_that_broadcasts_the_sites_output_lacks_nothing() -> None:
    """A global context block: the branch gives one number for each channel, the skip a whole image."""

    def forward(model: Calls, x: Tensor) -> Tensor:
        x = model.stem(x)
        side = model.side(x)
        return side + model.branch(x.mean((2, 3), keepdim=True))

    model = settled(Calls(forward, stem=conv(3, 4), side=conv(4, 4), branch=conv(4, 4, 1)).double())
    walk, branch = walk_to_the_branch(model, batches())
    for sample in walk.samples(branch):
        assert sample.wanted.shape == sample.output.shape
    walk.close()


@torch.no_grad()
def test_a_skip_without_sites_is_computed_before_the_branch_it_is_added_to() -> None:
    """torchvision computes the projection after the branch; the branch's last convolution must see it all the same."""
    model = settled(Residual().double())
    data = batches()
    sites = [s for s in active_sites(model, data[0]) if s.kind is not Kind.POINTWISE]
    walk = Propagation(model, trace(model), sites, data, PLENTY)
    for site in sites:
        found = lacking(walk, site)
        if site.name == "blocks.1.conv2":
            break
        walk.replace(site, disturbed(model, site))
    for difference, inputs in zip(found, data, strict=True):
        before = inputs_by_hooks(model, "blocks.1.downsample.0", inputs)[0]
        after = inputs_by_hooks(walk.rewritten, "blocks.1.downsample.0", inputs)[0]
        projection = model.blocks[1].downsample
        torch.testing.assert_close(difference, projection(before) - projection(after))
        assert float(difference.abs().max()) > 1e-3
    walk.close()


def test_a_fit_to_the_sum_restores_it() -> None:
    """Where the branch sees all that the skip saw, its last convolution at full rank makes up for a changed skip."""
    layers = {"stem": conv(3, 4), "side": conv(4, 4, 1), "branch": conv(4, 4), "join": Join(lambda a, b: a + b)}
    model = settled(Calls(joined, **layers).double())
    data = [(natural(8, 3, 12, 12),) for _ in range(4)]
    with torch.no_grad():
        walk, branch = walk_to_the_branch(model, data)
        before = relative(walk.rewritten(*data[0]), model(*data[0]))
        accumulator = Accumulator(branch.folded_spec, 0, 0)
        for sample in walk.samples(branch):
            accumulator.add(sample.rewritten, sample.wanted)
    family, setting = discover()["channel"], {"rank": 4}
    kernel, _ = folded_kernel(model, branch)
    moments = accumulator.result()
    goals = goals_of(kernel, branch.folded_spec, moments)
    found = fit(family, branch.folded_spec, setting, goals, moments, moments)
    stages, option = family.stages(branch.spec, setting), make_option(family, branch.spec, setting)
    walk.replace(branch, build_option(branch.folded_spec, stages, option, found.kernels, found.bias, kernel))
    walk.close()
    with torch.no_grad():
        assert relative(walk.rewritten(*data[0]), model(*data[0])) < 0.05 * before
    assert before > 0.05


@pytest.mark.parametrize("name", ["opaque part in place", "halves in place"])
def test_a_part_without_convolutions_leaves_the_graph_whole(name: str) -> None:
    model = NETWORKS[name]().eval()
    whole = trace(model).whole
    assert whole is not None
    with torch.no_grad():
        x = torch.randn(2, 3, 12, 12, dtype=next(model.parameters()).dtype)
        assert torch.equal(whole(x), model(x))


def test_without_a_graph_there_is_no_skip() -> None:
    model = settled(Residual().double())
    data = batches(1)
    walk = Propagation(model, Traced({}, ("",)), [], data, 0)
    for site in active_sites(model, data[0]):
        assert_samples_are_right(list(walk.samples(site)), walk, site, data)
        assert float(lacking(walk, site)[0].abs().max()) == 0
        walk.replace(site, disturbed(model, site))
    walk.close()


def test_the_way_to_a_site_tells_which_of_the_sites_behind_matter_to_it() -> None:
    model, inputs = settled(Residual()), (natural(2, 3, 12, 12, torch.float32),)
    traced, sites = trace(model), active_sites(model, inputs)
    by_name = {site.name: site for site in sites}

    def ways(*without: str) -> dict[str, list[str]]:
        active = [site for name, site in by_name.items() if name not in without]
        walk = Propagation(model, traced, active, [inputs], PLENTY)
        return {site.name: walk.way_to(site) for site in active}

    whole, fewer, sum_alone = ways(), ways("blocks.1.conv2"), ways("blocks.1.downsample.0")
    assert fewer == {name: way for name, way in whole.items() if name != "blocks.1.conv2"}
    assert whole["blocks.1.conv2"] != sum_alone["blocks.1.conv2"], "it is fitted to the sum"
    assert whole["blocks.0.conv2"] == sum_alone["blocks.0.conv2"]
