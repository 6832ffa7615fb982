"""Which convolutions can be replaced.

A replacement is called as the convolution is, and shows its stride and the like, but differs from it otherwise: a forward that
asks for ``self.conv.weight.device``, or that ``self.conv`` be an ``nn.Conv2d``, would fail or take another path; and a forward
that reaches the convolution by a reference that is not replaced would go on calling it. So the model is run with every site
wrapped; if the outputs change, or a wrapper is not called as often, it is run with one site wrapped at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from convrewrite.conv import NO_CONVOLUTION, show_geometry
from convrewrite.errors import PlanError, TraceError
from convrewrite.graph.checked import follow
from convrewrite.graph.lifting import Lifted, lift
from convrewrite.graph.lifts import apply_lifts
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import Traced, qualified
from convrewrite.inputs import Inputs, enlarged, varied
from convrewrite.modules import (
    Snapshot,
    alike,
    calls_counted,
    copy_model,
    kept_outputs,
    named_outputs,
    preserved,
    replace_modules,
    tally,
)
from convrewrite.names import require_names
from convrewrite.process import quiet
from convrewrite.state import address_of, parameters_of

REASON = (
    "the model asks more of it than to be called, as its weight or its type, which a replacement would not have; in an ONNX file "
    "exported from it, nothing asks"
)
HELD_ELSEWHERE = (
    "the model also reaches it in a way that a replacement does not: not every call came to what was put in its place"
)
WEIGHT_HELD_ELSEWHERE = (
    "the model also reaches its weight or bias in a way that a replacement does not, as through a plain list: something else "
    "than the convolution goes on using it"
)
LIFTED_LATE = "its forward can be followed only once it has run; run the model once before it is given"
OWN_WAYS: Mapping[str, tuple[tuple[str, ...], Callable[[nn.Module], object]]] = {
    "switch": (("train",), lambda model: model.train().eval()),
    "state": (("state_dict", "_save_to_state_dict", "get_extra_state"), lambda model: model.state_dict()),
    "move": (("_apply",), lambda model: model._apply(lambda tensor: tensor)),
}
"""What a class may do in its own way -> the methods that it overrides for that, and doing it."""

MADE_LATE = "the model makes it only when it runs; run it once before it is given"


def without_irreplaceable(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, with a refusal for each one whose module the model uses in another way than by calling it, or reaches by another
    reference too; and for those that the model does not hold before it runs. A BatchNorm that does not run as often as its
    convolution is not folded.

    ``model`` is as a caller has it: what a forward keeps from a run may hide what a fresh one asks of a part. What runs change in
    it is put back.
    """
    held = {name for name, _ in model.named_modules()}
    sites = [site if site.name in held else replace(site, refusal=site.refusal or MADE_LATE) for site in sites]
    active = [site for site in sites if site.refusal is None]
    trial = _Trial.begin(model, inputs, active)
    sites = [replace(site, batch_norm=None) if trial.goes_around(site) else site for site in sites]
    active = [site for site in sites if site.refusal is None]
    if trial.obstacle(active) is None:
        return tuple(sites)
    repeats = trial.repeats()  # if outputs never repeat, other outputs prove nothing
    return tuple(site if site.refusal is not None else trial.allowed(site, repeats) for site in sites)


def on_other_paths(model: nn.Module, others: Iterable[Inputs], sites: Sequence[Site]) -> tuple[Site, ...]:
    """:func:`without_irreplaceable` for other inputs, on which the model may take other paths. Those that it does not take show
    nothing."""
    for inputs in others:
        with suppress(TraceError):
            sites = without_irreplaceable(model, inputs, sites)
    return tuple(sites)


def _parts(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """The convolutions of sites, and the BatchNorms folded into them."""
    names = [name for site in sites for name in (site.name, site.batch_norm) if name is not None]
    return {name: model.get_submodule(name) for name in names}


@dataclass(frozen=True, slots=True)
class _Trial:
    """A model that is run with some of its parts wrapped, each time as it was ``before`` it ran. ``expected``: what it gives
    unwrapped, at a second run too where the first changes something in it, so that the second may ask for other things."""

    model: nn.Module
    inputs: Inputs
    before: Snapshot
    calls: Counter[str]
    expected: list[dict[str, Tensor]]

    @classmethod
    def begin(cls, model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> "_Trial":
        """Run the model as it is."""
        before = Snapshot(model, parameters=False)
        with calls_counted(_parts(model, sites)) as calls:
            expected = [kept_outputs(model, inputs, silent=True)]
            if before.changed():
                expected.append(kept_outputs(model, inputs, silent=True))
        before.restore()
        return cls(model, inputs, before, calls, expected)

    def goes_around(self, site: Site) -> bool:
        """Whether not every call of a site went on to the BatchNorm behind it."""
        return site.batch_norm is not None and self.calls[site.name] != self.calls[site.batch_norm]

    def repeats(self) -> bool:
        """Whether the model gives the same once more."""
        same = alike(self.expected[0], kept_outputs(self.model, self.inputs, silent=True))
        self.before.restore()
        return same

    def allowed(self, site: Site, repeats: bool) -> Site:
        """The site with what this trial shows: that it has to stay, or that its BatchNorm has to."""
        without_norm = replace(site, batch_norm=None)  # as it may be the BatchNorm that more is asked of
        for one in (site, without_norm) if site.batch_norm is not None else (site,):
            why = self.obstacle([one])
            if why is None or (why == REASON and not repeats):
                return one
        return replace(without_norm, refusal=why)

    def obstacle(self, sites: Sequence[Site]) -> str | None:
        """Why the model gives other outputs once the parts of these sites are wrapped, does not call each part as often as
        before, uses a tensor that a wrapped part does not have, or has no state then; None where nothing changes."""
        model, works = self.model, _works(self.model)
        parts = _parts(model, sites)
        wrappers = {part: nn.Sequential(part) for part in parts.values()}
        for part, wrapper in wrappers.items():
            show_geometry(part, wrapper)
        replace_modules(model, {id(part): wrapper for part, wrapper in wrappers.items()})
        same, reads = True, False
        try:
            with (
                _other_tensors(model, parts.values()) as tensors,
                calls_counted({name: wrappers[part] for name, part in parts.items()}) as outer,
                calls_counted(parts) as inner,
                quiet(),
            ):
                for outputs in self.expected:
                    seen = tally(model, self.inputs)
                    same &= alike(outputs, named_outputs(seen.output))
                    reads |= any(map(seen.read, tensors))
            same = same and _works(model) >= works
        except TraceError:
            return REASON
        finally:
            for wrapper in wrappers.values():
                wrapper.pop(0)  # or the part in it would be replaced by itself
            replace_modules(model, {id(wrapper): part for part, wrapper in wrappers.items()})
            self.before.restore()
        if any(outer[name] < inner[name] for name in parts):
            return HELD_ELSEWHERE
        if reads:
            return WEIGHT_HELD_ELSEWHERE
        return None if same and all(inner[name] == self.calls[name] for name in parts) else REASON


@contextmanager
def _other_tensors(model: nn.Module, parts: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the block these parts have copies of their parameters and buffers, as a replacement has its own; gives those that
    they had and no other part of the model has under a name."""
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    own = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    try:
        for table, name, tensor in own:
            copied = tensor.detach().clone()
            table[name] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        others = {address_of(tensor) for tensor in (*parameters_of(model), *model.buffers())} | {0}
        yield [tensor for _, _, tensor in own if address_of(tensor) not in others]
    finally:
        for table, name, tensor in own:
            table[name] = tensor


def _works(model: nn.Module) -> set[str]:
    """What works of what the classes of a model do in their own way: they may merge weights where it is put in train mode or
    back, and ask for them where it gives its state or is moved."""
    modules = list(model.modules())
    return {
        name
        for name, (methods, do) in OWN_WAYS.items()
        if any(_has_own(module, methods) for module in modules) and _succeeds(model, do)
    }


def _has_own(module: nn.Module, methods: Sequence[str]) -> bool:
    """Whether a class overrides one of these methods, besides torch's layers, which look at themselves alone, or hooks on its
    state do something."""
    found = [getattr(type(module), method) for method in methods]
    own = any(not str(method.__module__).startswith(nn.Module.__module__.rpartition(".")[0]) for method in found)
    return own or ("state_dict" in methods and bool(module._state_dict_hooks or module._state_dict_pre_hooks))


def _succeeds(model: nn.Module, do: Callable[[nn.Module], object]) -> bool:
    """Whether something can be done with a model; what that changes is put back."""
    try:
        with preserved(model):
            do(model)
    except Exception:  # any class may refuse in any way
        return False
    return True


def find(
    model: nn.Module, inputs: Inputs, beside: Sequence[Site] = (), refused: Mapping[str, str] = MappingProxyType({})
) -> tuple[Lifted, Traced, tuple[Site, ...]]:
    """The model with its functional convolutions lifted, its graphs and its sites; raises TraceError when it has none.

    ``beside`` are sites that cannot be found in the model, and come last; ``refused`` says, by name, why sites in it stay.
    """
    require_names(model, type(model).__name__)
    fresh = copy_model(model)
    lifted, fresh = _lifted_alike(lift(model, inputs), model, fresh)
    traced = follow(lifted.model, inputs)
    sites = find_sites(lifted.model, inputs, traced, lifted.reasons)
    if not sites and not beside:
        packed = any("quantized" in type(module).__module__.split(".") for module in model.modules())
        what = (
            "the model has no convolution of floating point numbers, as it is quantised; give the one that it was made from, and "
            "quantise the result"
            if packed
            else NO_CONVOLUTION
        )
        raise TraceError(f"{type(model).__name__}: {what}")
    sites = tuple(
        replace(site, refusal=refused[site.name], batch_norm=None) if site.name in refused else site for site in sites
    )
    sites = _as_written(model, lifted, inputs, without_irreplaceable(fresh, inputs, sites))
    if traced.whole is None or traced.unsized is not None:  # then other inputs may take other paths
        sites = on_other_paths(fresh, (varied(inputs), *enlarged(inputs)), sites)
    return lifted, traced, (*_with_what_makes_them(model, lifted, sites), *beside)


def _lifted_alike(lifted: Lifted, model: nn.Module, fresh: nn.Module) -> tuple[Lifted, nn.Module]:
    """What was lifted, and the same in a copy of the model that has not run; nothing where that one cannot be followed."""
    if not lifted.lifts:
        return lifted, fresh
    try:
        return lifted, apply_lifts(fresh, lifted.lifts)
    except PlanError:  # a forward that fills a cache when it runs first
        why = {qualified(one.module, c.weight): LIFTED_LATE for one in lifted.lifts for c in one.convs}
        return Lifted(model, reasons={**lifted.reasons, **why}), fresh


def _as_written(model: nn.Module, lifted: Lifted, inputs: Inputs, sites: Sequence[Site]) -> tuple[Site, ...]:
    """:func:`without_irreplaceable` in the model without its lifts too: the result has those alone that it needs, and a kernel
    that stays computed, as in a decoder with the weights of its encoder, may be computed from the weight of another site."""
    lifts = {qualified(one.module, conv.name) for one in lifted.lifts for conv in one.convs}
    if not lifts:
        return tuple(sites)
    others = without_irreplaceable(copy_model(model), inputs, [site for site in sites if site.name not in lifts])
    found = {site.name: site for site in others}
    return tuple(found.get(site.name, site) for site in sites)


def _with_what_makes_them(model: nn.Module, lifted: Lifted, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites. One whose kernel is computed at every call counts the parameters that it is computed from, which go when it is
    replaced; if it is computed from buffers alone, its kernel counts as parameters, as at other sites."""
    computed = {one.module for one in lifted.lifts if any(conv.computed for conv in one.convs)}
    found: list[Site] = []
    for site in sites:
        own = _own_parameters(model, site.name, computed) if site.name in computed else None
        found.append(replace(site, further_parameters=own - site.spec.parameters) if own is not None else site)
    return tuple(found)


def _own_parameters(model: nn.Module, name: str, computed: Iterable[str]) -> int | None:
    """How many numbers are in the parameters of a module that no other module holds; None where it has no parameters. Parts that
    only modules hold whose kernels are ``computed`` go with these."""
    module = model.get_submodule(name)
    own = set(module.modules())
    makers = {model.get_submodule(one) for one in computed}
    seen, waiting = set(makers), [model]
    while waiting:  # everything that the model holds by ways that do not lead through one of these
        part = waiting.pop()
        if part not in seen:
            seen.add(part)
            waiting += part.children()
    others = [part for part in model.modules() if part not in own or part in seen - makers]
    elsewhere = {id(p) for part in others for p in part._parameters.values()}
    parameters = list(parameters_of(module))
    return sum(p.numel() for p in parameters if id(p) not in elsewhere) if parameters else None
