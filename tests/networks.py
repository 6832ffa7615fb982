"""Small networks, geometries and inputs that the tests share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.conv import ConvSpec

Model = TypeVar("Model", bound=nn.Module)

SPECS = {
    "standard": ConvSpec(4, 6, (3, 3), padding=(1, 1)),
    "no padding": ConvSpec(4, 6, (3, 3), bias=False),
    "strided": ConvSpec(4, 6, (3, 3), stride=(2, 2), padding=(1, 1)),
    "dilated": ConvSpec(4, 6, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "reflect": ConvSpec(4, 6, (3, 3), padding=(1, 2), padding_mode="reflect"),
    "replicate": ConvSpec(4, 6, (3, 3), padding=(2, 1), padding_mode="replicate"),
    "circular": ConvSpec(4, 6, (3, 3), padding=(1, 1), padding_mode="circular"),
    "same": ConvSpec(4, 6, (3, 3), padding="same", dilation=(2, 1)),
    "same, even": ConvSpec(4, 6, (2, 4), padding="same"),
    "same, circular": ConvSpec(4, 6, (3, 2), padding="same", padding_mode="circular"),
    "grouped": ConvSpec(8, 12, (3, 3), padding=(1, 1), groups=2),
    "pointwise": ConvSpec(8, 6, (1, 1)),
    "strided pointwise": ConvSpec(8, 6, (1, 1), stride=(2, 2), padding=(1, 0)),
    "asymmetric": ConvSpec(4, 6, (1, 5), padding=(0, 2), stride=(1, 2)),
    "transposed": ConvSpec(4, 6, (3, 3), stride=(2, 2), padding=(1, 1), transposed=True, output_padding=(1, 1)),
    "transposed, grouped": ConvSpec(
        4, 6, (4, 3), stride=(2, 3), padding=(1, 0), groups=2, transposed=True, output_padding=(0, 2)
    ),
    "transposed, dilated": ConvSpec(4, 6, (3, 2), stride=(1, 2), padding=(4, 0), dilation=(2, 1), transposed=True),
}
"""One geometry of every sort that the moments and the fit must understand."""


def natural(count: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs as a layer inside a network sees them: smooth, correlated between channels, not centred, not negative."""
    noise = torch.randn(count, channels, height + 4, width + 4, dtype=torch.float64)
    smooth = F.avg_pool2d(noise, 5, stride=1) * 5
    mixing = torch.randn(channels, channels, dtype=torch.float64) / channels**0.5
    mixed = torch.einsum("oc,nchw->nohw", mixing, smooth) + 0.3 * torch.randn(channels, 1, 1, dtype=torch.float64)
    return F.relu(mixed + 0.5).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-300))


def macs_by_hooks(module: nn.Module, x: Tensor) -> int:
    """MACs of one example, counted while ``module`` runs: a transposed convolution works once per input position."""
    total = 0

    def count(conv: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        positions = args[0] if isinstance(conv, nn.ConvTranspose2d) else output
        total += conv.weight.numel() * positions.shape[-2] * positions.shape[-1]

    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    handles = [conv.register_forward_hook(count) for conv in convs]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return total


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """The state dict, bit for bit."""
    return {key: value.contiguous().numpy().tobytes() for key, value in model.state_dict().items()}


def settled(model: Model) -> Model:
    """In eval mode, every BatchNorm with statistics and weights as training would leave them: none at its default."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.3)
    return model.eval()


class Chain(nn.Sequential):
    """Three convolutions, the first two with BatchNorm and a ReLU in place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
        )  # fmt: skip


class Block(nn.Module):
    """A residual block as torchvision writes it: ReLU in place, ``+=``, a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class Residual(nn.Module):
    """A small residual network with a classifier head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


class NineKinds(nn.Module):
    """One convolution of every kind; attributes are named after them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.standard = nn.Conv2d(3, width, 3, padding=1)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.asymmetric = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        self.dilated = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.separable_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.separable_bn = nn.BatchNorm2d(width)
        self.separable_pw = nn.Conv2d(width, width, 1)
        self.transposed = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.to_kernel = nn.Linear(width, 4 * width * 9)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.standard(x))
        x = F.relu(self.pointwise(x))
        x = F.relu(self.asymmetric(x))
        x = F.relu(self.dilated(x))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.grouped(x))
        x = F.relu(self.separable_pw(self.separable_bn(self.separable_dw(x))))
        x = F.relu(self.transposed(x))
        kernel = self.to_kernel(x.mean((0, 2, 3))).reshape(4, x.shape[1], 3, 3)
        return F.conv2d(x, kernel, padding=1)


class CalledTwice(nn.Module):
    """One convolution at two places, at two resolutions, a BatchNorm behind the second only."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.shared = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.first(x))))
        x = F.max_pool2d(x, 2)
        return self.last(F.relu(self.bn(self.shared(x))))


class TwoNames(nn.Module):
    """One convolution under two names, called under the second."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.encoder = nn.Module()
        self.encoder.conv = nn.Conv2d(width, width, 3, padding=1)
        self.alias = self.encoder.conv
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.alias(F.relu(self.first(x)))))


class Branching(nn.Module):
    """A way that depends on the input, which no graph can follow; its parts can be followed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.block = Block(width, width)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if float(x.detach().mean()) > -1e9:
            x = self.block(x)
        return self.last(x)


class Brighter(nn.Module):
    """A second convolution that only bright inputs get to."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.second(y) if float(x.mean()) > 0 else y


class Calls(nn.Module):
    """The given modules, under their names, with the forward given as a function of this module and its input."""

    def __init__(self, forward: Callable[["Calls", Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


class Refilling(nn.Module):
    """Writes what a network gives into a tensor that it keeps for each shape, and returns that."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.made: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return self.made.setdefault(y.shape, torch.empty_like(y)).detach().copy_(y)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a :class:`Drawn` network."""

    way: str
    kernel: int
    dilation: int
    groups: int
    bias: bool
    norm: bool
    transposed: bool
    padding_mode: str


class Drawn(nn.Module):
    """A network from a drawn list of steps, each ``plain``, a ``skip`` connection, two ``branches``, or called ``twice``."""

    WIDTH = 4

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Conv2d(3, self.WIDTH, 3, padding=1)
        self.main = nn.ModuleList(self._make(step) for step in steps)
        self.side = nn.ModuleList(nn.Conv2d(self.WIDTH, self.WIDTH, 1) for _ in steps)
        self.relu = nn.ReLU(inplace=True)

    def _make(self, step: Step) -> nn.Sequential:
        w, padding = self.WIDTH, step.dilation * (step.kernel - 1) // 2
        shape = (w, w, step.kernel, 1, padding)
        if step.transposed:
            conv: nn.Module = nn.ConvTranspose2d(*shape, groups=step.groups, bias=step.bias, dilation=step.dilation)
        else:
            conv = nn.Conv2d(*shape, step.dilation, step.groups, step.bias, step.padding_mode)
        return nn.Sequential(conv, nn.BatchNorm2d(w) if step.norm else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for step, main, side in zip(self.steps, self.main, self.side, strict=True):
            if step.way == "skip":
                out = main(x)
                out += x
            elif step.way == "branches":
                out = torch.cat([main(x)[:, :2], side(x)[:, 2:]], 1)
            elif step.way == "twice":
                out = main(self.relu(main(x)))
            else:
                out = main(x)
            x = self.relu(out)
        return x
