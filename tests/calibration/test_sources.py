"""Batches for models of several inputs: by the names of forward's parameters, by number, by place."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from convrewrite.calibration.batches import peek_example, read_calibration
from convrewrite.errors import CalibrationError, UsageError

COUNT = 70
EXAMPLE = (torch.zeros(1, 2), torch.zeros(1, 2))
NAMES = ("left", "right")
LEFT = torch.arange(2.0 * COUNT).reshape(COUNT, 2)
RIGHT = -LEFT - 1
LABELS = torch.arange(COUNT)


class Pairs(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"right": RIGHT[index], "target": LABELS[index], "left": LEFT[index]}


def halves(*values: Any) -> list[Any]:
    return [tuple(value[rows] for value in values) for rows in (slice(0, 40), slice(40, COUNT))]


@pytest.mark.parametrize(
    "source",
    [
        (LEFT, RIGHT, LABELS),
        {"labels": LABELS, "right": RIGHT, "left": LEFT},
        {"input.1": RIGHT, "input.0": LEFT, "id": LABELS},
        {"first": LEFT, "y": LABELS, "second": RIGHT},
        halves(LEFT, RIGHT, LABELS),
        [{"labels": c, "right": b, "left": a} for a, b, c in halves(LEFT, RIGHT, LABELS)],
        [((a, b), c) for a, b, c in halves(LEFT, RIGHT, LABELS)],
        [({"right": b, "left": a}, c) for a, b, c in halves(LEFT, RIGHT, LABELS)],
        Pairs(),
    ],
    ids=["tuple", "names", "numbers", "places", "tuples", "dicts", "nested", "dict and label", "data set"],
)
def test_every_form_gives_the_same_inputs_in_the_order_of_forward(source: object) -> None:
    calibration = read_calibration(source, EXAMPLE, names=NAMES)
    assert calibration.fitted_on + calibration.held_out_count == COUNT
    for left, right in (*calibration.fit, *calibration.held_out):
        assert torch.equal(right, -left - 1)
        assert bool((left >= 0).all())


def test_a_lone_tensor_is_the_example_of_the_only_input_and_a_dictionary_is_refused() -> None:
    read = read_calibration(LEFT, EXAMPLE[0])
    assert [tensor.shape[1:] for (tensor,) in (*read.fit, *read.held_out)] == [(2,)] * len((*read.fit, *read.held_out))
    with pytest.raises(UsageError, match=r"example: expected a tensor, or a tuple .* found dict; .* names="):
        read_calibration(LEFT, {"left": EXAMPLE[0]})  # type: ignore[arg-type]


def test_examples_that_a_batch_lists_one_by_one_are_all_read() -> None:
    batches = [list(LEFT[start : start + 10]) for start in range(0, COUNT, 10)]
    targets = [{"boxes": torch.zeros(i, 4)} for i in range(10)]
    beside = [(tuple(rows), tuple(targets)) for rows in batches]
    arrays = [([row.numpy() for row in rows], targets) for rows in batches]
    dictionaries = [[{"id": i, "image": row} for i, row in enumerate(rows)] for rows in batches]
    for source in (batches, beside, arrays, dictionaries):
        read = read_calibration(source, EXAMPLE[:1])
        assert sorted(row for (left,) in (*read.fit, *read.held_out) for row in left.tolist()) == LEFT.tolist()


class Refilled(Dataset[Tensor]):
    """Gives one tensor again and again, with other numbers in it."""

    def __init__(self) -> None:
        self.tensor = torch.empty(2)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return self.tensor.copy_(LEFT[index])


class Streamed(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(LEFT[:40])


class Counted(Streamed):
    def __len__(self) -> int:
        return 40


@pytest.mark.parametrize("source", [Streamed(), Counted(), Counted() + Counted()], ids=["stream", "length", "chain"])
def test_a_stream_is_read_to_its_end_whether_it_has_a_length_or_not(source: IterableDataset[Tensor]) -> None:
    read = read_calibration(source, EXAMPLE[:1])
    assert read.fitted_on + read.held_out_count == len(list(source))


@pytest.mark.parametrize(
    "source", [Streamed(), [LEFT[:30], LEFT[30:40]], Refilled()], ids=["stream", "list", "data set"]
)
def test_what_comes_bit_by_bit_has_to_fit_into_the_memory_too(source: object) -> None:
    with pytest.raises(
        CalibrationError,
        match=r"the inputs would take .* bytes, the limit is 319; give fewer .* or raise --memory where the command has it",
    ):
        read_calibration(source, EXAMPLE[:1], memory=319)
    assert read_calibration(source, EXAMPLE[:1], memory=COUNT * 8).fitted_on >= 32


def refilled_batches() -> Iterator[Tensor]:
    batch = torch.empty(10, 2)
    for rows in LEFT.split(10):
        yield batch.copy_(rows)


@pytest.mark.parametrize("source", [Refilled(), refilled_batches()], ids=["data set", "loader"])
def test_a_tensor_that_is_filled_anew_keeps_what_it_held_when_it_was_read(source: object) -> None:
    read = read_calibration(source, EXAMPLE[:1])
    rows = torch.cat([batch[0] for batch in (*read.fit, *read.held_out)])
    assert torch.equal(rows[rows[:, 0].argsort()], LEFT)


def test_a_name_of_forward_comes_before_what_it_may_usually_mean() -> None:
    source = {"image": RIGHT, "label": LEFT}
    by_name = read_calibration(source, EXAMPLE[:1], names=("label",))
    by_custom = read_calibration(source, EXAMPLE[:1], names=("data",))
    assert all(bool((x >= 0).all()) for (x,) in by_name.fit)
    assert all(bool((x < 0).all()) for (x,) in by_custom.fit)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            {"left": LEFT, "other": RIGHT},
            "expected 2 arrays, named left, right or input.0 to input.1, found left, other",
        ),
        ([{"left": LEFT, "other": RIGHT}], "a batch: expected 2 arrays, named left, right or"),
        ([(LEFT,)], "expected 2 tensors, one for each model input, found 1"),
        ((LEFT, RIGHT[:9]), "expected as many examples in every input"),
    ],
)
def test_inputs_that_are_missing_are_never_guessed(source: object, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        read_calibration(source, EXAMPLE, names=NAMES)


def test_the_first_example_of_a_file(tmp_path: Path) -> None:
    pixels = np.full((5, 8, 6, 3), 7, np.uint8)
    np.savez(tmp_path / "c.npz", tag=np.arange(5), image=pixels, labels=np.zeros(5))
    image, tag = peek_example(str(tmp_path / "c.npz"), ("image", "tag")) or ()
    assert (tuple(image.shape), image.dtype, tuple(tag.shape), tag.dtype) == (
        (1, 3, 8, 6),
        torch.uint8,
        (1,),
        torch.int64,
    )
    assert peek_example(str(tmp_path), ("image",)) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "expected calibration inputs, found none"),
        (torch.empty(0, 3, 8, 8), "expected calibration inputs, found none"),
        (torch.tensor(3.0), "expected the examples along the first axis, found a single number"),
        ({"train": {"x": LEFT}}, r"none\.pt: a mapping: expected tensors or arrays, found dict"),
    ],
)
def test_a_file_without_an_example_gives_none(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "none.pt")
    with pytest.raises(CalibrationError, match=words):
        peek_example(str(tmp_path / "none.pt"))
