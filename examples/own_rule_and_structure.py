# ruff: noqa: ARG002 - every structure answers the same questions, and not every one needs all arguments
"""One's own structure and one's own rule file: ``python examples/own_rule_and_structure.py [FOLDER]``.

A structure only says what shapes its stages have and how their weights start; cost, bias, stride, padding, fitting and
errors are counted and done from these. Another package adds one to the command line by an entry point in the group
``convrewrite.structures``.
"""

import sys
import tempfile
from pathlib import Path

import torch
from pipeline_api import agreement, images, trained_model
from torch import Tensor

import convrewrite
from convrewrite.conv import ConvSpec
from convrewrite.rules import check, load_rule_file
from convrewrite.structures import Setting, Stage

RULE = Path(__file__).parent / "input_channel.toml"


class InputChannel:
    """A pointwise to R channels, then k x k from these: the kernel's rank-R factorisation over its input channels."""

    name = "input-channel"
    reference = "the mirror of Zhang et al. 2016"

    def reject(self, spec: ConvSpec) -> str | None:
        return "a 1x1 kernel gives two pointwise stages" if spec.kernel_size == (1, 1) else None

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return ({},)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        return min(spec.in_channels, spec.out_channels * spec.kernel_size[0] * spec.kernel_size[1])

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        rank = int(setting["rank"])
        return (Stage(spec.in_channels, rank), Stage(rank, spec.out_channels, "hw"))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        rank = int(setting["rank"])
        outputs, inputs, kh, kw = kernel.shape
        u, s, vh = torch.linalg.svd(kernel.transpose(0, 1).reshape(inputs, -1), full_matrices=False)
        root = s[:rank].sqrt()
        filters = (vh[:rank] * root[:, None]).reshape(rank, outputs, kh, kw).transpose(0, 1)
        return (u[:, :rank] * root).T[:, :, None, None].contiguous(), filters.contiguous()


def main(folder: Path) -> dict[str, float]:
    """Check the rule's own examples, rewrite by it, save, and load again."""
    structure = InputChannel()
    findings = check(load_rule_file(RULE), lambda name, spec: {structure.name: structure}[name].reject(spec))
    assert all(finding.passed for finding in findings), findings

    model, calibration = trained_model(), images("calibration.npz", 96)
    result = convrewrite.optimize(
        model, calibration[:1], rules=[RULE], calibration=calibration, structures=[structure], fast=True, measure=False
    )
    result.save(folder / "result")
    loaded = convrewrite.load(folder / "result", trained_model(), structures=(structure,))
    unseen = images("test.npz", 400)
    return {
        "examples": len(findings),
        "sites": sum(site.action == "rewritten" for site in result.report.sites),
        "macs": result.report.totals.macs.ratio,
        "agreement": agreement(model, loaded, unseen),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)).items():
            print(f"{name:12} {value:.3g}")
