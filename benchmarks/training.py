"""The networks that fidelity is measured on, trained from nothing: ``python benchmarks/training.py NETWORK SEED [--device D]``.

Three recipes, each ordinary for its kind and fixed before any result was seen: the example's own (shifts and flips, weight
decay 1.5e-3, 8 epochs, one cycle); ``resnet20``, the same shape with flips alone and the usual weight decay of 5e-4; and ``vgg``,
six convolutions without skips, likewise. Writes ``NETWORK-SEED.pt`` into ``benchmarks/trained``, a state dict. Images:
Fashion-MNIST.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
FASHION = HERE.parent / "examples" / "fashion"
sys.path.insert(0, str(FASHION))

from data import load_split as load_split  # noqa: E402
from model import fashion_resnet as fashion_resnet  # noqa: E402
from train import accuracy, augment  # noqa: E402

TRAINED = HERE / "trained"
WIDTHS = (32, 32, 0, 64, 64, 0, 128, 128)
"""Channels of the plain network's convolutions; zero stands for a pooling by two."""


class PlainNetwork(nn.Module):
    """A VGG-like classifier (Simonyan and Zisserman 2015) with BatchNorm: ``(N, 1, 28, 28)`` -> ``(N, 10)`` logits."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in WIDTHS:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features((images - 0.2860) / 0.3530)
        return self.head(self.pool(x).flatten(1))


def mirrored(images: Tensor) -> Tensor:
    """Half of the images flipped from left to right."""
    chosen = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(chosen, images.flip(3), images)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum of 0.9, batches of 128."""

    network: Callable[[], nn.Module]
    augment: Callable[[Tensor], Tensor]
    epochs: int
    decay: float
    rate: float


RECIPES = {
    "example": Recipe(fashion_resnet, augment, 8, 1.5e-3, 0.2),
    "resnet20": Recipe(fashion_resnet, mirrored, 20, 5e-4, 0.1),
    "vgg": Recipe(PlainNetwork, mirrored, 20, 5e-4, 0.1),
}
SEEDS = (0, 1)


def load(name: str, seed: int) -> nn.Module:
    """A trained network in eval mode; the example of seed 0 is the one that examples/fashion ships."""
    path = FASHION / "fashion.pt" if (name, seed) == ("example", 0) else TRAINED / f"{name}-{seed}.pt"
    if not path.exists():
        raise SystemExit(f"{path} is missing: python benchmarks/training.py {name} {seed} trains it")
    network = RECIPES[name].network()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def train(name: str, seed: int, device: str, batch: int = 128) -> nn.Module:
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    images, labels = load_split("train")
    network = recipe.network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.rate, momentum=0.9, weight_decay=recipe.decay, nesterov=True
    )
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.rate, total_steps=recipe.epochs * steps, pct_start=0.2
    )
    for epoch in range(recipe.epochs):
        network.train()
        for chosen in torch.randperm(len(images))[: steps * batch].split(batch):
            x = recipe.augment(images[chosen]).to(device, memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(network(x), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name} {seed}: epoch {epoch + 1}", flush=True)
    return network.cpu().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(RECIPES))
    parser.add_argument("seed", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=TRAINED)
    arguments = parser.parse_args()
    network = train(arguments.network, arguments.seed, arguments.device)
    arguments.folder.mkdir(exist_ok=True, parents=True)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    torch.save(weights, arguments.folder / f"{arguments.network}-{arguments.seed}.pt")
    images, labels = load_split("t10k")
    print(
        f"{arguments.network} {arguments.seed}: {accuracy(network, images, labels):.2%} of 10,000 test images",
        flush=True,
    )


if __name__ == "__main__":
    main()
