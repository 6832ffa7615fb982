"""How well detectors find the shapes: ``python examples/detection/evaluate.py [FOLDER_OR_ONNX ...]``.

Mean average precision at an overlap of 0.5 (mAP@50) on 500 images that nothing was trained or fitted on, of the trained
detector and of every result that is named.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from model import CLASSES, Detector, detector
from shapes import draw
from torch import Tensor

HERE = Path(__file__).parent
OVERLAP = 0.5
LEAST, MOST = 0.05, 50
"""Score below which nothing is a detection, and how many candidates of an image are looked at."""

Predict = Callable[[Tensor], Tensor]


def trained() -> Detector:
    """The detector of this folder."""
    model = detector()
    state = torch.load(HERE / "best.pt", weights_only=True)["ema"]
    model.load_state_dict(
        {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    )
    return model.eval()


@torch.no_grad()
def mean_average_precision(predict: Predict, images: Tensor, boxes: list[Tensor]) -> float:
    """The mean over classes of the area under precision by recall."""
    found = [one for batch in images.split(50) for one in map(suppressed, predict(batch))]
    return sum(_average_precision(found, boxes, kind) for kind in range(len(CLASSES))) / len(CLASSES)


def suppressed(output: Tensor) -> Tensor:
    """Detections ``(n, 6)`` of one image's output ``(4 + C, cells)``: class, score and corners, without those that overlap a
    better one of their class (non-maximum suppression)."""
    scores, kinds = output[4:].max(0)
    held = scores.topk(min(MOST, len(scores))).indices
    held = held[scores[held] > LEAST]
    scores, kinds, centre, sides = scores[held], kinds[held], output[:2, held].T, output[2:4, held].T
    corners = torch.cat((centre - sides / 2, centre + sides / 2), 1)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [other for other in kept if kinds[other] == kinds[index]]
        if not rivals or float(overlaps(corners[index], corners[rivals]).max()) <= OVERLAP:
            kept.append(index)
    return torch.cat((kinds[kept, None].float(), scores[kept, None], corners[kept]), 1)


def overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of a box ``(4,)`` with others ``(n, 4)``."""
    shared = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1)
    return shared / ((box[2:] - box[:2]).prod() + areas - shared)


def _average_precision(found: list[Tensor], boxes: list[Tensor], kind: int) -> float:
    claims = [(float(row[1]), image, row[2:]) for image, rows in enumerate(found) for row in rows if row[0] == kind]
    truths = [of_image[of_image[:, 0] == kind, 1:] for of_image in boxes]
    met: list[set[int]] = [set() for _ in truths]
    right: list[bool] = []
    for _, image, corners in sorted(claims, key=lambda claim: -claim[0]):
        shares = overlaps(corners, truths[image])
        best = int(shares.argmax()) if len(shares) else -1
        is_hit = best >= 0 and float(shares[best]) >= OVERLAP and best not in met[image]
        if is_hit:
            met[image].add(best)
        right.append(is_hit)
    hit = torch.tensor(right, dtype=torch.bool)
    hits = hit.cumsum(0)
    precision = hits / torch.arange(1, len(hit) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float(best_from_here[hit].sum() / sum(len(truth) for truth in truths))


def predictor(source: Path) -> Predict:
    """An ONNX file, or the ``model.pt`` of a folder of results: neither needs the tool that made it."""
    if source.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(source))
        name = session.get_inputs()[0].name
        return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    return torch.load(source / "model.pt", weights_only=False)


def main(sources: list[Path]) -> None:
    images, boxes = draw(500, seed=3)
    print(f"{'the trained detector':40} mAP@50 {mean_average_precision(trained(), images, boxes):.4f}")
    for source in sources:
        print(f"{source!s:40} mAP@50 {mean_average_precision(predictor(source), images, boxes):.4f}")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
