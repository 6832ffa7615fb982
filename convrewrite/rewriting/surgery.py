"""Surgery on a copy of the model: takes a site's kernel with its BatchNorm folded in, builds the module that the site becomes,
puts that in its place, and settles what is handed back.

Replacing through the parent needs no graph and keeps the user's own class, its other names and its state-dict keys.
"""

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from convrewrite.conv import Conv, ConvSpec, canonical_kernel, module_weight, show_geometry
from convrewrite.errors import TraceError
from convrewrite.graph import Lifted, Site, apply_lifts, lift_notes, needed_lifts
from convrewrite.inputs import Inputs
from convrewrite.layers import DynamicChain, DynamicConv2d, SumOfBranches, attention_parameters, stack
from convrewrite.modules import calls_counted, copy_model, preserved, replace_modules, run, tally
from convrewrite.places import in_float64
from convrewrite.state import parameters_of
from convrewrite.structures import Option, Stage, branch_kernels, branch_specs


def folded_kernel(model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """Canonical kernel and bias ``(O,)`` with the BatchNorm that follows the site folded in, in float64, on a device that has
    it."""
    conv = model.get_submodule(site.name)
    assert isinstance(conv, Conv | DynamicConv2d)
    weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
    if isinstance(conv, DynamicConv2d):
        weight, bias = stack(weight, conv.groups), None if bias is None else stack(bias, conv.groups)
    kernel = in_float64(canonical_kernel(weight, site.spec))
    bias = kernel.new_zeros(len(kernel)) if bias is None else in_float64(bias)
    if site.batch_norm is None:
        return kernel, bias
    norm = model.get_submodule(site.batch_norm)
    assert (
        isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
        and norm.running_mean is not None
        and norm.running_var is not None
    )
    scale = (in_float64(norm.running_var) + norm.eps).rsqrt()
    shift = -in_float64(norm.running_mean) * scale
    if norm.weight is not None:
        scale, shift = (value * in_float64(norm.weight.detach()) for value in (scale, shift))
    if norm.bias is not None:
        shift = shift + in_float64(norm.bias.detach())
    return kernel * scale[:, None, None, None], bias * scale + shift


def build_conv(spec: ConvSpec, kernel: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    """A convolution module with this canonical kernel, in the dtype and on the device of ``like``."""
    module = spec.build(like.dtype, like.device)
    with torch.no_grad():
        module.weight.copy_(module_weight(kernel, spec))
        if module.bias is not None:
            assert bias is not None, "the geometry asks for a bias"
            module.bias.copy_(bias)
    return module.eval()


def build_option(
    spec: ConvSpec,
    stages: Sequence[Stage],
    option: Option,
    kernels: Sequence[Tensor],
    bias: Tensor | None,
    like: Tensor,
) -> nn.Module:
    """The module that computes ``option`` in place of ``spec``, with the given canonical stage kernels."""
    specs = branch_specs(spec, stages, option.lowering)
    parts = branch_kernels(kernels, stages, option.lowering)
    chains = [
        nn.Sequential(*(build_conv(s, k, bias, like) for s, k in zip(chain, part, strict=True)))
        for chain, part in zip(specs, parts, strict=True)
    ]
    return (chains[0] if len(chains) == 1 else SumOfBranches(chains)).eval()


def empty_option(spec: ConvSpec, stages: Sequence[Stage], option: Option, like: Tensor) -> nn.Module:
    """The module of :func:`build_option`, without loading any weights."""
    chains = [
        nn.Sequential(*(s.build(like.dtype, like.device) for s in chain))
        for chain in branch_specs(spec, stages, option.lowering)
    ]
    return (chains[0] if len(chains) == 1 else SumOfBranches(chains)).eval()


def in_place_of(original: nn.Module, module: nn.Module) -> nn.Module:
    """The module as it can replace ``original``: for a dynamic convolution, a chain for its stacked kernels whose last stage
    mixes them. A single kernel is always taken in full, whatever the attention, so it may become any static chain."""
    if not isinstance(original, DynamicConv2d) or original.kernels == 1 or isinstance(module, DynamicChain):
        return module
    return DynamicChain.of(original, module)


def replace_site(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Put ``module`` in the site's place, wherever the model holds it; a folded BatchNorm becomes an identity."""
    original = model.get_submodule(site.name)
    module = in_place_of(original, module)
    if isinstance(module, DynamicChain) and isinstance(original, DynamicConv2d):
        module.attention = original.attention  # itself: other parts of the model may hold it, too
    module.train(original.training)
    show_geometry(original, module)
    _freeze_alike(original, module)
    replacements: dict[int, nn.Module] = {id(original): module}
    if site.batch_norm is not None:
        norm = model.get_submodule(site.batch_norm)
        replacements[id(norm)] = nn.Identity().train(norm.training)
    replace_modules(model, replacements)


def _freeze_alike(original: nn.Module, module: nn.Module) -> None:
    """Let the kernels of ``module`` train if the kernel of ``original`` does, and its biases if the original's bias does; if
    there is none, they follow the kernel. An attention stays as it is."""
    attention = {id(p) for one in (original, module) for p in attention_parameters(one)}
    kernels, biases = _kernels_and_biases(original, attention)
    for own, alike in zip(_kernels_and_biases(module, attention), (kernels, biases or kernels), strict=True):
        for parameter in own:
            parameter.requires_grad_(any(p.requires_grad for p in alike))


def _kernels_and_biases(module: nn.Module, left_out: Container[int]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """By their axes: the biases of a dynamic convolution have one for its kernels, too."""
    own = [p for p in parameters_of(module) if id(p) not in left_out]
    return [p for p in own if p.dim() > 2], [p for p in own if p.dim() <= 2]


def settle(original: nn.Module, lifted: Lifted, rewritten: nn.Module, sites: Sequence[Site]) -> Lifted:
    """The rewritten model with only those lifts that its rewritten ``sites`` need.

    Convolutions that were kept stay functions, and a module in which all were kept stays as it was written. All other state is
    that of ``original``, whatever runs have changed in ``rewritten``.
    """
    needed = needed_lifts(lifted.lifts, {site.name for site in sites})
    model = apply_lifts(original, needed) if needed else copy_model(original)
    notes = lift_notes(copy_model(original), model, needed) if needed else ()
    gone = tuple(model.get_parameter(f"{site.name}.weight") for site in sites)
    for site in sites:
        replace_site(model, site, rewritten.get_submodule(site.name))
    return Lifted(model, needed, lifted.reasons, notes, gone)


def counted_as_replaced(original: nn.Module, settled: Lifted, sites: Sequence[Site], inputs: Inputs) -> int:
    """The MACs of one example of the result, counted in a run that also checks that every rewritten site runs.

    ``original``: the model whose ``sites`` were rewritten. Raises TraceError where a site does not run as often as in it, or
    where the kernel that the site had is still used. What running changes in the result is put back.
    """
    with calls_counted({site.name: original.get_submodule(site.name) for site in sites}) as wanted:
        run(original, inputs)
    replaced = {site.name: settled.model.get_submodule(site.name) for site in sites}
    with preserved(settled.model), calls_counted(replaced) as calls:
        seen = tally(settled.model, inputs)
    missed = [
        site.name
        for site, weight in zip(sites, settled.gone, strict=True)
        if calls[site.name] != wanted[site.name] or seen.read(weight)
    ]
    if missed:
        raise TraceError(
            f"{', '.join(missed[:3])}: expected what was put in its place to run as often as it did, and nothing else to use "
            f"its weight, found otherwise; leave it out (--exclude {missed[0]}), or hold it as an attribute of its parent alone"
        )
    return seen.macs
