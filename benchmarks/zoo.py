"""The whole way on the architectures of pytorchcv, in the order of ARCHITECTURES, the most different first:

    python benchmarks/zoo.py [NAME ...] [--limit N] [--timeout SECONDS] [--quick] [--threads N]

One small network of every architecture, with random weights and without torchvision (``pip install --no-deps pytorchcv
requests``), is rewritten with the rule ``balanced`` from its weights alone to 0.6 of its MACs, exported, and onnxruntime
compared with torch. ``--quick`` leaves out planning and timing: every site is rewritten at the rule's own ratio.
Architectures run in child processes, so that a crash or a timeout of one does not end the table. The end says how many
came through, how many were refused with an error that says why, and how many crashed, which is a defect.
"""

import argparse
import importlib
import multiprocessing
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import convrewrite
from convrewrite.errors import ConvRewriteError
from convrewrite.exporting import export
from convrewrite.reporting import SiteRow
from convrewrite.verifying import check_parity, require_parity

ARCHITECTURES = {
    "resnet_cifar": "resnet20_cifar10",
    "squeezenet": "squeezenet_v1_1",
    "mobilenetv2": "mobilenetv2_wd4",
    "densenet_cifar": "densenet40_k12_cifar10",
    "shufflenetv2": "shufflenetv2_wd2",
    "unet": "unet_cityscapes",
    "espcnet": "espcnet_cityscapes",
    "octresnet": "octresnet10_ad2",
    "sharesnet": "sharesnet18",
    "tresnet": "tresnet_m",
    "dicenet": "dicenet_wd5",
    "resnext_cifar": "resnext20_16x4d_cifar10",
    "superpointnet": "superpointnet",
    "nin_cifar": "nin_cifar10",
    "diracnetv2": "diracnet18v2",
    "menet": "menet108_8x1_g3",
    "regnet": "regnetx002",
    "fractalnet_cifar": "fractalnet_cifar10",
    "msdnet_cifar10": "msdnet22_cifar10",
    "condensenet": "condensenet74_c4_g4",
    "channelnet": "channelnet",
    "resnesta": "resnestabc14",
    "isqrtcovresnet": "isqrtcovresnet18",
    "wrn1bit_cifar": "wrn20_10_1bit_cifar10",
    "lwopenpose_cmupan": "lwopenpose2d_mobilenet_cmupan_coco",
    "lffd": "lffd20x5s320v2_widerface",
    "centernet": "centernet_resnet18_voc",
    "sinet": "sinet_cityscapes",
    "segnet": "segnet_cityscapes",
    "enet": "enet_cityscapes",
    "xdensenet_cifar": "xdensenet40_2_k24_bc_cifar10",
    "ghostnet": "ghostnet",
    "efficientnet": "efficientnet_b0",
    "mobilenetv3": "mobilenetv3_small_w7d20",
    "mixnet": "mixnet_s",
    "irevnet": "irevnet301",
    "revnet": "revnet38",
    "hrnet": "hrnet_w18_small_v1",
    "diaresnet_cifar": "diaresnet20_cifar10",
    "shakeshakeresnet_cifar": "shakeshakeresnet20_2x16d_cifar10",
    "rir_cifar": "rir_cifar10",
    "squeezenext": "sqnxt23_w1",
    "igcv3": "igcv3_wd4",
    "shufflenet": "shufflenet_g3_wd4",
    "dabnet": "dabnet_cityscapes",
    "cgnet": "cgnet_cityscapes",
    "edanet": "edanet_cityscapes",
    "erfnet": "erfnet_cityscapes",
    "lednet": "lednet_cityscapes",
    "esnet": "esnet_cityscapes",
    "fpenet": "fpenet_cityscapes",
    "contextnet": "ctxnet_cityscapes",
    "fastscnn": "fastscnn_cityscapes",
    "linknet": "linknet_cityscapes",
    "bisenet": "bisenet_resnet18_celebamaskhq",
    "prnet": "prnet",
    "pfpcnet": "pfpcnet",
    "simplepose_coco": "simplepose_resnet18_coco",
    "simpleposemobile_coco": "simplepose_mobile_mobilenetv3_small_w1_coco",
    "cbamresnet": "cbam_resnet18",
    "bamresnet": "bam_resnet18",
    "dla": "dla46c",
    "vovnet": "vovnet27s",
    "hardnet": "hardnet39ds",
    "espnetv2": "espnetv2_wd2",
    "peleenet": "peleenet",
    "mnasnet": "mnasnet_small",
    "fbnet": "fbnet_cb",
    "proxylessnas": "proxylessnas_cpu",
    "spnasnet": "spnasnet",
    "darknet": "darknet_tiny",
    "bninception": "bninception",
    "preresnet_cifar": "preresnet20_cifar10",
    "seresnet_cifar": "seresnet20_cifar10",
    "sepreresnet_cifar": "sepreresnet20_cifar10",
    "diapreresnet_cifar": "diapreresnet20_cifar10",
    "resdropresnet_cifar": "resdropresnet20_cifar10",
    "shakedropresnet_cifar": "shakedropresnet20_cifar10",
    "ror_cifar": "ror3_56_cifar10",
    "pyramidnet_cifar": "pyramidnet110_a48_cifar10",
    "wrn_cifar": "wrn16_10_cifar10",
    "resnet": "resnet18_wd4",
    "preresnet": "preresnet18_wd4",
    "seresnet": "seresnet10",
    "sepreresnet": "sepreresnet10",
    "diaresnet": "diaresnet10",
    "diapreresnet": "diapreresnet10",
    "resneta": "resneta10",
    "resnext": "resnext14_16x4d",
    "senet": "senet16",
    "drn": "drnd22",
    "mobilenet": "mobilenet_wd4",
    "mobilenetb": "mobilenetb_wd4",
    "fdmobilenet": "fdmobilenet_wd4",
    "shufflenetv2b": "shufflenetv2b_wd2",
    "efficientnetedge": "efficientnet_edge_small_b",
    "selecsls": "selecsls42",
    "bagnet": "bagnet9",
    "alexnet": "alexnet",
    "zfnet": "zfnet",
    "vgg": "vgg11",
    "densenet": "densenet121",
    "ibndensenet": "ibn_densenet121",
    "xdensenet": "xdensenet121_2",
    "sparsenet": "sparsenet121",
    "dpn": "dpn68",
    "fishnet": "fishnet99",
    "darts": "darts",
    "nasnet": "nasnet_4a1056",
    "xception": "xception",
    "inceptionv3": "inceptionv3",
    "inceptionv4": "inceptionv4",
    "inceptionresnetv1": "inceptionresnetv1",
    "darknet53": "darknet53",
    "scnet": "scnet50",
    "sknet": "sknet50",
    "airnet": "airnet50_1x64d_r2",
    "airnext": "airnext50_32x4d_r2",
    "resnetd": "resnetd50b",
    "ibnresnet": "ibn_resnet50",
    "ibnbresnet": "ibnb_resnet50",
    "ibnresnext": "ibn_resnext50_32x4d",
    "seresnext": "seresnext50_32x4d",
    "resattnet": "resattnet56",
    "pspnet": "pspnet_resnetd50b_voc",
    "deeplabv3": "deeplabv3_resnetd50b_voc",
    "fcn8sd": "fcn8sd_resnetd50b_voc",
    "danet": "danet_resnetd50b_cityscapes",
    "icnet": "icnet_resnetd50b_cityscapes",
    "msdnet": "msdnet22",
    "sqnet": "sqnet_cityscapes",
    "ibppose_coco": "ibppose_coco",
    "ntsnet_cub": "ntsnet_cub",
}
"""Of every architecture's module the function of its smallest network."""

SIZES = (64, 96, 128, 224, 256, 299, 480)
CHANNELS = {"superpointnet": 1}
BUDGET = {"macs": 0.6}


@dataclass(frozen=True)
class Outcome:
    """What became of one network. ``end``: "through", "refused", "crashed" or "timeout"; ``message`` says why."""

    end: str
    message: str = ""
    size: int = 0
    sites: int = 0
    rewritten: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    parity: float | None = None


def network(module: str) -> tuple[nn.Module, Tensor]:
    """The network and the least input of SIZES (32 x 32 for those of CIFAR) that it takes."""
    name = ARCHITECTURES[module]
    build: Callable[..., nn.Module] = getattr(importlib.import_module(f"pytorchcv.models.{module}"), name)
    problem = "no size tried"
    for size in (32,) if "cifar" in name else SIZES:
        torch.manual_seed(0)
        image = torch.randn(1, CHANNELS.get(module, 3), size, size)
        try:
            model = sized(build, size).eval()
            with torch.no_grad():
                model(image)
        except (RuntimeError, AssertionError, ValueError) as error:
            problem = f"{size} x {size}: {error}"
            continue
        return model, image
    raise LookupError(f"{name} takes none of the sizes tried; {problem}")


def sized(build: Callable[..., nn.Module], size: int) -> nn.Module:
    """Built for this input size where the size is part of the network."""
    try:
        return build(pretrained=False, in_size=(size, size))
    except TypeError:
        return build(pretrained=False)


def rewrite(module: str, quick: bool) -> Outcome:
    model, image = network(module)
    size = image.shape[-1]
    try:
        rows, parity = rewritten(model, image, quick)
    except ConvRewriteError as error:
        return Outcome("refused", f"{type(error).__name__}: {error}", size)
    kept = Counter(row.reason or "" for row in rows if row.action == "kept")
    return Outcome("through", "", size, len(rows), len(rows) - kept.total(), dict(kept), parity)


def rewritten(model: nn.Module, image: Tensor, quick: bool) -> tuple[Sequence[SiteRow], float]:
    """The sites, and the greatest relative error of onnxruntime's outputs against torch's."""
    if not quick:
        report = convrewrite.optimize(model, image, ["balanced"], "weights", BUDGET, fast=True).report
        return report.sites, max(row.relative_error for row in report.parity)
    result = convrewrite.optimize(model, image, ["balanced"], "weights", fast=True, measure=False)
    with tempfile.TemporaryDirectory() as folder:
        exported = export(result.model, image, Path(folder) / "model.onnx")
        parity = check_parity(result.model, exported.path, (image,))
    require_parity(parity)
    return result.report.sites, max(output.relative_error for output in parity.outputs)


def child(module: str, quick: bool, pipe: Connection) -> None:
    try:
        outcome = rewrite(module, quick)
    except Exception as error:
        outcome = Outcome("crashed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.send(outcome)


def guarded(module: str, quick: bool, timeout: float) -> Outcome:
    """The outcome of a child process; forked, so that torch is imported once."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(module, quick, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return Outcome("timeout", f"not done in {timeout:.0f} s")
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome("crashed", f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def row(module: str, outcome: Outcome, seconds: float) -> list[object]:
    kept = "\n".join(f"{count}x {reason}" for reason, count in Counter(outcome.kept).most_common())
    parity = "" if outcome.parity is None else f"{outcome.parity:.1e}"
    first = outcome.message.splitlines()[:1]
    counts = [outcome.sites, outcome.rewritten] if outcome.end == "through" else ["", ""]
    return [ARCHITECTURES[module], outcome.size or "", *counts, kept or "".join(first), parity, outcome.end, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="modules of pytorchcv.models; none: all")
    parser.add_argument("--limit", type=int, help="only so many, the most different first")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per architecture")
    parser.add_argument("--quick", action="store_true", help="neither plan nor time")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"not known: {', '.join(unknown)}; known are {', '.join(ARCHITECTURES)}")
    torch.set_num_threads(arguments.threads)
    rows, outcomes = [], {}
    for module in (arguments.names or list(ARCHITECTURES))[: arguments.limit]:
        started = time.perf_counter()
        outcome = outcomes[module] = guarded(module, arguments.quick, arguments.timeout)
        seconds = time.perf_counter() - started
        counts = f"{outcome.rewritten} of {outcome.sites} sites, parity {outcome.parity}"
        print(f"{module}: {outcome.end}, {counts}, {seconds:.0f} s; {outcome.message[:300]}", flush=True)
        rows.append(row(module, outcome, seconds))
    headers = ["network", "input", "sites", "rewritten", "kept, or why not", "parity", "end", "seconds"]
    widths = [None, None, None, None, 60, None, None, None]
    print(tabulate(rows, headers, floatfmt=".0f", maxcolwidths=widths, disable_numparse=[5]))
    for module, outcome in outcomes.items():
        if outcome.message:
            print(f"{module}: {outcome.end}: {outcome.message}")
    ends = Counter(outcome.end for outcome in outcomes.values())
    print(
        f"{len(outcomes)} architectures: {ends['through']} came through, {ends['refused']} ended in a clear error, "
        f"{ends['crashed']} crashed, {ends['timeout']} took too long"
    )


if __name__ == "__main__":
    main()
