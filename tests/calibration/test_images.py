"""Images are read as what they show, however many bits a pixel is stored in."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convrewrite.calibration.images import list_images, read_images
from convrewrite.errors import CalibrationError


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_grey_images_of_16_bits_show_what_those_of_8_bits_do(tmp_path: Path, channels: int, order: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray((grey.astype(np.uint16) * 257).astype(order)).save(tmp_path / "16.png")
    few, many = read_images([tmp_path / "8.png", tmp_path / "16.png"], torch.Size((channels, 16, 16)), None)
    assert len(few.unique()) == 256
    assert torch.equal(few, many)


def test_bytes_stored_in_32_bits_stay_what_they_are(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "32.tiff")
    few, many = read_images([tmp_path / "8.png", tmp_path / "32.tiff"], torch.Size((1, 16, 16)), None)
    assert torch.equal(few, many)


def test_a_program_called_an_image_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, ran = tmp_path / "gs", tmp_path / "ran"
    script.write_text(f"#!/bin/sh\n: > '{ran}'\n")
    script.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it is looked for once
    image = tmp_path / "a.png"
    image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")
    with pytest.raises(CalibrationError, match=r"a\.png: expected an image, but it cannot be read"):
        read_images([image], torch.Size((3, 4, 4)), None)
    assert not ran.exists()


def test_folders_behind_links_are_read_once_though_links_go_round(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder in (data / "cats", elsewhere / "dogs"):
        folder.mkdir(parents=True)
        Image.new("L", (4, 4)).save(folder / "one.png")
    (data / "links").symlink_to(elsewhere, target_is_directory=True)
    (data / "links again").symlink_to(elsewhere, target_is_directory=True)
    (data / "cats" / "up").symlink_to(data, target_is_directory=True)
    (elsewhere / "back").symlink_to(data / "cats", target_is_directory=True)
    (elsewhere / "nowhere").symlink_to(tmp_path / "gone")
    images, others = list_images(data)
    assert [str(path.relative_to(data)) for path in images] == ["cats/one.png", "links/dogs/one.png"]
    assert [path.name for path in others] == ["nowhere"]


def test_what_macos_keeps_beside_images_is_no_image(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "one.png")
    (tmp_path / "._one.png").write_bytes(b"\x00\x05\x16\x07")
    images, others = list_images(tmp_path)
    assert [path.name for path in images] == ["one.png"] and [path.name for path in others] == ["._one.png"]
