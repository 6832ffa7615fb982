"""A folder of images as tensors of the size and the channels a model expects."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from convrewrite.errors import CalibrationError
from convrewrite.process import quiet

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What a file of such a name may hold, as Pillow calls it. Pillow goes by the content, and has readers that start other programs:
for PostScript, which is a program itself, Ghostscript."""

MOST_FILES = 2_000_000
"""Most files in a folder and those below it, images or not; ImageNet has 1.4 million."""

MOST_PIXELS = 89_478_485
"""Most pixels of an image, as stored or as scaled: Pillow's own limit, beyond which it suspects an attack."""

WHITEST = 2**16 - 1
"""The largest number of a grey image that is stored in more than a byte per pixel."""

_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, MemoryError, struct.error)
"""Exceptions that Pillow's readers raise for a damaged file."""

_MODES = {1: "L", 3: "RGB"}


def list_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """All images under ``folder``, at any depth, also behind links, sorted by path, and what else is there. Raises
    CalibrationError where there are none."""
    found: list[Path] = []
    looked_at = 0
    for parent, names in _walked(folder):
        looked_at += len(names)
        if looked_at > MOST_FILES:
            raise CalibrationError(f"{folder}: expected at most {MOST_FILES} files in the folder; name a smaller one")
        found += [Path(parent, name) for name in names]
    images = sorted(path for path in found if _is_called_image(path.name) and path.is_file())
    if not images:
        raise CalibrationError(f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), found none in the folder")
    return images, sorted(set(found) - set(images))


def _is_called_image(name: str) -> bool:
    """Whether a file is one by its name. What macOS keeps beside a file on other systems' disks has its name behind ``._``."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")


def _walked(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder below, with the names in it that are no folders. Links are followed, as classes of a data set may lie
    elsewhere; each folder is entered once, however it is reached, as links may form a circle."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        yield parent, names


def _unreadable(error: OSError) -> None:
    """Let folders vanish meanwhile, but do not silently leave out images that may not be read."""
    if not isinstance(error, FileNotFoundError):
        raise CalibrationError(
            f"{error.filename}: expected a folder of images, but it cannot be read ({error.strerror}); "
            "let it be read, or name another folder"
        ) from error


def read_images(paths: Sequence[Path], shape: torch.Size, resize: tuple[int, int] | None) -> Tensor:
    """The images as uint8 ``(N, C, H, W)``, where ``shape`` is the model's ``(C, H, W)``; ``(N, H, W, C)`` for ``(H, W, C)``.

    Each image is scaled until it covers ``resize`` (without it: H x W), then H x W are cut from its centre.
    Raises CalibrationError for a file that is no image, a channel count other than 1 or 3, or a ``resize`` below H x W.
    """
    last = len(shape) == 3 and shape[2] in _MODES and shape[0] not in _MODES
    if len(shape) != 3 or not (last or shape[0] in _MODES):
        raise CalibrationError(
            f"a folder of images gives inputs (1 or 3, height, width), the model expects {tuple(shape)}; "
            "give the calibration inputs as .npy, .npz or a tensor"
        )
    height, width, channels = shape if last else (*shape[1:], shape[0])
    cover = resize or (height, width)
    if cover[0] < height or cover[1] < width:
        raise CalibrationError(
            f"resize: expected at least the model's {height}x{width}, which is cut from the centre, found "
            f"{cover[0]}x{cover[1]}; resize to more, or say that the model takes less: --input 1x{channels}x{cover[0]}x{cover[1]}"
        )
    pixels = np.empty((len(paths), height, width, channels), np.uint8)
    for row, path in zip(pixels, paths, strict=True):
        row[:] = _read_image(path, _MODES[channels], cover, (height, width)).reshape(height, width, channels)
    images = torch.from_numpy(pixels)
    return images if last else images.permute(0, 3, 1, 2).contiguous()


def _read_image(path: Path, mode: str, cover: tuple[int, int], size: tuple[int, int]) -> "np.typing.NDArray[np.uint8]":
    image_type = _pillow()
    try:
        with quiet():  # Pillow warns of what is refused here
            opened = image_type.open(path, formats=_formats(image_type))
        with opened as image:
            _refuse_large(path, "found", image.size)
            _refuse_large(path, f"scaled to cover {cover[0]}x{cover[1]} it would have", _covering(image.size, cover))
            return np.asarray(_fit(_of_bytes(image).convert(mode), cover, size))
    except CalibrationError:
        raise
    except (*_BROKEN, image_type.DecompressionBombError, image_type.DecompressionBombWarning) as error:
        raise CalibrationError(
            f"{path}: expected an image, but it cannot be read: {error}; remove or replace it"
        ) from error


def _formats(pillow: ModuleType) -> list[str]:
    """Those of :data:`FORMATS` that the installed Pillow reads."""
    pillow.init()
    return [name for name in FORMATS if name in pillow.OPEN]


def _of_bytes(image: "Image") -> "Image":
    """An image whose pixels are bytes: the upper eight of 16 bits, which Pillow itself takes for colours.

    Grey values above 255 it would clip, so that nearly all is white.
    """
    if not image.mode.startswith("I"):
        return image
    numbers = np.asarray(image)
    if image.mode == "I" and numbers.max() <= 255:  # bytes that are stored in 32 bits
        return image
    return _pillow().fromarray((numbers.clip(0, WHITEST) >> 8).astype(np.uint8))


def _covering(found: tuple[int, int], cover: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image of ``found`` (width, height) when it is scaled to cover ``cover`` (height, width)."""
    width, height = found
    scale = max(cover[0] / height, cover[1] / width)
    return max(cover[1], round(width * scale)), max(cover[0], round(height * scale))


def _refuse_large(path: Path, found: str, size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < 1 or width * height > MOST_PIXELS:
        raise CalibrationError(
            f"{path}: expected an image of at most {MOST_PIXELS} pixels, {found} {width} x {height}; remove or replace it"
        )


def _fit(image: "Image", cover: tuple[int, int], size: tuple[int, int]) -> "Image":
    """Scaled to cover ``cover``, then ``size`` (both height, width) cut from the centre."""
    scaled = _covering(image.size, cover)
    if scaled != image.size:
        image = image.resize(scaled)
    left, top = (scaled[0] - size[1]) // 2, (scaled[1] - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ImportError as error:
        raise CalibrationError("reading a folder of images needs Pillow: pip install pillow") from error
    return Image
