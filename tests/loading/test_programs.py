"""Exported programs become modules with the layers, the names and the numbers of the models they were exported from."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SHAPE, call, images, small_network
from networks import CalledTwice, Calls, Chain, NineKinds, Residual, settled
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from convrewrite.errors import ModelLoadError
from convrewrite.graph.finding import find
from convrewrite.loading.batch_axis import open_batch
from convrewrite.loading.input_shapes import stated_input_shapes
from convrewrite.loading.programs import rebuild

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def export(model: nn.Module, *inputs: Tensor, dynamic: bool = True, **named: Tensor) -> ExportedProgram:
    batch = {0: Dim("batch")}
    shapes = (*[batch for _ in inputs], *[batch for _ in named]) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, named, dynamic_shapes=shapes)


class Decoder(nn.Module):
    """Skip connections by concatenation, transposed convolutions, sizes asked of the input, a linear layer, a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2))
        self.shuffled = nn.Conv2d(8, 8, 1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(12, affine=False)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(12 * 12 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.down(x))
        n, c, h, w = x.shape
        y = self.shuffled(x).view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.up(F.max_pool2d(F.relu(y), 2))
        y = self.norm(torch.cat([x, y], 1))
        return self.head(self.drop(y.view(n, -1)))


MODELS = {
    "chain": Chain,
    "residual": Residual,
    "called twice": CalledTwice,
    "nine kinds": NineKinds,
    "decoder": Decoder,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@every_model
@torch.no_grad()
def test_the_module_has_the_keys_and_computes_what_the_program_computes(make: type[nn.Module]) -> None:
    model = settled(make())
    program = export(model, X)
    made = rebuild(program)
    assert torch.equal(made.model(X), program.module()(X))
    assert torch.equal(made.model(X[:1]), program.module()(X[:1]))
    state = made.model.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert made.notes == ()
    assert not any(module.training for module in made.model.modules())


@every_model
def test_sites_are_those_of_the_model(make: type[nn.Module]) -> None:
    model = settled(make())
    made = rebuild(export(model, X)).model
    _, traced, sites = find(made, (X,))
    assert sites == find(model, (X,))[2]
    assert traced.whole is not None


@pytest.mark.parametrize("table", [{}, None], ids=["functional", "core operators"])
@torch.no_grad()
def test_decomposed_programs(table: dict[Any, Any] | None) -> None:
    model = settled(Residual())
    program = export(model, X)
    program = program.run_decompositions() if table is None else program.run_decompositions(table)
    made = rebuild(program).model
    assert torch.equal(made(X), program.module()(X))
    assert set(made.state_dict()) == set(model.state_dict())
    assert find(made, (X,))[2] == find(model, (X,))[2]


@torch.no_grad()
def test_a_program_in_train_mode_trains_and_switches_to_eval() -> None:
    model = settled(nn.Sequential(Residual(), nn.Dropout(0.5))).train()
    program = export(model, X)
    made = rebuild(program).model
    assert made.training
    reference = program.module()
    for _ in range(2):  # the second time with the statistics of the first
        outputs = []
        for module in (made, reference):
            torch.manual_seed(0)
            outputs.append(module(X))
        assert torch.equal(*outputs)
    after = dict(reference.named_buffers())
    assert all(torch.equal(buffer, after[name]) for name, buffer in made.named_buffers())
    model.load_state_dict(made.state_dict())
    assert torch.equal(made.eval()(X), model.eval()(X))


@pytest.mark.parametrize("dynamic", [True, False])
def test_statistics_of_a_program_in_train_mode_stay_as_they_were(dynamic: bool) -> None:
    model = settled(Residual()).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = dict(rebuild(export(model, X, dynamic=dynamic)).model.named_buffers())
    assert before
    assert all(torch.equal(buffer, found[name]) for name, buffer in before.items())


def test_a_program_in_eval_mode_can_be_trained() -> None:
    made = rebuild(export(settled(Decoder()), X)).model.train()
    before = made.get_buffer("down.1.running_mean").clone()
    made(X).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert not torch.equal(made.get_buffer("down.1.running_mean"), before)
    assert int(made.get_buffer("down.1.num_batches_tracked")) == 1


def test_layers_keep_their_settings() -> None:
    made = rebuild(export(settled(Decoder()), X)).model
    norm, plain, drop = made.get_submodule("down.1"), made.get_submodule("norm"), made.get_submodule("dropout")
    assert isinstance(norm, nn.BatchNorm2d) and (norm.eps, norm.momentum) == (1e-3, 0.2)
    assert isinstance(plain, nn.BatchNorm2d) and not plain.affine
    assert isinstance(drop, nn.Dropout) and drop.p == 0.25
    assert isinstance(made.get_submodule("head"), nn.Linear)


def test_a_batch_norm_of_flat_inputs() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)))
    made = rebuild(export(model, X)).model
    assert isinstance(made.get_submodule("3"), nn.BatchNorm1d)
    assert torch.equal(made(X), model(X))


@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_a_batch_norm_with_a_weight_or_a_bias_alone(absent: str) -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[1].register_parameter(absent, None)
    made = rebuild(export(model, X)).model
    norm = made.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d) and getattr(norm, absent) is None
    assert torch.equal(made(X), model(X))


def test_a_program_of_one_dimensional_convolutions() -> None:
    model = settled(
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.ConvTranspose1d(4, 2, 4, stride=2))
    )
    x = X.flatten(2)
    made = rebuild(export(model, x)).model
    assert torch.equal(made(x), model(x))
    assert [site.batch_norm for site in find(made, (x,))[2]] == ["1", None]


def test_a_tensor_that_is_needed_elsewhere_keeps_the_operator() -> None:
    model = settled(
        Calls(lambda m, x: m.norm(m.conv(x)) * m.norm.weight.mean(), conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4))
    )
    made = rebuild(export(model, X)).model
    assert not any(isinstance(module, nn.BatchNorm2d) for module in made.modules())
    assert torch.equal(made(X), model(X))


def test_containers_of_inputs_and_outputs() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> dict[str, Any]:
            y = self.conv(pair[0] + pair[1])
            return {"map": y, "parts": [y.mean((2, 3)), (y * scale,)]}

    model, scale = Several().eval(), torch.rand(4, 1, 1, 1)
    batch = {0: Dim("batch")}
    program = torch.export.export(
        model, ((X, X + 1),), {"scale": scale}, dynamic_shapes={"pair": (batch, batch), "scale": batch}
    )
    found, expected = rebuild(program).model(X, X + 1, scale), model((X, X + 1), scale=scale)
    assert list(found) == ["map", "parts"]
    assert torch.equal(found["map"], expected["map"])
    assert torch.equal(found["parts"][1][0], expected["parts"][1][0])


def test_numbers_among_the_inputs_are_constants() -> None:
    class Powers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, power: int, y: Tensor | None = None) -> Tensor:
            return self.conv(x) ** power

    model = Powers().eval()
    program = torch.export.export(model, (X, 2), dynamic_shapes=({0: Dim("batch")}, None))
    assert torch.equal(rebuild(program).model(X), model(X, 2))


# --- the batch axis


@every_model
@torch.no_grad()
def test_a_fixed_batch_is_opened_where_examples_do_not_mix(make: type[nn.Module]) -> None:
    model = settled(make())
    for batch in (1, 2):
        program = export(model, X[:batch], dynamic=False)
        if make is NineKinds:  # its kernel is made from the mean of the batch
            with pytest.raises(
                ModelLoadError, match=f"exported for {batch}, which gives other outputs for another; export"
            ):
                rebuild(program, "m.pt2")
            continue
        made = rebuild(program)
        assert torch.equal(made.model(X[:batch]), program.module()(X[:batch]))
        torch.testing.assert_close(made.model(X), model(X))
        assert made.notes == (
            f"the program was exported for a batch of {batch}; it takes any now, which was tried on random inputs",
        )


def test_the_state_of_an_lstm_is_not_tried_with_another_batch() -> None:
    """Torch would write beyond its memory, and end the process."""
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.lstm.input, (graph.placeholder("x"),)))
    opened = open_batch(torch.fx.GraphModule(nn.Module(), graph), (X,), len(X))
    assert opened == (None, "has an LSTM, whose first state is of that size")


def test_a_shape_that_hides_the_batch_is_not_opened() -> None:
    model = Calls(lambda m, x: m.conv(x).view(x.shape[0] * 2, 2, 10, 10), conv=nn.Conv2d(3, 4, 3)).eval()
    with pytest.raises(
        ModelLoadError, match=r"m\.pt2: .* exported for 4, which does not run on another; .*dynamic_shapes"
    ):
        rebuild(export(model, X, dynamic=False), "m.pt2")
    assert rebuild(export(model, X)).model(X[:3]).shape == (6, 2, 10, 10)


def test_tensors_made_for_the_batch_are_made_for_any() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.token = nn.Parameter(torch.randn(1, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2)
            zeros = torch.zeros(x.shape[0], 4, 2)
            return torch.cat([self.token.expand(x.shape[0], -1, -1), y, zeros], 2)

    model = Token().eval()
    for batch in (1, 2):
        made = rebuild(export(model, X[:batch], dynamic=False)).model
        torch.testing.assert_close(made(X), model(X))


def test_a_program_with_a_dtype_in_its_graph_is_tried_in_its_own_precision() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    cast = Calls(lambda m, x: m.inner(x.to(torch.float32)).view(x.shape[0], -1), inner=model)
    made = rebuild(export(cast, X, dynamic=False)).model
    torch.testing.assert_close(made(X[:1]), cast(X[:1]))


def test_the_shape_of_an_example_is_stated() -> None:
    model = settled(Chain())
    assert stated_input_shapes(rebuild(export(model, X)).model) == [(1, 3, 12, 12)]
    assert stated_input_shapes(model) == []
    indices = Calls(lambda m, x: m.conv(m.embed(x)[:, None]), conv=nn.Conv2d(1, 2, 3), embed=nn.Embedding(9, 5)).eval()
    made = rebuild(export(indices, torch.arange(12).reshape(2, 6) % 9)).model
    assert isinstance(made, fx.GraphModule)
    assert stated_input_shapes(made) == []


# --- the whole way


def test_a_program_file_is_optimised(tmp_path: Path) -> None:
    """Its size is taken from the program, its calibration batches are larger than the one it was exported for."""
    model = small_network()
    torch.export.save(export(model, images(1), dynamic=False), tmp_path / "m.pt2")
    np.save(tmp_path / "images.npy", images(40).numpy())
    ran = call("optimize", tmp_path / "m.pt2", "--trust", "--calib", tmp_path / "images.npy", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    told = ran.said  # lines are broken where a path ends
    assert "2 of 4 convolution sites rewritten" in told
    assert "exported for a batch of 1; it takes any now" in told
    analyzed = call("analyze", tmp_path / "m.pt2", "--trust")
    assert "input size 1x3x16x16 is that of the exported program" in analyzed.said
    assert SHAPE == (3, 16, 16)


def test_a_program_that_cannot_be_opened_is_one_clear_error(tmp_path: Path) -> None:
    model = Calls(lambda m, x: m.conv(x).view(x.shape[0] * 2, 2, 10, 10), conv=nn.Conv2d(3, 4, 3)).eval()
    torch.export.save(export(model, X, dynamic=False), tmp_path / "m.pt2")
    ran = call("analyze", tmp_path / "m.pt2", "--trust")
    assert ran.code == 3
    assert "exported for 4, which does not run on another; export it with dynamic_shapes" in ran.message
