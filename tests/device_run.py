"""Runs on the pretended device beside the same runs at home: reads a case and its words a line, prints what came of it as JSON.

The modes that make the device hold for a whole thread; so each runs in a process of its own, forked from this one, which has
imported all. They slow it down several times; so the networks are small, and steps are few.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import torch
from pretend_device import AWAY, Pretended, pretended
from short_fits import short_fits
from torch import Tensor, nn

import convrewrite
from convrewrite.calibration import choose
from convrewrite.fitting import stages
from convrewrite.pipeline import export_result, profile, quantise, verify
from convrewrite.results import Result
from convrewrite.rewriting import site_inputs
from convrewrite.tuning import refining

PLAIN = {"measure": False, "resume": False}


class Residual(nn.Module):
    """Convolutions of three kinds, with BatchNorm, a skip connection and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W)`` -> ``(N, 5)`` logits."""
        x = self.first(x)
        y = torch.relu(self.left(x))
        logits: Tensor = self.last(torch.relu(self.right(y) + x).mean((2, 3)))
        return logits


class Bound(Residual):
    """One whose forward makes tensors on the processor."""

    def forward(self, x: Tensor) -> Tensor:
        """As that of :class:`Residual`."""
        return super().forward(x + torch.full((3, 1, 1), 0.1))


def network() -> Residual:
    """The same one at every call, with statistics as after training."""
    torch.manual_seed(0)
    model = Residual().eval()
    norm = model.first[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.uniform_(-0.1, 0.1)
        norm.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def images(count: int = 24) -> Tensor:
    """Smooth ones, of several frequencies."""
    generator = torch.Generator().manual_seed(1)
    coarse, fine = (torch.randn(count, 3, size, size, generator=generator) for size in (4, 12))
    return nn.functional.interpolate(coarse, size=12, mode="bilinear") + 0.1 * fine


CASES = {
    "ratio": {"rules": ["separable"]},
    "budget": {"rules": ["separable"], "budget": {"macs": 0.6}, "refine": True},
    "keep": {"rules": ["asymmetric"], "keep": {"error": 0.3}, "fast": True},
    "synthetic": {"rules": ["separable"], "calibration": None},
    "weights": {"rules": ["separable"], "calibration": "weights"},
}


def run(case: str, device: str | None, model: nn.Module) -> Result:
    """A case at home or away."""
    asked = {"calibration": images(), **CASES[case]}
    return convrewrite.optimize(model, torch.zeros(1, 3, 12, 12), device=device, **asked, **PLAIN)  # type: ignore[arg-type]


def recovered(device: str | None, model: nn.Module, result: Result) -> Result:
    """A few steps of recovery."""
    x = torch.zeros(1, 3, 12, 12)
    return convrewrite.recover(result, model, images(), x, epochs=4, batch=8, measure=False, device=device)


def looked_at(folder: Path) -> dict[str, object]:
    """What else is done with a model that lies there: each as at home, and the model stays where it lies."""
    x, here = torch.zeros(1, 3, 12, 12), network()
    result = convrewrite.optimize(here, x, ["separable"], images(), resume=False, refine=False)
    result.save(folder / "out")
    result.save(folder / "other")
    rows = list(convrewrite.analyze(here, x))
    with pretended() as device:
        model = network().to(AWAY)
        found: dict[str, object] = {
            "analyze": list(convrewrite.analyze(model, x)) == rows,
            "profile": profile(model, x, ["separable"], graphs=folder / "graphs") is None,
            "export": export_result(folder / "out", model, x, images(), to=["torch_export"]).unwritten,
            "quantise": len(quantise(folder / "other", model, x, images())),
            "verify": verify(model, folder / "out" / "model.onnx", x, names=("a", "b")).parity.passed,
            "itself": verify(model, here, x, names=("a", "b")).parity.passed,
        }
        return found | {"model stays": all(device.is_away(p) for p in model.parameters())}


def facts(home: Result, away: Result, device: Pretended) -> dict[str, object]:
    """What a test looks at."""
    x = images()
    with torch.no_grad():
        a, b, original = home.model(x), away.model(x), network()(x)
    return {
        "same plan": [s.option for s in home.plan.sites] == [s.option for s in away.plan.sites],
        "apart": float((a - b).norm() / original.norm()),
        "rewritten": float((a - original).norm() / original.norm()),
        "notes": [note for note in away.report.notes if note not in home.report.notes],
        "counts": device.counts,
    }


def main(case: str, *words: str) -> dict[str, object]:
    """Words: ``large``: all sites count as large; ``float32`` for a device without float64; ``most=N`` for one of so many bytes;
    ``there``: the model lies there, ``bound``: it runs at home alone; ``recover``: the result is recovered, there as at home;
    ``look``: see :func:`looked_at`."""
    if "look" in words:
        with tempfile.TemporaryDirectory() as folder:
            return looked_at(Path(folder))
    site_inputs.LARGE = 1 if "large" in words else site_inputs.LARGE
    case_home = run(case, None, network())
    if "recover" in words:
        with pretended() as device:
            away = recovered("auto", network(), case_home)
            lies = {device.is_away(p) for p in away.model.parameters()}
        case_home = recovered("cpu", network(), case_home)
        return facts(case_home, away, device) | {"result away": sorted(lies)}
    most = next((int(word.partition("=")[2]) for word in words if word.startswith("most=")), None)
    with pretended(float64="float32" not in words, most=most) as device:
        if "there" in words:
            model = network().to(AWAY)
            away = run(case, None, model)
            lies = {device.is_away(p) for p in away.model.parameters()}
            stays = all(device.is_away(p) for p in model.parameters())
            away.model.to("cpu")
        else:
            model = network()
            model.__class__ = Bound if "bound" in words else Residual
            away = run(case, "auto", model)
            lies, stays = {device.is_away(p) for p in away.model.parameters()}, True
    return facts(case_home, away, device) | {"result away": sorted(lies), "model stays": stays}


def serve() -> None:
    """Until the input ends; null for a case that failed, whose traceback goes to the errors."""
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                print(json.dumps(main(*line.split())), flush=True)
            except BaseException:
                traceback.print_exc()
                print("null", flush=True)
            os._exit(0)
        os.wait()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    choose.synthesise = partial(choose.synthesise, count=32, steps=40)  # type: ignore[assignment]
    refining.LEAST_STEPS, refining.STEPS_OF_EFFECT = 5, 0
    refining.ROUNDING = 0.0  # steps in float32: the processor alone takes bfloat16, where it has units for it
    stages._minimise = short_fits(stages._minimise)
    serve()
