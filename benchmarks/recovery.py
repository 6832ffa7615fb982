"""What recovery by distillation brings: ``python benchmarks/recovery.py NETWORK SEED MACS --start FOLDER [--device cuda]``.

A result of ``optimize`` on one of the networks of ``training.py``, in FOLDER, is recovered on the 60,000 unlabelled training
images of Fashion-MNIST, with the recipe that ``recover`` has, for as many steps as ten minutes of two quiet cores make (STEPS).
``--weights-only`` starts from the same plan's factors of the weights alone. The labels of the 10,000 test images tell points
of top-1 that are lost; nothing was chosen by them. Rows go into ``--results``, one for each network, seed, budget, start and
recipe.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from training import RECIPES, SEEDS, load, load_split

import convrewrite
from convrewrite.results import PLAN, read_plan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recovery.json"

STEPS = {"example": 6_000, "resnet20": 6_000, "vgg": 9_000}
"""Steps that ten minutes of two quiet cores make at 0.25 of the MACs, where two do 1.7 times what one does: by the
seconds of one core that a step takes where the outputs alone count, 0.135 for ResNet-20 and 0.081 for the plain network; with
features, as the recipe has them, it takes 1.6 to 2 times as long. ``python benchmarks/recovery.py NETWORK 1 0.25 --start FOLDER
--time`` prints the average seconds of a step."""


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    model = copy.deepcopy(model).eval().to(device)
    pairs = zip(images.split(500), labels.split(500), strict=True)
    with torch.no_grad():
        right = [(model(x.to(device)).argmax(1) == y.to(device)).sum() for x, y in pairs]
    return float(torch.stack(right).sum()) / len(images)


def weights_only(original: nn.Module, folder: Path, image: Tensor) -> convrewrite.Result:
    """The same plan, its factors from the weights alone."""
    return convrewrite.apply(original, image, read_plan(folder / PLAN), "weights", measure=False)


def kind_of(start: Path) -> str:
    """Whether a saved result was refined after its fit, according to its report."""
    return "refined" if "refined in " in (start / "report.json").read_text(encoding="utf-8") else "fitted"


def recovered_row(asked: argparse.Namespace) -> dict[str, object]:
    original, start = load(asked.network, asked.seed), Path(asked.start)
    images, _ = load_split("train")
    test, labels = load_split("t10k")
    came = weights_only(original, start, images[:1]) if asked.weights_only else start
    model = came.model if isinstance(came, convrewrite.Result) else convrewrite.load(came, original)
    held_out = 2_048  # of 60,000, as recover holds out
    epochs = asked.steps / ((len(images) - held_out) // asked.batch)
    base, before = (accuracy(one, test, labels, asked.device) for one in (original, model))
    started = time.perf_counter()
    result = convrewrite.recover(
        came, original, images, images[:1], epochs=epochs, batch=asked.batch, measure=False, **asked.options
    )
    seconds, found = time.perf_counter() - started, result.report.recovered
    after = accuracy(result.model, test, labels, asked.device)
    assert found is not None
    return {
        "network": asked.network, "seed": asked.seed, "macs": asked.macs,
        "start": "weights only" if asked.weights_only else kind_of(start), "recipe": asked.recipe,
        "steps": found.steps, "kept_step": found.kept_step, "device": asked.device, "seconds": round(seconds, 1),
        "original_top1": base, "lost_before": round(100 * (base - before), 2), "lost": round(100 * (base - after), 2),
        "held_out_before": found.before, "held_out": found.after, "settings": found.settings, "ended": found.ended,
    }  # fmt: skip


def write(row: dict[str, object], path: Path) -> None:
    """Put a row beside the others, in the place of an earlier one of the same run."""
    rows = json.loads(path.read_text()) if path.exists() else []
    keys = ("network", "seed", "macs", "start", "recipe")
    rows = [other for other in rows if any(other[key] != row[key] for key in keys)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sorted([*rows, row], key=lambda r: [str(r[key]) for key in keys]), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(RECIPES))
    parser.add_argument("seed", type=int, choices=SEEDS)
    parser.add_argument("macs", type=float)
    parser.add_argument("--start", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--time", action="store_true", help="Only tell the processor's seconds of a step.")
    parser.add_argument("--options", type=json.loads, default={}, help="Other settings of recover, as JSON.")
    parser.add_argument("--recipe", default="as it is", help="What the row calls the settings.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    asked.steps = asked.steps or (100 if asked.time else STEPS[asked.network])
    if asked.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        torch.set_num_threads(1)  # several runs share the machine
    started = time.process_time()
    row = recovered_row(asked)
    if asked.time:
        print(
            f"{(time.process_time() - started) / asked.steps:.3f} s of the processor a step, all of the run shared out"
        )
        return
    write(row, asked.results)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
