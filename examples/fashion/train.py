"""Train the example from nothing: ``python examples/fashion/train.py`` writes fashion.pt beside this file.

Seeded; a run that was interrupted goes on from its last epoch. Needs Fashion-MNIST (Debian: dataset-fashion-mnist).
"""

import argparse
from pathlib import Path

import torch
from data import load_split
from model import fashion_resnet
from rich.progress import track
from torch import Tensor, nn

HERE = Path(__file__).parent


def augment(images: Tensor) -> Tensor:
    """Shift each image by up to two pixels and mirror half of them."""
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    top, left = torch.randint(0, 5, (2, len(images), 1))
    rows = (top + torch.arange(28))[:, None, :, None].expand(-1, 1, 28, 32)
    columns = (left + torch.arange(28))[:, None, None, :].expand(-1, 1, 28, 28)
    shifted = padded.gather(2, rows).gather(3, columns)
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirrored, shifted.flip(3), shifted)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def train(epochs: int, batch: int, seed: int, state_file: Path) -> nn.Module:
    torch.manual_seed(seed)
    images, labels = load_split("train")
    test_images, test_labels = load_split("t10k")
    model = fashion_resnet().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1.5e-3, nesterov=True)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, pct_start=0.2)
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        torch.manual_seed(seed + 1000 + epoch)
        model.train()
        order = torch.randperm(len(images))
        for i in track(range(len(images) // batch), description=f"epoch {epoch + 1}/{epochs}"):
            chosen = order[i * batch : (i + 1) * batch]
            x = augment(images[chosen]).to(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        torch.save({k: v.state_dict() for k, v in parts.items()} | {"epoch": epoch + 1}, state_file)
        print(f"epoch {epoch + 1}: {accuracy(model, test_images, test_labels):.2%} of the test images", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--state", type=Path, default=HERE / "training-state.pt", help="where an interrupted run goes on"
    )
    arguments = parser.parse_args()
    model = train(arguments.epochs, arguments.batch, arguments.seed, arguments.state)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    torch.save(weights, HERE / "fashion.pt")


if __name__ == "__main__":
    main()
