"""The order of nodes: a graph should have each behind those whose values it takes, and onnxruntime takes graphs that do not; and
which nodes lead to which values."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import onnx

from convrewrite.onnx_graph.views import names_used


def makers_of(graph: onnx.GraphProto) -> dict[str, int]:
    """The position of the node that makes each value."""
    return {name: number for number, node in enumerate(graph.node) for name in node.output if name}


def leading_to(
    graph: onnx.GraphProto, makers: Mapping[str, int], wanted: Iterable[str], known: Collection[str] = ()
) -> set[int]:
    """The positions of the nodes that values depend on, back to those that are ``known``."""
    waiting, found = list(wanted), set[int]()
    while waiting:
        name = waiting.pop()
        if name in known or name not in makers or makers[name] in found:
            continue
        found.add(makers[name])
        waiting += names_used(graph.node[makers[name]])
    return found


def put_in_order(graph: onnx.GraphProto) -> bool:
    """Move nodes behind those whose values they take, none further than it has to; whether any had to be moved.

    onnxruntime has opened the graph before, so that there is an order. Graphs inside of nodes are left to it.
    """
    nodes = list(graph.node)
    order = list(_ordered(nodes))
    if order == sorted(order):
        return False
    del graph.node[:]
    graph.node.extend(nodes[number] for number in order)
    return True


def _ordered(nodes: list[onnx.NodeProto]) -> Iterator[int]:
    """The positions of nodes, each behind those of the nodes that it needs."""
    makers = {name: number for number, node in enumerate(nodes) for name in node.output if name}
    begun: set[int] = set()
    done: set[int] = set()
    for first in range(len(nodes)):
        waiting = [first]
        while waiting:
            number = waiting[-1]
            needed = [] if number in begun else [makers[name] for name in names_used(nodes[number]) if name in makers]
            begun.add(number)
            if missing := [other for other in reversed(needed) if other not in begun]:
                waiting += missing
                continue
            waiting.pop()
            if number not in done:
                done.add(number)
                yield number
