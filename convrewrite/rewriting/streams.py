"""Runs both networks from site to site along the graph of the whole model, and holds their activations.

Activations are kept from site to site, so each layer runs once per stream however many sites there are; those beyond a memory
limit wait on disk.
"""

import copy
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from convrewrite.conv import Size, planar
from convrewrite.graph import Site, execute, given_to, may_change, memory_of, tensors_in
from convrewrite.inputs import Inputs
from convrewrite.rewriting.samples import Sample
from convrewrite.rewriting.store import Store, StoredValue
from convrewrite.state import address_of

RECTIFIERS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_")

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Streams:
    """Runs the graph from site to site, each batch when it is asked for. The rewritten stream holds only what differs from the
    original stream, which runs ahead of it where that leaves less to keep."""

    def __init__(self, graph: fx.GraphModule, sites: Sequence[Site], batches: Sequence[Inputs], memory: int) -> None:
        self.store = Store(memory)
        self._modules = dict(graph.named_modules(remove_duplicate=False))
        self._replaced: dict[str, nn.Module] = {}
        self._folded: dict[str, nn.Module] = {}
        self._foreseen: dict[str, nn.Module] = {}
        self._batches = batches
        self._nodes = skips_first(graph, {site.name for site in sites})
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = _last_uses(self._nodes)
        self._calls = {site.name: _calls(self._nodes, self._modules, site.name) for site in sites}
        self._stops = sorted(position for positions in self._calls.values() for position in positions)
        self._position = 0
        self._reached = [0] * len(batches)
        self._original: list[dict[fx.Node, StoredValue]] = [{} for _ in batches]
        self._rewritten: list[dict[fx.Node, StoredValue]] = [{} for _ in batches]
        self._ahead: list[set[fx.Node]] = [set() for _ in batches]

    def advance(self, name: str) -> bool:
        """Go to the site's call; False if it is not called exactly once, or if the streams are past it."""
        calls = self._calls[name]
        if len(calls) != 1 or calls[0] < self._position:
            return False
        self._position = calls[0]
        return True

    def ahead(self, name: str) -> list[str]:
        """The names of the nodes that run before a site's first call, in their order."""
        calls = self._calls[name]
        return [node.name for node in self._nodes[: calls[0]]] if calls else []

    def samples(self, site: Site, mixture: nn.Module | None = None) -> Iterator[Sample]:
        """One sample per batch at the site where the streams stand; they are to be taken once.

        ``mixture``: the module whose output is wanted, where that is not what the original network gives there.
        """
        source, skip = self._source(), self._skip(site)
        for index in range(len(self._batches)):
            self._bring(index)
            x, output = self._shown(index, site, mixture)
            skips = () if skip is None else (self._original_value(index, skip), self._value(index, skip))
            sample = Sample(index, self._value(index, source), output, *skips)
            yield sample.of_the_same_examples(x, len(self._batches[index][0]))

    def _value(self, index: int, node: fx.Node) -> Any:
        """A value in the rewritten network; where nothing before it differs, that is the original's."""
        kept = self._rewritten[index].get(node) or self._original[index][node]
        return self.store.get(kept)

    def _original_value(self, index: int, node: fx.Node) -> Any:
        return self.store.get(self._original[index][node])

    def _shown(self, index: int, site: Site, mixture: nn.Module | None) -> tuple[Tensor, Tensor]:
        """The original's input, and its output there or that of a ``mixture``."""
        x: Tensor = self._original_value(index, self._source())
        if mixture is None:
            return x, self._output(index, site, x)
        with torch.no_grad():
            return x, mixture(x)

    def _output(self, index: int, site: Site, x: Tensor) -> Tensor:
        """The original's output, which the original stream holds from then on; values that only led to it are dropped."""
        original, source, end = self._original[index], self._source(), self._end(site)
        values, modules = {source: x}, self._modules | self._folded
        for node in dict.fromkeys((self._nodes[self._position], end)):
            values[node] = execute(node, modules, values)
            self._ahead[index].add(node)
        if source in self._rewritten[index] and self._last_use[source] <= self._position:
            self.store.drop(original.pop(source))
        output: Tensor = values[end]
        left = self._behind(end, output)
        self._ahead[index] |= left.keys()
        used_later = {node: value for node, value in left.items() if not set(node.users) <= left.keys()}
        shared = _shared(used_later)
        original |= {node: self.store.put(value, shared=node in shared) for node, value in used_later.items()}
        return output

    def _behind(self, end: fx.Node, output: Tensor) -> dict[fx.Node, Any]:
        """A site's output in the original network, and the values that directly follow from it alone before the next site: these
        are usually smaller."""
        start = self._order[end] + 1
        following = {end}
        for node in self._nodes[start : next((stop for stop in self._stops if stop >= start), start)]:
            if not node.all_input_nodes or not following.issuperset(node.all_input_nodes):
                break
            following.add(node)
        nodes = self._nodes[start : start + len(following) - 1]
        changes = any(may_change(node, self._modules) for node in nodes)
        values: dict[fx.Node, Any] = {end: output.clone() if changes else output}
        for node in nodes:
            values[node] = execute(node, self._modules, values)
        return values

    def rectified(self, site: Site) -> bool:
        """See :meth:`Propagation.rectified`. Not for a dynamic convolution: the ReLU sees only the mixture of the outputs that
        are fitted."""
        if site.spec.kernels > 1:
            return False
        end = self._end(site)
        user = _only_user(end)
        if user is not None and self._skip(site) is not None:
            user = _only_user(user)
        if user is None:
            return False
        if user.op == "call_module":
            return type(self._modules[str(user.target)]) is nn.ReLU
        return user.target in RECTIFIERS

    def finish(self, index: int, site: Site, module: nn.Module) -> Any:
        """See :meth:`Propagation.outputs`; what the streams hold stays as it is."""
        self._bring(index)
        modules = self._modules | self._folded | self._foreseen | self._replaced | self._replacements(site, module)
        kept = self._original[index] | self._rewritten[index]
        rest = self._nodes[self._position :]
        values = {node: self.store.get(kept[node]) for node in kept if self._order[node] < self._position}
        if any(may_change(node, modules) for node in rest if node.op != "output"):
            values = dict(zip(values, copy.deepcopy(list(values.values())), strict=True))
        for node in rest:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: values[n])
            values[node] = execute(node, modules, values)
            for source in (*node.all_input_nodes, node):
                if self._last_use[source] <= self._order[node]:
                    values.pop(source, None)
        raise AssertionError("a graph ends in its output")

    def fold(self, site: Site, module: nn.Module) -> None:
        """Have the original network compute a site and the BatchNorm that follows it with ``module``: one operator instead of
        two."""
        self._folded |= self._replacements(site, module)

    def foresee(self, site: Site, module: nn.Module) -> None:
        """Have :meth:`finish` run ``module`` at a site that the streams have not reached."""
        self._foreseen |= self._replacements(site, module)

    def replace(self, site: Site, module: nn.Module) -> None:
        """From here on the rewritten stream runs ``module`` at the site."""
        self._replaced |= self._replacements(site, module)

    def _replacements(self, site: Site, module: nn.Module) -> dict[str, nn.Module]:
        """The modules to use under the site's names, and under that of the BatchNorm folded into it, once ``module`` is in
        place."""
        original = self._modules.get(site.name)
        found: dict[str, nn.Module] = {name: module for name, old in self._modules.items() if old is original}
        return found if site.batch_norm is None else found | {site.batch_norm: nn.Identity()}

    def _end(self, site: Site) -> fx.Node:
        """The node that gives the site's output, with the BatchNorm that is folded into it."""
        node = self._nodes[self._position]
        return node if site.batch_norm is None else next(iter(node.users))

    def _skip(self, site: Site) -> fx.Node | None:
        """The other summand of the addition that is the only user of this site's output, where both networks already have it."""
        node = self._end(site)
        join = _only_user(node)
        if join is None or join.target not in ADDITIONS or len(join.args) != 2 or join.kwargs:
            return None
        other = join.args[1] if join.args[0] is node else join.args[0]
        if not isinstance(other, fx.Node) or other is node or self._changes_before(join, other):
            return None
        self._bring(0)
        if other not in self._original[0]:
            return None
        skip, x = self._value(0, other), self._value(0, self._source())
        if not isinstance(skip, Tensor) or skip.dim() != site.spec.dims + 2:
            return None
        # A skip of another shape would broadcast, or be broadcast to: then the sum does not have the shape of this site's output.
        wanted = (len(x), site.spec.out_channels, *site.spec.output_size(_plane(planar(x, site.spec))))
        return other if planar(skip, site.spec).shape == wanted else None

    def _changes_before(self, join: fx.Node, other: fx.Node) -> bool:
        """Whether a value is changed in place behind this site, before an addition takes it."""
        memory, between = memory_of(other, self._modules), self._nodes[self._position + 1 : self._order[join]]
        changed = (source for node in between for source in may_change(node, self._modules))
        return any(memory_of(source, self._modules) is memory for source in changed)

    def _source(self) -> fx.Node:
        """The node that gives the input of the site where the streams stand."""
        return self._nodes[self._position].all_input_nodes[0]

    def _bring(self, index: int) -> None:
        """Run one batch up to where the streams stand; only values that are used later are kept."""
        segment, self._reached[index] = self._nodes[self._reached[index] : self._position], self._position
        if segment:
            self._run(index, segment)

    def _run(self, index: int, segment: Sequence[fx.Node]) -> None:
        end = self._position
        used = {source for node in segment for source in node.all_input_nodes}
        shared: set[fx.Node] = set()
        original = self._fetch(self._original[index], used, shared)
        rewritten = self._fetch(self._rewritten[index], used, shared)
        inputs = iter(self._batches[index])
        for node in segment:
            if node.op == "placeholder":
                original[node] = given_to(node, inputs)
            elif node.op != "output":
                self._step(node, original, rewritten, self._ahead[index])
            for source in (*node.all_input_nodes, node):
                if self._last_use[source] <= self._order[node]:
                    original.pop(source, None)
                    rewritten.pop(source, None)
        for kept, values in ((self._original, original), (self._rewritten, rewritten)):
            later = {n: value for n, value in values.items() if self._last_use[n] >= end}
            shared |= _shared(later)
            kept[index].update({n: self.store.put(value, shared=n in shared) for n, value in later.items()})

    def _fetch(
        self, kept: dict[fx.Node, StoredValue], wanted: set[fx.Node], shared: set[fx.Node]
    ) -> dict[fx.Node, Any]:
        """Take the wanted values out of the store, and all whose memory another value shares, which may change with it: these
        are added to ``shared``."""
        values: dict[fx.Node, Any] = {}
        for node in [node for node, handle in kept.items() if node in wanted or handle.shared]:
            handle = kept.pop(node)
            shared |= {node} if handle.shared else set()
            values[node] = self.store.get(handle)
            self.store.drop(handle)
        return values

    def _step(
        self, node: fx.Node, original: dict[fx.Node, Any], rewritten: dict[fx.Node, Any], ahead: set[fx.Node]
    ) -> None:
        """Run one node in both streams: only once where nothing before it differs, and not in the original stream if that is
        ``ahead``."""
        differs = node.op == "call_module" and str(node.target) in self._replaced
        differs = differs or any(source in rewritten for source in node.all_input_nodes)
        changed = may_change(node, self._modules) if differs else []
        rewritten.update(_apart(changed, original, rewritten) if changed else {})
        both = {source: rewritten.get(source, original.get(source)) for source in node.all_input_nodes}
        if node not in ahead:
            original[node] = execute(node, self._modules, original)
        if differs:
            rewritten[node] = execute(node, self._modules | self._replaced, both)


def _plane(x: Tensor) -> Size:
    return (int(x.shape[-2]), int(x.shape[-1]))


def _shared(values: dict[fx.Node, Any]) -> set[fx.Node]:
    """The nodes whose memory another node's value holds too, as a view or after work in place."""
    owners: dict[int, set[fx.Node]] = defaultdict(set)
    for node, value in values.items():
        for tensor in tensors_in(value):
            owners[address_of(tensor)].add(node)
    return {node for place, nodes in owners.items() if place and len(nodes) > 1 for node in nodes}


def _apart(
    changed: Sequence[fx.Node], original: dict[fx.Node, Any], rewritten: dict[fx.Node, Any]
) -> dict[fx.Node, Any]:
    """Copies of what a node is about to change in the rewritten network alone, for values that the original still holds, and of
    all that lies in the same memory, which changes with it."""
    present = original | rewritten
    memory = _places(present[node] for node in changed)
    own = {node for node in changed if node not in rewritten}
    if not own and not memory & _places(original.values()):
        return {}
    together = [node for node, value in present.items() if node in own or memory & _places([value])]
    return dict(zip(together, copy.deepcopy([present[node] for node in together]), strict=True))


def _places(values: Iterable[Any]) -> set[int]:
    """Where the memory of all tensors in the values begins."""
    return {address_of(tensor) for value in values for tensor in tensors_in(value)} - {0}


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(nodes: Sequence[fx.Node], modules: dict[str, nn.Module], name: str) -> list[int]:
    """Positions at which a module is called, under any of its names."""
    module = modules.get(name)
    return [i for i, n in enumerate(nodes) if n.op == "call_module" and modules[str(n.target)] is module]


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    order = {node: i for i, node in enumerate(nodes)}
    return {node: max((order[user] for user in node.users), default=order[node]) for node in nodes}


def skips_first(graph: fx.GraphModule, sites: set[str]) -> list[fx.Node]:
    """The nodes in an order that computes a skip connection that holds no site before the branch it is added to.

    So the last convolution of the branch can be fitted to the sum. Only nodes of the skip itself move, and they stay if any of
    them works in place, or if a node that they would overtake changes in place what the skip starts from.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    nodes = list(graph.graph.nodes)
    for join in [n for n in nodes if n.target in ADDITIONS and len(n.args) == 2]:
        for skip in join.all_input_nodes:
            moved = _skip_nodes(skip, sites, modules)
            others = [n for n in join.all_input_nodes if n is not skip]
            if (
                moved
                and others
                and all(n not in moved for n in others)
                and not _overtakes_change(nodes, moved, modules)
            ):
                _move_up(nodes, moved)
    return nodes


def _skip_nodes(end: fx.Node, sites: set[str], modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The chain of single-use nodes that ends in ``end``, first to last; empty if it holds a site or works in place."""
    chain: list[fx.Node] = []
    node = end
    while node.op != "placeholder" and len(node.users) == 1 and len(node.all_input_nodes) == 1:
        if str(node.target) in sites or may_change(node, modules):
            return []
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    return chain if node.op == "placeholder" or len(node.users) > 1 else []


def _overtakes_change(nodes: list[fx.Node], moved: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether a node that the chain would overtake changes, in place, the memory the chain reads."""
    start = moved[0].all_input_nodes[0]
    overtaken = nodes[nodes.index(start) + 1 : nodes.index(moved[-1])]
    changed = {memory_of(source, modules) for node in overtaken for source in may_change(node, modules)}
    return memory_of(start, modules) in changed


def _move_up(nodes: list[fx.Node], moved: list[fx.Node]) -> None:
    """Put a chain directly behind the node it starts from, in place."""
    for node in moved:
        nodes.remove(node)
    start = nodes.index(moved[0].all_input_nodes[0]) + 1
    nodes[start:start] = moved
