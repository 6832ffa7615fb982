"""What a device does for a run: ``python benchmarks/device.py [cuda] [--part example] [--limit 100]``.

The trained example at a quarter of its MACs on the processor and on the device, and from 256 inputs on the device (with ``--all``
on the processor as well) a ResNet-18 at half of them, a ResNet-50 at six tenths and a VGG-16 by ``separable``, each in a process
of its own, after the tests that need a device. Prints the seconds of stages, and how far the results of both are apart. Nothing
is exported or timed, and nothing of earlier runs is taken.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import network_and_inputs
from torch import Tensor, nn

import convrewrite
from convrewrite.loading import load_model
from convrewrite.places import described, let_go, place_of
from convrewrite.results import Result

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "fashion"


def example() -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """The network of the example, its calibration inputs, others to compare results on, and what is asked."""
    model = load_model(str(EXAMPLE / "fashion.pt"), factory=f"{EXAMPLE / 'model.py'}:fashion_resnet").model
    calibration, test = (_images(EXAMPLE / name) for name in ("calibration.npz", "test.npz"))
    return model, calibration, test, {"budget": {"macs": 0.25}, "any_speed": True}


def _images(path: Path) -> Tensor:
    with np.load(path) as arrays:
        images = torch.from_numpy(arrays["images"])
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return images if images.dim() == 4 else images[:, None]


def shaped(network: str, **asked: Any) -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """A network of this shape with random weights, at 224 x 224."""
    model, images = network_and_inputs(network, 256, 224)
    return model, images, images[:32], asked


PARTS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor, dict[str, Any]]]] = {
    "example": example,
    "resnet18": partial(shaped, "resnet18", budget={"macs": 0.5}),
    "resnet50": partial(shaped, "resnet50", budget={"macs": 0.6}),
    "vgg16": partial(shaped, "vgg16", rules=["separable"]),
}


def ran(model: nn.Module, images: Tensor, asked: dict[str, Any], device: str) -> Result:
    """One run, printed."""
    started = time.perf_counter()
    given = {"rules": ["balanced"]} | asked
    result = convrewrite.optimize(
        model, images[:1], calibration=images, measure=False, resume=False, device=device, **given
    )
    seconds = time.perf_counter() - started
    stages = sorted(result.report.seconds.items(), key=lambda stage: -stage[1])
    print(f"{device}: {seconds:.1f} s: " + ", ".join(f"{name} {spent:.1f}" for name, spent in stages), flush=True)
    told = [f"{row.name}: error {row.relative_error:.4f}, KL {row.kl}" for row in result.report.fidelity]
    print(f"  macs {result.report.totals.macs.ratio:.4f}; {'; '.join(told)}")
    print(*(f"  {note}" for note in result.report.notes), sep="\n", flush=True)
    return result


@torch.no_grad()
def apart(a: Result, b: Result, original: nn.Module, images: Tensor) -> str:
    """How far two results are apart, beside how far the first is from the original."""
    first, second, wanted = (torch.cat([model(x) for x in images.split(32)]) for model in (a.model, b.model, original))
    options = [[str(site.option) for site in result.plan.sites] for result in (a, b)]
    same = sum(one == other for one, other in zip(*options, strict=True))
    top = float((first.argmax(1) == second.argmax(1)).float().mean())
    return (
        f"apart: options of {same} of {len(options[0])} sites are the same, relative error {_error(second, first):.3g}, KL "
        f"{_kl(first, second):.3g}, top class equal {top:.4f}; from the original: {_error(first, wanted):.3g} and "
        f"{_error(second, wanted):.3g}, KL {_kl(wanted, first):.3g} and {_kl(wanted, second):.3g}"
    )


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _kl(p: Tensor, q: Tensor) -> float:
    log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def part(name: str, device: str, both: bool) -> None:
    """One network."""
    model, images, test, asked = PARTS[name]()
    place = place_of(device)
    print(f"{name} on {described(place)}, {torch.get_num_threads()} threads", flush=True)
    there = ran(model, images, asked, device)
    if place.type == "cuda":
        print(f"  at most {torch.cuda.max_memory_allocated(place) / 2**30:.2f} GB there")
    let_go(place)
    if both or name == "example":
        here = ran(model, images, asked, "cpu")
        print(apart(here, there, model, test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="auto")
    parser.add_argument("--part", choices=[*PARTS, "tests"])
    parser.add_argument("--all", action="store_true", help="run all on the processor, too")
    parser.add_argument("--limit", type=float, default=100, help="seconds that each part may take")
    arguments = parser.parse_args()
    if arguments.part in PARTS:
        part(arguments.part, arguments.device, arguments.all)
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "tests/pipeline/test_device.py", "-k", "real"]
    for name in (arguments.part,) if arguments.part else ("tests", *PARTS):
        words = [sys.executable, __file__, arguments.device, "--part", name, *(["--all"] if arguments.all else [])]
        started = time.perf_counter()
        try:
            subprocess.run(tests if name == "tests" else words, cwd=ROOT, timeout=arguments.limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: ended after {arguments.limit:.0f} s")
        print(f"{name}: {time.perf_counter() - started:.0f} s in all\n", flush=True)


if __name__ == "__main__":
    main()
