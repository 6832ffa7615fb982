"""Find the convolutions of a model: one site per convolution with all its call places.

Sites are found by *running* the model, which works for any control flow; the graph adds what runs cannot show: the
BatchNorm that directly follows, and depthwise convolutions directly followed by their pointwise.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod

from convrewrite.conv import CONV_TYPES, ConvSpec, Cost, Kind, Size, classify
from convrewrite.errors import TraceError
from convrewrite.graph.calls import SITE_TYPES, Call, observe, spec_of
from convrewrite.graph.plain import odd_modules
from convrewrite.graph.tracing import Traced, module_calls
from convrewrite.graph.volumes import REFUSAL, VOLUME_TYPES, Volume, VolumeSpec
from convrewrite.inputs import varied
from convrewrite.layers import DynamicConv2d, KernelAttention
from convrewrite.state import named_parameters_of, parameters_of

BATCH_NORMS: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
"""Types of BatchNorm by the number of dimensions of the convolution they follow."""


OWN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""What convolutions and BatchNorms hold."""

COMPUTED: dict[bool | None, str] = {
    True: "the kernel is computed from the input",
    False: "the kernel is no parameter or buffer, but computed at every call or held elsewhere",
    None: "the kernel is computed at every call; from what does not show, as the model does not run on other numbers",
}
"""Whether a kernel depends on the input -> why its convolution stays."""


@dataclass(frozen=True, slots=True)
class Site:
    """One convolution of a model.

    ``input_sizes`` has one entry per call of one example; ``batch_norm`` names the BatchNorm that alone directly follows, and
    ``norm_parameters`` counts its parameters; ``refusal`` says why this site cannot be rewritten at all, whatever the rules say.
    ``examples``: how many examples ``input_sizes`` are for together, where there is no telling them apart.
    ``further_parameters``: of a kernel that is computed at every call, by how many its parameters outnumber its entries.
    """

    name: str
    kind: Kind
    spec: ConvSpec
    input_sizes: tuple[Size, ...]
    batch_norm: str | None = None
    refusal: str | None = None
    is_stem: bool = False
    norm_parameters: int = 0
    further_parameters: int = 0
    examples: int = 1

    @property
    def calls(self) -> int:
        """How often it is called for one example, 1 if it is never called."""
        return max(1, len(self.input_sizes) // self.examples)

    @property
    def folded_spec(self) -> ConvSpec:
        """The geometry once the BatchNorm is folded: it always has a bias then."""
        return replace(self.spec, bias=self.spec.bias or self.batch_norm is not None)

    @property
    def cost(self) -> Cost:
        """Parameters (including those of the BatchNorm that would be folded, and those that the kernel is computed from) and MACs
        of one example."""
        own, folded = self.spec.cost(self.input_sizes), self.norm_parameters if self.batch_norm else 0
        return Cost(own.parameters + folded + self.further_parameters, own.macs // self.examples)


def find_sites(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    traced: Traced,
    unlifted: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Site, ...]:
    """Every convolution that a run on ``inputs`` calls, in order of its first call, then those never called.

    ``unlifted`` says, by name of a weight, why a functional call on it stays one (:mod:`convrewrite.graph.lifting`).
    """
    seen = observe(model, inputs)
    executed = _executed(model, traced, seen.runs)
    followers = _batch_norms(model, executed, seen.runs)
    odd = odd_modules(model, inputs, _replaceable(seen.calls, followers))
    separable = _separable_pairs(model, executed)
    shared = _shared_parameters(model)
    in_functions = {id(weight) for call in seen.calls.values() for weight in call.weights}
    sites: list[Site] = []
    for name, call in seen.calls.items():
        kind = Kind.SEPARABLE if name in separable else classify(call.spec)
        if call.module is None:
            if not isinstance(
                model.get_submodule(call.owner), (*SITE_TYPES, *VOLUME_TYPES)
            ):  # the site is the module then
                sites.append(_functional_site(model, inputs, name, call, unlifted))
            continue
        refusal = call.refusal or _refusal(name, call.module, shared, unlifted)
        if refusal is None and id(call.module.weight) in in_functions:
            refusal = "a functional call uses its weight too, which a replacement would not have"
        refusal = refusal or odd.get(name)
        follower = followers.get(name) if refusal is None and followers.get(name) not in odd else None
        folded = 0 if follower is None else sum(p.numel() for p in parameters_of(model.get_submodule(follower)))
        sizes, examples = _sizes(call, inputs)
        sites.append(Site(name, kind, call.spec, sizes, follower, refusal, norm_parameters=folded, examples=examples))
    if sites:
        sites[0] = replace(sites[0], is_stem=True)
    return (*sites, *_never_called(model, seen.calls))


def _replaceable(calls: Mapping[str, Call], followers: Mapping[str, str]) -> set[str]:
    """Plain convolutions, and the BatchNorms behind them: the modules whose replacements are made from their attributes."""
    convs = {name for name, call in calls.items() if type(call.module) in CONV_TYPES and not call.refusal}
    return convs | set(followers.values())


def _functional_site(
    model: nn.Module, inputs: tuple[Tensor, ...], name: str, call: Call, unlifted: Mapping[str, str]
) -> Site:
    """A convolution called as a function: on a parameter or buffer, or with a kernel computed on the way."""
    owned = {id(tensor): key for key, tensor in [*named_parameters_of(model), *model.named_buffers()]}
    key = owned.get(id(call.weights[0]))
    kind = classify(call.spec)
    if isinstance(call.spec, VolumeSpec):
        reason = REFUSAL
    elif key is not None:
        reason = f"a functional call on {key}: {unlifted.get(key, 'only convolution modules are rewritten')}"
    elif isinstance(call.weights[0], nn.Parameter):
        reason = (
            "torch does not see that the model holds its kernel, as in a plain list: use an attribute or a ModuleList"
        )
    else:
        depends = _depends_on_input(model, inputs, name, call.weights[0])
        kind = Kind.DYNAMIC if depends else kind
        reason = COMPUTED[depends]
    sizes, examples = _sizes(call, inputs)
    return Site(name, kind, call.spec, sizes, refusal=reason, examples=examples)


def _sizes(call: Call, inputs: tuple[Tensor, ...]) -> tuple[tuple[Size, ...], int]:
    """The sizes of a convolution's inputs, and for how many examples these are."""
    return (tuple(call.sizes), 1) if call.even else (tuple(call.all_sizes), len(inputs[0]))


def _depends_on_input(model: nn.Module, inputs: tuple[Tensor, ...], name: str, weight: Tensor) -> bool | None:
    """Whether a kernel is another one for other inputs; None where the model runs on no others."""
    try:
        again = observe(model, varied(inputs)).calls.get(name)
    except TraceError:  # it may refuse what cannot be an input of it
        return None
    return again is None or not torch.equal(again.weights[0], weight)


def _called(kind: type[nn.Module]) -> str:
    """A type's name, with its module's where a type that it derives from has the same name."""
    plain = any(kind.__name__ == base.__name__ for base in kind.__mro__[1:])
    return f"{kind.__module__}.{kind.__name__}" if plain else kind.__name__


def _refusal(name: str, module: nn.Module, shared: dict[int, list[str]], unlifted: Mapping[str, str]) -> str | None:
    """Why a module cannot be replaced at all."""
    if isinstance(module, VOLUME_TYPES):
        return REFUSAL
    if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        return "is pruned by a hook, which a replacement would lose; call torch.nn.utils.prune.remove on it before"
    if type(module) not in SITE_TYPES:
        why = unlifted.get(f"{name}.weight", "")
        return (
            f"{_called(type(module))} is a subclass of a convolution and may have a forward of its own"
            + (f": {why}" if why else "")
            + "; a plain convolution that its forward calls would be a site"
        )
    if "forward" in vars(module):
        return "the module's forward is replaced on the instance"
    others = [owner for owner in shared.get(id(module.weight), []) if owner != name]
    if others:
        return f"shares its weight with {', '.join(others)}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which a replacement would lose"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks, which a replacement would lose"
    more = _more_than_its_own(module)
    if more is not None:
        return f"holds {more} besides its weight and bias, which a replacement would lose"
    weight = module.weight
    if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter):
        return "its weight is no parameter, so that other code may put another one in its place at any time"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return f"its weight is {getattr(weight, 'dtype', 'missing')}, not a floating point number"
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinity"
    assert isinstance(module, SITE_TYPES)
    if isinstance(module, DynamicConv2d) and module.kernels == 1 and type(module.attention) is not KernelAttention:
        return "it has a single kernel, and an attention of its own that may not always take all of it"
    spec = spec_of(module)
    if spec.padding == "same" and spec.stride != (1, 1):
        return "it strides over an uneven padding, which no static convolution can do"
    return None


def _more_than_its_own(module: nn.Module) -> str | None:
    """The name of a parameter, buffer or part that other code has put on a convolution or a BatchNorm, as a mask, if any."""
    if isinstance(module, DynamicConv2d):
        return None
    held = {**module._parameters, **module._buffers, **module._modules}
    return next((name for name, part in held.items() if part is not None and name not in OWN), None)


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def _executed(model: nn.Module, traced: Traced, runs: Counter[int]) -> Traced:
    """The graphs of modules that the run called: it may use the submodules of any other module in another way."""
    parts, unsized = (
        {name: graph for name, graph in graphs.items() if runs[id(model.get_submodule(name))]}
        for graphs in (traced.parts, traced.at_any_size)
    )
    return replace(traced, parts=parts, unsized=unsized)


def _batch_norms(model: nn.Module, traced: Traced, runs: Counter[int]) -> dict[str, str]:
    """Convolution -> the BatchNorm that can be folded into it: both are called once, and only it uses the convolution's output.

    A convolution called from two places with a BatchNorm after only one of them is not folded: folding would change the
    other place as well. Nor is one whose BatchNorm is known to follow at this input size only: at another, the path may differ.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs: dict[str, str] = {}
    for name, node, follower, _ in _sole_followers(traced.at_any_size):
        conv, norm = modules[name], modules[follower]
        wanted = BATCH_NORMS.get(ConvSpec.of(conv).dims) if type(conv) in CONV_TYPES else None
        foldable = wanted is not None and type(norm) is wanted and node.args[1:] == ()
        foldable = foldable and not norm.training and _is_finite(norm) and _more_than_its_own(norm) is None
        hooked = norm._forward_hooks or norm._forward_pre_hooks
        if foldable and not hooked and runs[id(conv)] == runs[id(norm)] == 1:
            pairs[name] = follower
    return pairs


def _is_finite(norm: nn.Module) -> bool:
    """Whether the factors ``1 / sqrt(variance + eps)`` of a BatchNorm are finite: not where a variance and eps are both zero."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    assert isinstance(norm.running_var, Tensor)
    scale = (norm.running_var.detach().double() + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    return bool(scale.isfinite().all())


def _separable_pairs(model: nn.Module, traced: Traced) -> set[str]:
    """Names of depthwise convolutions directly followed by a pointwise one, and of these pointwise ones."""
    modules = dict(model.named_modules(remove_duplicate=False))
    followers = {name: follower for name, _, follower, _ in _sole_followers(traced.parts)}
    found: set[str] = set()
    for name, follower in followers.items():
        after = followers.get(follower) if type(modules[follower]) in BATCH_NORMS.values() else follower
        conv, pointwise = modules[name], modules[after] if after else None
        if not (type(conv) is type(pointwise) is nn.Conv2d or type(conv) is type(pointwise) is nn.Conv1d):
            continue
        if classify(ConvSpec.of(conv)) is Kind.DEPTHWISE and classify(ConvSpec.of(pointwise)) is Kind.POINTWISE:
            found |= {name, str(after)}
    return found


def _sole_followers(graphs: Mapping[str, fx.GraphModule]) -> Iterator[tuple[str, fx.Node, str, fx.Node]]:
    """(module, its node, the module that alone uses its output, the node of that module)."""
    by_node = {node: name for name, node in module_calls(graphs)}
    for node, name in by_node.items():
        users = list(node.users)
        if len(users) == 1 and users[0] in by_node and users[0].args[:1] == (node,):
            yield name, node, by_node[users[0]], users[0]


def _never_called(model: nn.Module, calls: Mapping[str, Call]) -> list[Site]:
    reason = "a run on the example input never calls it"
    found: list[Site] = []
    for name, module in model.named_modules():
        if isinstance(module, (*SITE_TYPES, *VOLUME_TYPES)) and name not in calls:
            spec = Volume.of(module).spec() if isinstance(module, VOLUME_TYPES) else spec_of(module)
            found.append(Site(name, classify(spec), spec, (), refusal=reason))
    return found
