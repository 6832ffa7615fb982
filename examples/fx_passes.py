"""RewriteConvolutions between other torch.fx passes: ``python examples/fx_passes.py [FILE.pt]`` saves the last graph.

A pass takes a GraphModule and returns one, so passes are simply called one after another.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from pipeline_api import images, trained_model
from torch import fx, nn

from convrewrite import RewriteConvolutions
from convrewrite.rules import Match, Rule

Pass = Callable[[fx.GraphModule], fx.GraphModule]


def operations(graph_module: fx.GraphModule) -> Counter[str]:
    """The leaf modules a graph calls, by class."""
    nodes = (node for node in graph_module.graph.nodes if node.op == "call_module")
    return Counter(type(graph_module.get_submodule(node.target)).__name__ for node in nodes)


def show_operations(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Print what a graph calls; changes nothing."""
    print(", ".join(f"{count} {name}" for name, count in sorted(operations(graph_module).items())))
    return graph_module


def without_identities(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Take out the identities that BatchNorms leave where they were folded into a rewritten convolution."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and isinstance(graph_module.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def main() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph before the passes and the one after them."""
    calibration = images("calibration.npz", 96)
    last_stage = Rule(name="last-stage", match=Match(name=r"stage3\..*"), structures=("channel",), ratio=0.5)
    passes: list[Pass] = [
        show_operations,
        RewriteConvolutions(calibration[:1], rules=[last_stage], calibration=calibration, fast=True),
        show_operations,
        without_identities,
        show_operations,
    ]
    original = graph_module = fx.symbolic_trace(trained_model())
    for run in passes:
        graph_module = run(graph_module)
    return original, graph_module


if __name__ == "__main__":
    _, rewritten = main()
    if len(sys.argv) > 1:
        torch.save(rewritten.state_dict(), Path(sys.argv[1]))
