"""Pages that commands write, and the commands that stand in them."""

import json
import shlex
from pathlib import Path

import torch
from commands import INPUT, call
from torch import nn


def test_a_result_says_how_it_is_made_again_and_an_analysis_has_a_page(tmp_path: Path) -> None:
    model, page, out = tmp_path / "my net.pt", tmp_path / "page.html", tmp_path / "out"
    torch.save(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), model)
    words = ["optimize", str(model), *INPUT, "--calib", "weights", "--no-onnx", "-o", str(out)]
    ran = call(*words)
    assert ran.code == 0, ran.err
    [command] = json.loads((out / "report.json").read_text(encoding="utf-8"))["commands"]
    assert shlex.split(command) == ["convrewrite", *words]

    ran = call("analyze", model, *INPUT, "--page", page)
    assert ran.code == 0, ran.err
    assert ran.said.endswith(f"Written to {page}")
    assert page.read_text(encoding="utf-8").count('<article class="site"') == 2
    page.unlink()
    ran = call("analyze", model, *INPUT, "--page", page, "--json")
    assert (ran.code, len(json.loads(ran.said)), page.is_file()) == (0, 2, True)
    ran = call("analyze", model, *INPUT, "--page", model)
    assert (ran.code, "holds something else than a page" in ran.message) == (2, True)
