"""Which convolutions may have something else in their places.

What is put there is called as the convolution is, and is otherwise another thing: a forward that asks for
``self.conv.weight.device``, or that ``self.conv`` be an ``nn.Conv2d``, would fail or go another way. So the model is run
with every site wrapped; where that is not the same, with one after another.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from convrewrite.applying import copy_model, replace_modules
from convrewrite.errors import TraceError
from convrewrite.following import seeded_outputs
from convrewrite.inputs import Inputs
from convrewrite.outputs import alike
from convrewrite.sites import Site

REASON = (
    "the model asks more of it than to be called, as its attributes or its type, which a replacement would not have"
)


def without_irreplaceable(model: nn.Module, inputs: Inputs, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites, those refused that the model does not only call. The model is not touched."""
    active = [site for site in sites if site.refusal is None]
    trial = copy_model(model)
    expected = seeded_outputs(trial, inputs)
    if _same_if_wrapped(trial, active, inputs, expected) or not alike(expected, seeded_outputs(trial, inputs)):
        return tuple(sites)  # one that never gives the same twice says nothing
    alone = {site.name for site in active if not _same_if_wrapped(trial, [site], inputs, expected)}
    return tuple(replace(site, refusal=REASON, batch_norm=None) if site.name in alone else site for site in sites)


def _same_if_wrapped(model: nn.Module, sites: Sequence[Site], inputs: Inputs, expected: dict[str, Tensor]) -> bool:
    """Whether the model gives the same with these sites, and the BatchNorms folded into them, one level further down."""
    names = [name for site in sites for name in (site.name, site.batch_norm) if name is not None]
    wrapped = {part: nn.Sequential(part) for part in map(model.get_submodule, names)}
    replace_modules(model, {id(part): wrapper for part, wrapper in wrapped.items()})
    try:
        return alike(expected, seeded_outputs(model, inputs))
    except TraceError:
        return False
    finally:
        for part, wrapper in wrapped.items():
            wrapper.pop(0)  # or the part in it would be replaced by itself
            replace_modules(model, {id(wrapper): part})
