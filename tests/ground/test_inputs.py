"""Inputs under any names become positional tensors once; and optimise goes the whole way with them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convrewrite import analyze, optimize, verify
from convrewrite.errors import UsageError
from convrewrite.graph import finding
from convrewrite.graph.tracing import Traced
from convrewrite.inputs import (
    bind_inputs,
    enlarged,
    example_of,
    parameter_names,
    require_common_batch,
    required_names,
    varied,
)

IMAGE, VECTOR, SCALE = torch.zeros(1, 3, 16, 16), torch.ones(1, 4), torch.full((1, 16), 2.0)


class Conditioned(nn.Module):
    """An image and a vector that shifts its channels; the optional scale weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.shift = nn.Linear(4, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, image: Tensor, vector: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.relu(self.stem(image) + self.shift(vector)[:, :, None, None])
        if scale is not None:
            x = x * scale[:, :, None, None]
        return self.conv(x)


class KeywordOnly(nn.Module):
    def forward(self, image: Tensor, *, vector: Tensor) -> Tensor:
        return image + vector.sum()


class Gathered(nn.Module):
    """Takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, *images: Tensor) -> Tensor:
        return self.conv(torch.relu(self.left(images[0]) - self.left(images[1])))


def data(count: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(count, 3, 16, 16, generator=generator),
        "vector": torch.randn(count, 4, generator=generator),
        "scale": torch.linspace(0, 2, 16) ** 2 + torch.rand(count, 16, generator=generator),
    }


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (IMAGE, (IMAGE,)),
        ((IMAGE, VECTOR), (IMAGE, VECTOR)),
        ([IMAGE, VECTOR], (IMAGE, VECTOR)),
        ({"vector": VECTOR, "image": IMAGE}, (IMAGE, VECTOR)),
        ({"scale": SCALE, "vector": VECTOR, "image": IMAGE}, (IMAGE, VECTOR, SCALE)),
        (((IMAGE,), {"vector": VECTOR}), (IMAGE, VECTOR)),
        ((IMAGE, {"vector": VECTOR}), (IMAGE, VECTOR)),
        (((), {"image": IMAGE, "vector": VECTOR}), (IMAGE, VECTOR)),
        (((IMAGE, VECTOR), {}), (IMAGE, VECTOR)),
    ],
)
def test_every_form_gives_the_tensors_in_the_order_of_forward(example: Any, expected: tuple[Tensor, ...]) -> None:
    found = bind_inputs(Conditioned(), example)
    assert len(found) == len(expected)
    assert all(a is b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        (
            Conditioned,
            {"image": IMAGE, "colour": VECTOR},
            r"forward's parameters \(image, vector, scale\), found colour; give inputs by these, or, where forward takes a",
        ),
        (
            Conditioned,
            {"image": IMAGE, "scale": SCALE},
            "takes vector before scale, and no value was given; give one, or",
        ),
        (Conditioned, {"vector": VECTOR}, "takes image before vector"),
        (Conditioned, ((IMAGE,), {"image": IMAGE}), "image was given by position and by keyword"),
        (KeywordOnly, {"image": IMAGE, "vector": VECTOR}, "takes vector by keyword only; wrap the model in a module"),
        (
            KeywordOnly,
            (IMAGE, VECTOR),
            r"by position \(image, and vector by keyword only\), found 2 of them; give one for each",
        ),
        (Conditioned, (IMAGE, 3), "example input 1: expected a tensor, found int; wrap the model"),
        (
            Conditioned,
            (1, 3, 8, 8),
            r"example input: expected a tensor, found a shape; give one as torch.randn\(\(1, 3, 8, 8",
        ),
        (Conditioned, {"image": None}, "example input 'image': expected a tensor, found NoneType"),
        (Conditioned, IMAGE.to("meta"), "example input 0: expected numbers, found a tensor on the meta device"),
        (Conditioned, (), "expected a tensor, a tuple of tensors, .* found none"),
        (Conditioned, "image", "expected a tensor, a tuple of tensors, .* found str"),
    ],
)
def test_what_cannot_be_bound(model: Callable[[], nn.Module], example: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bind_inputs(model(), example)


def test_names_are_those_of_forward() -> None:
    assert parameter_names(Conditioned()) == ("image", "vector", "scale")
    assert required_names(Conditioned()) == ("image", "vector")
    assert parameter_names(KeywordOnly()) == required_names(KeywordOnly()) == ("image",)
    assert parameter_names(Gathered()) == ()


def test_inputs_without_a_common_batch_are_refused() -> None:
    require_common_batch((IMAGE, VECTOR))
    require_common_batch((torch.zeros(3, 16, 16),))
    with pytest.raises(UsageError, match=r"of one size, found 1x3x16x16, 2x4; give every input a batch axis"):
        require_common_batch((IMAGE, VECTOR.repeat(2, 1)))
    with pytest.raises(UsageError, match="of one size, found a scalar"):
        require_common_batch((torch.tensor(1.0),))
    with pytest.raises(UsageError, match=r"expected one example or more, found none \(0x3x16x16\)"):
        require_common_batch((IMAGE[:0],))
    with pytest.raises(UsageError, match="found 1x3x16x16, a scalar"):
        optimize(Conditioned(), (IMAGE, torch.tensor(1.0)))


def test_an_example_is_an_object_or_what_a_callable_gives() -> None:
    assert example_of(IMAGE, "here") is IMAGE
    assert example_of(lambda: (IMAGE,), "here") == (IMAGE,)
    with pytest.raises(UsageError, match=r"here: expected a tensor.* found int"):
        example_of(3, "here")
    with pytest.raises(UsageError, match=r"here: expected a tensor.* from calling it, found str"):
        example_of(str, "here")
    with pytest.raises(UsageError, match=r"here: calling it without arguments raised TypeError: .*missing"):
        example_of(Conditioned().forward, "here")


def error_of_conv(model: nn.Module, example: Any, calibration: object) -> float:
    """The held-out output error of the site ``conv``, from which a wrong prefix would show."""
    report = optimize(model.eval(), example, calibration=calibration, measure=False).report
    (row,) = [row for row in report.sites if row.name == "conv"]
    assert row.action == "rewritten"
    assert row.output_error is not None
    return row.output_error


def lose_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, the inputs of every site are those of the model as it runs."""
    monkeypatch.setattr(finding, "follow", lambda *_: Traced({}, ("",)))


@pytest.mark.parametrize("given", [("image", "vector"), ("image", "vector", "scale")])
def test_keyword_inputs_and_batches_that_are_dictionaries_go_the_whole_way(
    given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: tensor for name, tensor in data().items() if name in given}
    labels = torch.arange(24)
    batches = [
        {"labels": labels[rows], **{name: inputs[name][rows] for name in reversed(given)}}
        for rows in (slice(0, 8), slice(8, 24))
    ]
    example = {name: tensor[:1] for name, tensor in inputs.items()}
    model = Conditioned()
    by_name = error_of_conv(model, example, batches)
    positional = tuple(inputs[name] for name in given)
    assert error_of_conv(model, tuple(tensor[:1] for tensor in positional), positional) == by_name
    lose_the_graph(monkeypatch)
    assert error_of_conv(model, example, (*positional, labels)) == pytest.approx(by_name, rel=1e-3)


def test_any_number_of_inputs_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = data()["image"], data()["image"].flip(-1) * 0.5
    model = Gathered()
    followed = error_of_conv(model, (left[:1], right[:1]), (left, right))
    lose_the_graph(monkeypatch)
    assert error_of_conv(model, (left[:1], right[:1]), (left, right)) == pytest.approx(followed, rel=1e-3)


def test_other_numbers_and_other_sizes_are_made_of_the_given_ones() -> None:
    image, indices, scale = torch.linspace(0, 1, 5).expand(1, 2, 3, 5), torch.tensor([[1, 2, 3]]), torch.tensor(3.0)
    numbers, reversed_indices, same = varied((image, indices, scale))
    assert numbers[0, 0, 0].tolist() == [0.75, 0.625, 0.5, 0.375, 0.25], "within the range of those that were given"
    assert reversed_indices.tolist() == [[3, 2, 1]] and same is scale
    shapes = [[tuple(tensor.shape) for tensor in made] for made in enlarged((image, image[0], indices, scale))]
    assert shapes == [
        [(2, 2, 3, 5), (4, 3, 5), (2, 3), ()],
        [(1, 2, 3, 10), (2, 3, 10), (1, 3), ()],
        [(1, 2, 6, 10), (2, 3, 10), (1, 3), ()],
    ]


def test_several_inputs_without_calibration_are_said() -> None:
    report = optimize(Conditioned().eval(), (IMAGE, VECTOR), measure=False).report
    assert report.calibration.kind == "weights only"
    assert any("the model takes several inputs" in note for note in report.notes)


def test_analyze_and_verify_take_keyword_inputs() -> None:
    example = {"vector": data()["vector"], "image": data()["image"]}
    assert [row.name for row in analyze(Conditioned(), example)] == ["stem", "conv"]
    outcome = verify(model := Conditioned(), model, example)
    assert outcome.fidelity.outputs[0].relative_error == 0
    assert outcome.fidelity.examples == 24
