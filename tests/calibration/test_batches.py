"""Every source of calibration inputs, and every reason to refuse one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from convrewrite.calibration import images
from convrewrite.calibration.batches import Calibration, Reading, ReadingOptions, read_calibration
from convrewrite.errors import CalibrationError, UsageError
from convrewrite.inputs import Inputs

EXAMPLE = (torch.zeros(1, 3, 8, 6),)
GREY = (torch.zeros(1, 1, 8, 6),)


def numbered(count: int, *shape: int) -> Tensor:
    """Examples that can be told apart: example i is filled with i."""
    shape = shape or (3, 8, 6)
    return torch.arange(count, dtype=torch.float32).reshape(-1, *[1] * len(shape)).expand(count, *shape).clone()


def values(batches: tuple[Inputs, ...]) -> list[float]:
    return [float(example.flatten()[0]) for inputs in batches for example in inputs[0]]


def all_values(calibration: Calibration) -> list[float]:
    return sorted(values(calibration.fit) + values(calibration.held_out))


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def byte_equal(first: Calibration, second: Calibration) -> bool:
    left, right = ([t for inputs in c.fit + c.held_out for t in inputs] for c in (first, second))
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_tensor_is_split_and_batched() -> None:
    calibration = read_calibration(numbered(100), EXAMPLE, batch=32)
    assert (calibration.fitted_on, calibration.held_out_count) == (80, 20)
    assert [len(inputs[0]) for inputs in calibration.fit] == [32, 32, 16]
    assert (calibration.kind, calibration.source, calibration.notes) == ("data", "a tensor", ())
    assert all_values(calibration) == [float(i) for i in range(100)]


def test_held_out_examples_are_disjoint_from_the_fitted_and_not_the_last() -> None:
    calibration = read_calibration(numbered(100), EXAMPLE)
    assert not set(values(calibration.fit)) & set(values(calibration.held_out))
    assert min(values(calibration.held_out)) < 50 < max(values(calibration.held_out))


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (3, 1), (10, 2)])
def test_at_least_one_of_two_is_held_out(count: int, held: int) -> None:
    assert read_calibration(numbered(count), EXAMPLE).held_out_count == held


def test_the_seed_decides() -> None:
    first, again = (read_calibration(numbered(90), EXAMPLE, limit=70, seed=3) for _ in range(2))
    other = read_calibration(numbered(90), EXAMPLE, limit=70, seed=4)
    assert byte_equal(first, again)
    assert not byte_equal(first, other)


def test_few_inputs_are_noted_with_the_reason() -> None:
    (note,) = read_calibration(numbered(63), EXAMPLE).notes
    assert "63" in note
    assert "better on these than on others" in note
    assert "unknowns" not in note, "one image of few has more positions than a kernel has unknowns"
    assert read_calibration(numbered(64), EXAMPLE).notes == ()


def test_inputs_that_repeat_others_are_noted() -> None:
    found = read_calibration(numbered(80)[torch.arange(80) % 10], EXAMPLE)
    assert any(note.startswith("70 of 80 inputs are the same as another") for note in found.notes)
    few = numbered(80)
    few[:3] = few[3]
    assert not any("same as another" in note for note in read_calibration(few, EXAMPLE).notes)


def test_more_than_the_limit_are_thinned_at_random_and_noted() -> None:
    calibration = read_calibration(numbered(500), EXAMPLE, limit=100)
    assert calibration.fitted_on + calibration.held_out_count == 100
    assert max(all_values(calibration)) > 400
    assert calibration.notes == ("100 of 500 inputs used, drawn at random",)


@pytest.mark.parametrize("name", ["images", "inputs", "x", "anything"])
def test_npz_with_labels(tmp_path: Path, name: str) -> None:
    save_npz(tmp_path / "c.npz", {"labels": np.arange(70), name: numbered(70).numpy(), "y": np.arange(70)})
    calibration = read_calibration(tmp_path / "c.npz", EXAMPLE)
    assert all_values(calibration) == [float(i) for i in range(70)]
    assert calibration.source == str(tmp_path / "c.npz")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_file_without_examples_is_told_to_have_none(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c.{suffix}"
    nothing = numbered(70).numpy()[:0]
    np.savez(path, images=nothing) if suffix == "npz" else np.save(path, nothing)
    with pytest.raises(CalibrationError, match="expected calibration inputs, found none"):
        read_calibration(path, EXAMPLE)


def test_npz_with_several_inputs_by_number_and_in_order(tmp_path: Path) -> None:
    example = (torch.zeros(1, 2), torch.zeros(1, 3))
    pair = numbered(70, 2).numpy(), numbered(70, 3).numpy()
    save_npz(tmp_path / "n.npz", {"input.1": pair[1], "input.0": pair[0]})
    np.savez(tmp_path / "o.npz", left=pair[0], right=pair[1], labels=np.arange(70))
    numbers, order = (read_calibration(tmp_path / name, example) for name in ("n.npz", "o.npz"))
    assert byte_equal(numbers, order)
    assert [tensor.shape[1:] for tensor in order.fit[0]] == [(2,), (3,)]
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in order.fit)


def test_npy_of_another_precision_and_byte_order(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", numbered(70).numpy().astype(">f8"))
    calibration = read_calibration(str(tmp_path / "c.npy"), EXAMPLE)
    assert calibration.fit[0][0].dtype == torch.float32
    assert all_values(calibration) == [float(i) for i in range(70)]


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize(
    "pack",
    [
        lambda x: x,
        lambda x: (x, torch.arange(len(x))),
        lambda x: list(x.split(16)),
        lambda x: {"images": x, "labels": torch.arange(len(x))},
        lambda x: [{"y": torch.arange(len(part)), "pixel_values": part} for part in x.split(16)],
    ],
)  # fmt: skip
def test_pt_files(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    torch.save(pack(numbered(70)), tmp_path / f"c{suffix}")
    calibration = read_calibration(tmp_path / f"c{suffix}", EXAMPLE)
    assert all_values(calibration) == [float(i) for i in range(70)]
    assert calibration.source.endswith(suffix)


def test_uint8_is_scaled_then_normalised_for_each_channel() -> None:
    pixels = torch.full((64, 3, 8, 6), 255, dtype=torch.uint8)
    pixels[:, 0, 7, 5] = torch.arange(64)  # so that none is another one's copy
    calibration = read_calibration(pixels, EXAMPLE, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    torch.testing.assert_close(calibration.fit[0][0][0, :, 0, 0], torch.tensor([1.0, 3.0, 0.5]))
    assert calibration.notes == (
        "uint8 inputs were taken for pixels and scaled to [0, 1]",
        "a tensor was normalised with mean 0.5, 0.25, 0 and std 0.5, 0.25, 2",
    )


def test_what_does_not_count_for_arrays_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", numbered(64).numpy())
    calibration = read_calibration(tmp_path / "c.npy", EXAMPLE, resize=(8, 8))
    assert calibration.notes == (
        f"resize counts for images of a folder alone: {tmp_path / 'c.npy'} was taken as it is",
    )


def test_files_of_a_folder_that_are_no_images_are_told(tmp_path: Path) -> None:
    for index in range(64):
        pixels = np.full((8, 6, 3), index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    assert not read_calibration(tmp_path, EXAMPLE, mean=(0.5,), resize=(8, 8)).notes[1:], "of a folder all of it counts"
    for name in ("a.gif", "b.tiff", "labels.csv"):
        (tmp_path / name).write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    told = f"4 files skipped in {tmp_path}, no images (.bmp, .jpeg, .jpg, .png, .webp): a.gif, b.tiff, labels.csv and 1 more"
    assert told in read_calibration(tmp_path, EXAMPLE).notes


def test_one_mean_serves_all_channels_and_the_dtype_is_that_of_the_model() -> None:
    calibration = read_calibration(numbered(64), (EXAMPLE[0].double(),), mean=(1.0,))
    assert all_values(calibration) == [float(i - 1) for i in range(64)]
    assert calibration.fit[0][0].dtype == torch.float64


def test_channels_last_arrays_are_moved() -> None:
    images = torch.rand(64, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    moved = read_calibration(images.permute(0, 2, 3, 1).numpy(), EXAMPLE)
    assert byte_equal(moved, read_calibration(images, EXAMPLE))
    assert any("moved" in note for note in moved.notes)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x]])
def test_grey_images_need_no_channel_axis(wrap: object) -> None:
    assert callable(wrap)
    calibration = read_calibration(wrap(numbered(64, 8, 6)), GREY)
    assert all_values(calibration) == [float(i) for i in range(64)]
    assert any("channel" in note for note in calibration.notes)


def test_loaders_datasets_and_generators_agree_and_ignore_labels() -> None:
    images, labels = numbered(70), torch.full((70,), 999)
    dataset = TensorDataset(images, labels)
    sources = (
        dataset,
        DataLoader(dataset, batch_size=16),
        [(image, 999) for image in images],
        ({"label": labels[:16], "image": part} for part in images.split(16)),
        (part.numpy() for part in images.split(16)),
    )
    expected = read_calibration(images, EXAMPLE)
    for source in sources:
        assert byte_equal(read_calibration(source, EXAMPLE), expected)


def test_a_data_set_is_read_only_where_it_is_used() -> None:
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            Counting.read += 1
            return tuple(tensor[index] for tensor in self.tensors)

    calibration = read_calibration(Counting(numbered(300), torch.arange(300)), EXAMPLE, limit=64)
    assert Counting.read == 64
    assert max(all_values(calibration)) > 200


def test_an_endless_generator_is_read_up_to_the_limit() -> None:
    drawn = []

    def endless() -> Iterator[Tensor]:
        while True:
            drawn.append(1)
            yield numbered(16)

    calibration = read_calibration(endless(), EXAMPLE, limit=70)
    assert calibration.fitted_on + calibration.held_out_count == 70
    assert len(drawn) == 5
    assert "reading stopped after the first 70 inputs" in calibration.notes


@pytest.mark.parametrize("make", [lambda x: x, lambda x: lambda: x, lambda x: lambda: iter(x.split(8))])
def test_named_objects_come_from_the_given_function(make: object) -> None:
    asked = []

    def import_object(target: str) -> object:
        asked.append(target)
        assert callable(make)
        return make(numbered(64))

    calibration = read_calibration("data.py:images", EXAMPLE, import_object=import_object)
    assert asked == ["data.py:images"]
    assert calibration.source == "data.py:images"
    assert all_values(calibration) == [float(i) for i in range(64)]


def test_integer_inputs_of_a_model_stay_integers() -> None:
    example = (*EXAMPLE, torch.zeros(1, 2, dtype=torch.int64))
    calibration = read_calibration((numbered(64), torch.ones(64, 2, dtype=torch.int32)), example)
    assert calibration.fit[0][1].dtype == torch.int64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    for i, name in enumerate(("b/two.JPG", "one.png", "b/three.bmp", "four.webp")):
        Image.new("RGB", (24, 16), (20 * i, 100, 200)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images(folder: Path) -> None:
    calibration = read_calibration(folder, EXAMPLE)
    assert calibration.fitted_on + calibration.held_out_count == 4
    for inputs in calibration.fit + calibration.held_out:
        assert inputs[0].shape[1:] == (3, 8, 6)
        # JPEG and WebP lose a little.
        torch.testing.assert_close(inputs[0][:, 2], torch.full_like(inputs[0][:, 2], 200 / 255), atol=0.02, rtol=0)


def test_a_folder_becomes_grey_for_a_grey_model(folder: Path) -> None:
    assert read_calibration(folder, GREY).fit[0][0].shape[1:] == (1, 8, 6)


def test_images_are_cropped_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 18, 3), np.uint8)
    pixels[:, 6:12] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert bool((read_calibration(tmp_path, EXAMPLE).fit[0][0] == 1).all())


def test_resize_scales_before_the_crop(tmp_path: Path) -> None:
    pixels = np.zeros((8, 6, 3), np.uint8)
    pixels[2:6, 2:4] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    plain, zoomed = (read_calibration(tmp_path, EXAMPLE, resize=size).fit[0][0] for size in (None, (16, 12)))
    assert float(zoomed.mean()) > 2 * float(plain.mean())


def refusal(source: object, example: Inputs = EXAMPLE, **options: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        read_calibration(source, example, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_shapes_that_do_not_fit_name_both() -> None:
    message = refusal(torch.zeros(70, 3, 9, 6))
    assert "(N, 3, 8, 6)" in message
    assert "(70, 3, 9, 6)" in message
    assert "(70, 18)" in refusal(torch.zeros(70, 18))
    assert "(70, 4, 8, 6)" in refusal([torch.zeros(70, 4, 8, 6)])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_no_images(dtype: torch.dtype) -> None:
    said = refusal(torch.zeros(70, 3, 8, 6, dtype=dtype))
    assert str(dtype) in said
    assert "give an example that has them (--input FILE.py:NAME)" in said


def test_arrays_of_text() -> None:
    assert "<U1" in refusal(np.full((70, 3, 8, 6), "a"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_examples_are_numbered_as_in_the_source(bad: float) -> None:
    images = numbered(200)
    images[150, 1, 2, 3] = bad
    assert "example 150;" in refusal(images)
    assert "example 150;" in refusal(iter(images.split(16)))
    assert "example 150;" in refusal(TensorDataset(images))


@pytest.mark.parametrize("empty", [torch.zeros(0, 3, 8, 6), [], iter(()), [torch.zeros(0, 3, 8, 6)]])
def test_nothing(empty: object) -> None:
    assert "found none" in refusal(empty)


def test_an_empty_array_file(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.zeros((0, 3, 8, 6)))
    assert "found none" in refusal(tmp_path / "c.npy")


def test_files_that_are_missing_empty_or_unknown(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.npy")
    assert "found none in the folder" in refusal(tmp_path)
    (tmp_path / "c.csv").write_text("1,2")
    assert "'.csv'" in refusal(tmp_path / "c.csv")
    assert "pass it itself" in refusal("data.py:images")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not what it says", b"PK\x03\x04 cut off"])
def test_corrupt_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"c{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: expected")


def test_a_truncated_archive(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).random((70, 3, 8, 6)))
    path.write_bytes(path.read_bytes()[:5000])
    assert "cannot be read" in refusal(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "c.npz", images=np.array([{}], dtype=object))
    torch.save({"images": Path("x")}, tmp_path / "c.pt")
    for name in ("c.npy", "c.npz", "c.pt"):
        message = refusal(tmp_path / name)
        assert "cannot be read" in message or "found an array of object" in message


def test_archives_that_leave_a_choice(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", first=np.zeros(3), second=np.zeros(3))
    assert "first, second" in refusal(tmp_path / "c.npz")
    np.savez(tmp_path / "l.npz", labels=np.zeros(3))
    assert "labels" in refusal(tmp_path / "l.npz")


def test_an_image_that_is_too_large_is_told_in_our_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    monkeypatch.setattr(images, "MOST_PIXELS", 200)
    assert "expected an image of at most 200 pixels, found 24 x 16; remove or replace it" in refusal(folder)


def test_images_that_are_none(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"\x89PNG broken")
    assert str(folder / "bad.png") in refusal(folder)


def test_folders_for_models_that_take_no_images(folder: Path) -> None:
    assert "1 or 3" in refusal(folder, (torch.zeros(1, 4, 8, 6),))
    assert "takes 2" in refusal(folder, EXAMPLE * 2)
    assert "at least the model's 8x6" in refusal(folder, resize=(4, 4))


def test_too_few_or_unequal_inputs() -> None:
    assert "found 1" in refusal((numbered(70),), EXAMPLE * 2)
    assert "[60, 70]" in refusal((numbered(70), numbered(60)), EXAMPLE * 2)
    assert "[60, 70]" in refusal([(numbered(70), numbered(60))], EXAMPLE * 2)


def test_batches_and_sources_of_an_unknown_kind() -> None:
    assert "found str" in refusal(["text"])
    assert "found int" in refusal(7)
    assert "found object" in refusal([(object(),)])


def test_errors_of_a_loader_are_named() -> None:
    def failing() -> Iterator[Tensor]:
        yield numbered(4)
        raise KeyError("lost")

    assert "batch 1: reading it raised KeyError" in refusal(failing())


def test_bad_options() -> None:
    assert "mean: expected 1 or 3 numbers" in refusal(numbered(9), mean=(1.0, 2.0))
    assert "std: expected positive" in refusal(numbered(9), std=(0.0,))
    assert "limit" in refusal(numbered(9), limit=0)
    wrong = {
        "limit": "all", "batch": 2.5, "seed": 2**70, "mean": "half", "std": {"red": 1.0}, "resize": (8,), "memory": 1e9,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"^{name}: expected "):
            read_calibration(numbered(9), EXAMPLE, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mean", [0.5, [0.5], np.float32(0.5), torch.tensor(0.5), np.full(3, 0.5), torch.full((3,), 0.5)]
)
def test_a_number_stands_for_all_channels_and_numbers_may_be_in_an_array(mean: object) -> None:
    wanted = read_calibration(numbered(9), EXAMPLE, mean=(0.5, 0.5, 0.5))
    assert byte_equal(read_calibration(numbered(9), EXAMPLE, mean=mean), wanted)  # type: ignore[arg-type]


def test_the_keyword_arguments_are_the_fields_of_how_inputs_are_read() -> None:
    assert get_type_hints(ReadingOptions) == get_type_hints(Reading)


def test_how_inputs_are_read_is_one_value() -> None:
    how = {"limit": 70, "batch": 8, "seed": 3, "mean": (0.5,)}
    by_keyword = read_calibration(numbered(90), EXAMPLE, **how)  # type: ignore[arg-type]
    assert byte_equal(read_calibration(numbered(90), EXAMPLE, reading=Reading(**how)), by_keyword)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="reading: expected alone, found seed beside it"):
        read_calibration(numbered(90), EXAMPLE, reading=Reading(), seed=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        read_calibration(numbered(90), EXAMPLE, sed=1)  # type: ignore[call-arg]
