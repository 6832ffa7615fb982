"""Train the detector of this folder: ``python examples/detection/train.py OUT.pt [--steps 2500] [--device cuda]``.

Some minutes on a processor. Each shape belongs to the cells near its centre, at the stride that its size asks for; there the
overlap of the boxes (GIoU) and the distribution of each side are trained, and everywhere the scores. Weights are averaged
over steps and written in half precision, under the key ``ema``.
"""

import argparse
import copy
from pathlib import Path

import torch
from evaluate import mean_average_precision
from model import BINS, SIZE, STRIDES, Detector, anchors_of, detector
from shapes import draw
from torch import Tensor, nn

BATCH, IMAGES, RATE = 16, 3000, 4e-3
NEAR = 1.6
"""Strides from a shape's centre within which cells belong to it."""

REACHES = (18.0, 30.0)
"""Sides in pixels up to which a box belongs to the first two heads."""


def wanted(boxes: list[Tensor], anchors: Tensor, strides: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(N, C, cells)``, distances to a box's four sides in strides ``(N, 4, cells)``, and which cells have one."""
    cells = anchors.shape[1]
    scores = torch.zeros(len(boxes), classes, cells)
    sides, held = torch.zeros(len(boxes), 4, cells), torch.zeros(len(boxes), cells, dtype=torch.bool)
    centres = anchors * strides
    for index, of_image in enumerate(boxes):
        for kind, *corners in of_image.tolist():
            low, high = torch.tensor(corners[:2])[:, None], torch.tensor(corners[2:])[:, None]
            side = float((high - low).max())
            stride = STRIDES[sum(side > reach for reach in REACHES)]
            distance = (centres - (low + high) / 2).abs().amax(0)
            mine = (strides[0] == stride) & (distance <= NEAR / 2 * stride)
            scores[index, int(kind), mine] = 1
            found = torch.cat((centres - low, high - centres)) / strides
            sides[index][:, mine] = found[:, mine].clamp(0, BINS - 1.01)
            held[index] |= mine
    return scores, sides, held


def loss_of(maps: list[Tensor], scores: Tensor, sides: Tensor, held: Tensor) -> Tensor:
    """Focal loss of the scores, GIoU of the boxes and cross-entropy of the distances (Generalized Focal Loss)."""
    flat = torch.cat([x.flatten(2) for x in maps], 2)
    boxes, found = flat.split((4 * BINS, scores.shape[1]), 1)
    count = held.sum().clamp(min=1)
    error = nn.functional.binary_cross_entropy_with_logits(found, scores, reduction="none")
    weight = (found.sigmoid() - scores).abs().square()
    logits = boxes.unflatten(1, (4, BINS)).permute(0, 3, 1, 2)[held]  # (cells, 4, BINS)
    target = sides.permute(0, 2, 1)[held]
    distances = logits.softmax(2) @ torch.arange(BINS, dtype=logits.dtype, device=logits.device)
    lower = target.floor().long()
    part = target - lower
    rows = logits.log_softmax(2)
    shape = -(
        rows.gather(2, lower[..., None])[..., 0] * (1 - part) + rows.gather(2, lower[..., None] + 1)[..., 0] * part
    )
    return 4 * (weight * error).sum() / count + 2 * (1 - giou(distances, target)).mean() + 0.5 * shape.mean()


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes ``(..., 4)`` about one centre (Rezatofighi et al. 2019)."""
    both = (torch.minimum(a, b)[..., :2] + torch.minimum(a, b)[..., 2:]).prod(-1)
    hull = (torch.maximum(a, b)[..., :2] + torch.maximum(a, b)[..., 2:]).prod(-1)
    union = (a[..., :2] + a[..., 2:]).prod(-1) + (b[..., :2] + b[..., 2:]).prod(-1) - both
    return both / union - (hull - union) / hull


def trained(steps: int, device: str) -> Detector:
    torch.manual_seed(0)
    model = detector().to(device).train()
    for head in model.model[-1].cv3:
        nn.init.constant_(head[-1].bias, -4.6)
    images, boxes = draw(IMAGES, seed=1)
    anchors, strides = anchors_of([(SIZE // stride, SIZE // stride) for stride in STRIDES])
    targets = wanted(boxes, anchors, strides, model.model[-1].nc)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99), use_buffers=True
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        batch, (scores, sides, held) = images[rows], (part[rows] for part in targets)
        if mirrored:
            batch, scores, sides, held = batch.flip(3), *_mirrored(scores, sides, held)
        loss = loss_of(model(batch.to(device)), scores.to(device), sides.to(device), held.to(device))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimiser.step()
        schedule.step()
        averaged.update_parameters(model)
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return copy.deepcopy(averaged.module).cpu().eval()


def _mirrored(scores: Tensor, sides: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets of images that are seen in a mirror: columns of cells, and left and right, change places."""
    sizes = [(SIZE // stride) ** 2 for stride in STRIDES]
    order = torch.cat(
        [
            torch.arange(size).view(SIZE // stride, -1).flip(1).flatten() + sum(sizes[:index])
            for index, (size, stride) in enumerate(zip(sizes, STRIDES, strict=True))
        ]
    )
    return scores[..., order], sides[..., order][:, [2, 1, 0, 3]], held[..., order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    model = trained(arguments.steps, arguments.device)
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save({"model": None, "ema": state}, arguments.out)
    print(f"mAP@50 of 500 images: {mean_average_precision(model, *draw(500, seed=3)):.4f}")


if __name__ == "__main__":
    main()
