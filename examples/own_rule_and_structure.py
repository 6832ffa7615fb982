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

RULE = Path(__file__).parent / "output_groups.toml"


class OutputGroups:
    """A pointwise to g R channels, then k x k in g groups: each group of outputs sees R mixtures of the inputs of its own."""

    name = "output-groups"
    reference = "the mirror of Peng et al. 2018"

    def reject(self, spec: ConvSpec) -> str | None:
        if spec.kernel_size == (1, 1):
            return "a 1x1 kernel gives two pointwise stages"
        return None if self.variants(spec) else "the output channels do not divide into two groups"

    def variants(self, spec: ConvSpec) -> tuple[Setting, ...]:
        return tuple({"groups": groups} for groups in (2, 4) if spec.out_channels % groups == 0)

    def full_rank(self, spec: ConvSpec, variant: Setting) -> int:
        outputs = spec.out_channels // int(variant["groups"])
        return min(spec.in_channels, outputs * spec.kernel_size[0] * spec.kernel_size[1])

    def stages(self, spec: ConvSpec, setting: Setting) -> tuple[Stage, ...]:
        groups, inner = int(setting["groups"]), int(setting["groups"]) * int(setting["rank"])
        return (Stage(spec.in_channels, inner), Stage(inner, spec.out_channels, "hw", groups=groups))

    def weights(self, kernel: Tensor, spec: ConvSpec, setting: Setting) -> tuple[Tensor, ...]:
        groups, rank = int(setting["groups"]), int(setting["rank"])
        outputs, inputs, kh, kw = kernel.shape
        own = kernel.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # (g, C, O/g k^2)
        u, s, vh = torch.linalg.svd(own, full_matrices=False)
        root = s[:, :rank].sqrt()
        pointwise = (u[..., :rank] * root[:, None]).transpose(1, 2).reshape(groups * rank, inputs, 1, 1)
        filters = (vh[:, :rank] * root[..., None]).reshape(groups, rank, outputs // groups, kh, kw)
        return pointwise, filters.transpose(1, 2).reshape(outputs, rank, kh, kw)


def main(folder: Path) -> dict[str, float]:
    """Check the rule's own examples, rewrite by it, save, and load again."""
    structure = OutputGroups()
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
