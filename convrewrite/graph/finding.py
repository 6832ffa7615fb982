"""Which convolutions can be replaced.

A replacement is called as the convolution is, and shows its stride and the like, but differs from it otherwise: a forward that
asks for ``self.conv.weight.device``, or that ``self.conv`` be an ``nn.Conv2d``, would fail or take another path; and a forward
that reaches the convolution by a reference that is not replaced would go on calling it. So the model is run with every site
wrapped; if the outputs change, or a wrapper is not called as often, it is run with one site wrapped at a time.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor, nn

from convrewrite.conv import NO_CONVOLUTION, show_geometry
from convrewrite.errors import TraceError
from convrewrite.graph.checked import follow
from convrewrite.graph.lifting import Lifted, lift
from convrewrite.graph.sites import Site, find_sites
from convrewrite.graph.tracing import Traced
from convrewrite.inputs import Inputs
from convrewrite.modules import alike, calls_counted, copy_model, preserved, replace_modules, seeded_outputs
from convrewrite.names import require_names
from convrewrite.state import parameters_of

REASON = "the model asks more of it than to be called, as its weight or its type, which a replacement would not have"
HELD_ELSEWHERE = (
    "the model also reaches it in a way that a replacement does not: not every call came to what was put in its place"
)


def without_irreplaceable(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, with a refusal for each one whose module the model uses in another way than by calling it, or reaches by another
    reference too. The model is not touched."""
    active = [site for site in sites if site.refusal is None]
    trial = copy_model(model)
    with calls_counted(_parts(trial, active)) as calls:
        expected = seeded_outputs(trial, inputs)
    if _obstacle(trial, active, inputs, expected, calls) is None:
        return tuple(sites)
    repeats = alike(expected, seeded_outputs(trial, inputs))  # if outputs never repeat, other outputs prove nothing
    reasons = {site.name: _obstacle(trial, [site], inputs, expected, calls) for site in active}
    refusals = {name: why for name, why in reasons.items() if why == HELD_ELSEWHERE or (why is not None and repeats)}
    return tuple(
        replace(site, refusal=refusals[site.name], batch_norm=None) if site.name in refusals else site for site in sites
    )


def _parts(model: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Module]:
    """The convolutions of sites, and the BatchNorms folded into them."""
    names = [name for site in sites for name in (site.name, site.batch_norm) if name is not None]
    return {name: model.get_submodule(name) for name in names}


def _obstacle(
    model: nn.Module, sites: Sequence[Site], inputs: Inputs, expected: dict[str, Tensor], calls: Counter[str]
) -> str | None:
    """Why the model gives other outputs once the parts of these sites are wrapped, or does not call each part as often as before;
    None where nothing changes."""
    parts, switches = _parts(model, sites), _switches(model)
    wrappers = {part: nn.Sequential(part) for part in parts.values()}
    for part, wrapper in wrappers.items():
        show_geometry(part, wrapper)
    replace_modules(model, {id(part): wrapper for part, wrapper in wrappers.items()})
    try:
        with (
            calls_counted({name: wrappers[part] for name, part in parts.items()}) as outer,
            calls_counted(parts) as inner,
        ):
            same = alike(expected, seeded_outputs(model, inputs)) and (_switches(model) or not switches)
    except TraceError:
        return REASON
    finally:
        for wrapper in wrappers.values():
            wrapper.pop(0)  # or the part in it would be replaced by itself
        replace_modules(model, {id(wrapper): part for part, wrapper in wrappers.items()})
    if any(outer[name] < inner[name] for name in parts):
        return HELD_ELSEWHERE
    return None if same and all(inner[name] == calls[name] for name in parts) else REASON


def _switches(model: nn.Module) -> bool:
    """Whether the model can be put in train mode and back: a class that overrides ``train`` may do more, as merge weights."""
    own = [module for module in model.modules() if type(module).train is not nn.Module.train]
    if not own:
        return True
    try:
        with preserved(model):
            model.train()
            model.eval()
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
    lifted = lift(model, inputs)
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
    sites = without_irreplaceable(lifted.model, inputs, sites)
    return lifted, traced, (*_with_what_makes_them(model, lifted, sites), *beside)


def _with_what_makes_them(model: nn.Module, lifted: Lifted, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites. One whose kernel is computed at every call counts the parameters that it is computed from, which go when it is
    replaced; if it is computed from buffers alone, its kernel counts as parameters, as at other sites."""
    computed = {one.module for one in lifted.lifts if any(conv.computed for conv in one.convs)}
    found: list[Site] = []
    for site in sites:
        own = _own_parameters(model, site.name) if site.name in computed else None
        found.append(replace(site, further_parameters=own - site.spec.parameters) if own is not None else site)
    return tuple(found)


def _own_parameters(model: nn.Module, name: str) -> int | None:
    """How many numbers are in the parameters of a module that no other module holds; None where it has no parameters."""
    module = model.get_submodule(name)
    own = {id(part) for part in module.modules()}
    elsewhere = {id(p) for part in model.modules() if id(part) not in own for p in part._parameters.values()}
    parameters = list(parameters_of(module))
    return sum(p.numel() for p in parameters if id(p) not in elsewhere) if parameters else None
