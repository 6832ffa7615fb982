"""What refinement gains on the networks that fidelity is measured on, with 1,024 images and no labels.

    python benchmarks/refinement.py [--networks example resnet20 vgg] [--seeds 0 1] [--macs 0.5 0.25 0.15 0.1]
           [--starts FOLDER] [--results FILE] [--device cuda]

Every network is planned and fitted to the unlabelled images of the example as ``optimize`` does it, without refinement, and then
refined as ``optimize`` does it. ``--starts`` has results of the first half, saved as NETWORK-SEED-MACS, which are made there
where they are missing. Measured before and after: points of top-1 lost and KL on the 10,000 test images of Fashion-MNIST, KL on
the held-out calibration images, and seconds of one thread's processor time, which tell little where ``--device`` is another. Rows
are added to the file of results as they come.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from training import FASHION, RECIPES, load, load_split

import convrewrite
from convrewrite.calibration import calibrate, channels_last
from convrewrite.meanings import tell
from convrewrite.modules import tally
from convrewrite.tuning import Refinement, refine

RESULTS = Path(__file__).parent / "results" / "refinement.json"
BATCH = 250
"""Test images that are run at a time."""


@dataclass(frozen=True)
class Row:
    """One network at one part of its MACs: points of top-1 lost, and KL in nats, before and after."""

    network: str
    seed: int
    macs: float
    lost_before: float
    lost_after: float
    kl_before: float
    kl_after: float
    held_out_before: float
    held_out_after: float
    steps: int
    seconds: float
    device: str


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def divergence(original: Tensor, found: Tensor) -> float:
    terms = original.softmax(1) * (original.log_softmax(1) - found.log_softmax(1))
    return float(terms.sum(1).mean())


def start(folder: Path, model: nn.Module, image: Tensor, macs: float) -> nn.Module:
    """The fitted result in a folder, which is made where there is none."""
    if not folder.exists():
        data = str(FASHION / "calibration.npz")
        convrewrite.optimize(model, image, ["balanced"], data, {"macs": macs}, refine=False, measure=False).save(folder)
    return convrewrite.load(folder, model).eval()


def task_of(model: nn.Module, rewritten: nn.Module, image: Tensor) -> Refinement:
    """What ``optimize`` would refine."""
    data = calibrate(model, (image,), str(FASHION / "calibration.npz"))
    fit, held_out = channels_last(model, data.fit), channels_last(model, data.held_out)
    modules = dict(rewritten.named_modules())
    sites = {
        name: None
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and type(modules[name]) is not nn.Conv2d
    }
    return Refinement(
        original=model, rewritten=rewritten, sites=sites, fit=fit, held_out=held_out, meanings=tell(model, held_out),
        macs=tally(model, (image,)).macs, memory=4 << 30,
    )  # fmt: skip


def moved(task: Refinement, device: str) -> Refinement:
    """The task, with all of it on a device."""
    fit, held_out = (
        [tuple(tensor.to(device) for tensor in inputs) for inputs in batches] for batches in (task.fit, task.held_out)
    )
    return replace(
        task, original=task.original.to(device), rewritten=task.rewritten.to(device), fit=fit, held_out=held_out
    )


def measure(network: str, seed: int, macs: float, starts: Path, device: str) -> Row:
    images, labels = load_split("t10k")
    model = load(network, seed)
    rewritten = start(starts / f"{network}-{seed}-{macs:g}", model, images[:1], macs)
    task = moved(task_of(model, rewritten, images[:1]), device)
    images, labels = images.to(device), labels.to(device)
    wanted = logits(model, images)
    right = float((wanted.argmax(1) == labels).float().mean())

    def shown() -> tuple[float, float]:
        found = logits(rewritten, images)
        lost = right - float((found.argmax(1) == labels).float().mean())
        return round(100 * lost, 2), round(divergence(wanted, found), 5)

    before, began = shown(), time.process_time()
    refined = refine(task)
    seconds, after = time.process_time() - began, shown()
    return Row(
        network, seed, macs, before[0], after[0], before[1], after[1], round(refined.before, 5), round(refined.after, 5),
        refined.steps, round(seconds), device,
    )  # fmt: skip


def add(row: Row, path: Path) -> list[dict[str, object]]:
    """The rows of the file, this one among them instead of an earlier one of the same network and MACs."""
    known = json.loads(path.read_text()) if path.exists() else []
    key = (row.network, row.seed, row.macs)
    rows = [old for old in known if (old["network"], old["seed"], old["macs"]) != key] + [asdict(row)]
    rows.sort(key=lambda r: (-r["macs"], r["network"], r["seed"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.5, 0.25, 0.15, 0.1])
    parser.add_argument("--starts", type=Path, default=Path("starts"), help="folder of results that were not refined")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for macs in arguments.macs:
        for network in arguments.networks:
            for seed in arguments.seeds:
                row = measure(network, seed, macs, arguments.starts, arguments.device)
                print(row, flush=True)
                rows = add(row, arguments.results)
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
