"""Model files good and hostile, and the fixtures around them; a plugin of the test suite."""

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x))

def make():
    return Net().eval()

def wide():
    return Net(5)

def number():
    return 3

def needs(width):
    return Net(width)

def broken():
    raise ValueError("no weights here")

instance = Net()
"""


FAKE_ZOO = """
import os
from dataclasses import dataclass
from torch import fx, nn

@dataclass
class Config:
    width: int = 4

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.config = Config()

    def forward(self, x):
        return self.conv(x)

class Traced(fx.GraphModule):
    pass

def net(weights=None):
    return Net()

def run(command):
    os.system(command)
"""


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Seeded, in a folder of its own; modules imported from there are forgotten afterwards."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    yield
    forget_modules_below(tmp_path)


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net_of_user.py"
    path.write_text(NET)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file a hostile payload would create."""
    return tmp_path / "executed"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call: tuple[Any, ...] = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def forget_modules_below(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def write_archive(path: Path, data: bytes) -> Path:
    """What torch.save would write around this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def install_fake(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    models = folder / name / "models"
    models.mkdir(parents=True)
    (folder / name / "__init__.py").write_text(
        "from .models import Net\ndef create_model(name, pretrained=True):\n"
        "    assert name == 'net' and not pretrained\n    return Net()\n"
    )
    (folder / name / "payload.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Net: pass\n")
    (models / "__init__.py").write_text("from .net import Net, net, run\n")
    (models / "net.py").write_text(FAKE_ZOO)
    monkeypatch.syspath_prepend(str(folder))
