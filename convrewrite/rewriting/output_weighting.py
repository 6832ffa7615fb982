"""How much each output channel of a site matters to the model's outputs.

An error ``e`` of a site's output changes the loss by about ``e^T F e / 2``, F the second moment of the loss gradient there. The
loss is taken against a label *sampled from the model's own distribution* (the Fisher information: no labels are needed): a class
for class scores, yes or no for every independent probability. For other numbers it is their product with a random direction
(Gauss-Newton), for embeddings with one along the sphere. BRECQ (Li et al. 2021) uses the diagonal of F; here F is the full matrix
over channels, mixed with the identity, since it is estimated from few inputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convrewrite.graph import Site
from convrewrite.inputs import Inputs
from convrewrite.layers import DynamicConv2d
from convrewrite.meanings import Meaning, Variation, along_axis
from convrewrite.modules import copy_model, hooked, named_outputs, run
from convrewrite.places import in_float64, out_of_memory
from convrewrite.process import quiet

SHARE = 0.4
"""The share of F in the weights; the rest is the identity."""

EXAMPLES, ENOUGH, LEAST_EXAMPLES = 256, 1 << 22, 32
"""F is estimated from at most this many inputs, and from at most this many numbers of input, as large images have many positions;
but from ``LEAST_EXAMPLES`` at least. Measured on the trained example, separable at 0.3: KL .0133 with 32 inputs, .0132 with 64,
.0134 with 256, .0161 without weights."""

CHUNK = 1 << 21
"""Numbers of input in one backward pass: 13 images of 3 x 224 x 224."""


def output_weights(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Inputs],
    seed: int,
    *,
    meanings: Mapping[str, Meaning],
    at_a_time: int | None = None,
) -> dict[str, Tensor]:
    """For every site ``G = (1 - SHARE) mean(diag F) I + SHARE F``, ``(O, O)`` in float64, scaled to a mean diagonal of one.

    ``meanings`` are those of the outputs. ``at_a_time``: how many examples the model takes, where it does not take any number.
    Sites that no gradient reaches have no entry; a model that cannot be differentiated has none at all.
    """
    if not batches:
        return {}
    chunks = list(_chunks(batches, at_a_time))
    sums: dict[str, Tensor] = {}
    # What a forward leaves on its modules would hold on to gradients, and a model with these cannot be copied any more.
    model = copy_model(model)
    generator = torch.Generator().manual_seed(seed)
    # Every site's output depends on it, so that gradients reach them all, even behind frozen parameters, integer inputs, and
    # operators without a derivative.
    anchor = torch.zeros((), device=batches[0][0].device, requires_grad=True)
    with hooked(_gradient_hooks(model, sites, sums, anchor)):
        try:
            scales = _scales(model, chunks, meanings)
            for inputs in chunks:
                _backward(model, inputs, meanings, scales, anchor, generator)
        except Exception as error:  # an operator without a derivative, or a forward that refuses gradients in any way
            if out_of_memory(error):
                raise
            return {}
    return {name: _mixed(total) for name, total in sums.items() if bool(total.any()) and _finite(total)}


def _finite(total: Tensor) -> bool:
    return bool(torch.isfinite(total).all())


def _mixed(second_moment: Tensor) -> Tensor:
    outputs = len(second_moment)
    normal = second_moment / second_moment.diagonal().mean()
    return SHARE * normal + (1 - SHARE) * torch.eye(outputs, dtype=normal.dtype, device=normal.device)


def _chunks(batches: Sequence[Inputs], at_a_time: int | None) -> Iterator[Inputs]:
    """At most ``EXAMPLES`` inputs, fewer where they are large, in parts that a backward pass has room for; for a model that takes
    a fixed number ``at_a_time``, in whole batches of that number."""
    left = min(EXAMPLES, max(LEAST_EXAMPLES, ENOUGH // max(1, batches[0][0][0].numel()))) if batches else 0
    for batch in batches:
        size = at_a_time or max(1, CHUNK // max(1, batch[0][0].numel()))
        most = len(batch[0]) if at_a_time else left
        for start in range(0, min(left, len(batch[0])), size):
            yield tuple(tensor[start : min(start + size, most)] for tensor in batch)
        left -= len(batch[0])
        if left <= 0:
            return


def _scales(model: nn.Module, chunks: Sequence[Inputs], meanings: Mapping[str, Meaning]) -> dict[str, Tensor]:
    """The scales of every output over all chunks, 1 where it is not of values. On a few examples they would be chance, and on one
    alone, a number would be weighed by its own square."""
    sums: dict[str, Variation] = {}
    some = any(meaning.kind == "values" for meaning in meanings.values())
    for inputs in chunks if some else ():
        for name, output in named_outputs(run(model, inputs)).items():
            if meanings[name].kind == "values":
                sums.setdefault(name, Variation(meanings[name])).see(output)
    return {name: sums[name].scales() if name in sums else torch.ones(1) for name in meanings}


def _backward(
    model: nn.Module,
    inputs: Inputs,
    meanings: Mapping[str, Meaning],
    scales: Mapping[str, Tensor],
    anchor: Tensor,
    generator: torch.Generator,
) -> None:
    with torch.enable_grad():
        with quiet():  # a graph module prints where it fails
            outputs = named_outputs(model(*(tensor.clone() for tensor in inputs)))  # the model may change them in place
        felt = {
            name: tensor
            for name, tensor in outputs.items()
            if tensor.requires_grad and tensor.numel() and meanings[name].counts
        }
        losses = [_loss(tensor, meanings[name], scales[name], generator) for name, tensor in felt.items()]
        if losses:
            torch.autograd.grad(torch.stack(losses).sum(), anchor, allow_unused=True)


def _loss(output: Tensor, meaning: Meaning, scales: Tensor, generator: torch.Generator) -> Tensor:
    """A loss whose gradient has the second moment that F is made of, times the output's weight; per example, a mean over
    positions. ``scales`` are those of the output over all inputs."""
    if meaning.scores:
        # Nothing can be drawn from a row without a distribution: it gets any class, and no gradient.
        log_scores = meaning.log_scores(torch.where(meaning.masked(output.detach(), output.detach()), 0.0, output))
        labels = torch.multinomial(log_scores.detach().exp().cpu(), 1, generator=generator).to(output.device)
        loss = -log_scores.gather(1, labels).sum() / (len(log_scores) / len(output)) ** 0.5
    elif meaning.kind == "multilabel":
        loss = _bernoulli_loss(output, generator)
    else:
        loss = _along_a_direction(output, meaning, scales, generator)
    return loss * meaning.weight**0.5


def _bernoulli_loss(output: Tensor, generator: torch.Generator) -> Tensor:
    least = torch.finfo(output.dtype).eps
    chances = output.clamp(least, 1 - least)
    labels = torch.bernoulli(chances.detach().cpu(), generator=generator).to(output.device)
    losses = labels * chances.log() + (1 - labels) * (1 - chances).log()
    return -losses.sum() / _size(output) ** 0.5


def _along_a_direction(output: Tensor, meaning: Meaning, scales: Tensor, generator: torch.Generator) -> Tensor:
    if meaning.kind == "embedding":  # its length does not count: only what turns it has a gradient
        output = nn.functional.normalize(output, dim=meaning.axis)
        scale = output.detach().square().mean()
    else:
        scale = along_axis(scales, output, meaning)
    direction = torch.randn(output.shape, generator=generator, dtype=output.dtype).to(output.device)
    weights = scale.clamp_min(torch.finfo(output.dtype).tiny).rsqrt()
    return (output * direction * weights).sum() / _size(output) ** 0.5


def _size(output: Tensor) -> int:
    return output[0].numel() if output.ndim else 1  # a mean over the batch has no axis


def _gradient_hooks(
    model: nn.Module, sites: Sequence[Site], sums: dict[str, Tensor], anchor: Tensor
) -> Iterator[RemovableHandle]:
    """Register hooks that add up ``sum g g^T`` over all positions of the gradient ``g`` at every site's output, its BatchNorm
    included.

    ``anchor``, a zero, is added to every one of these outputs.
    """
    for site in sites:
        module = model.get_submodule(site.batch_norm or site.name)
        yield module.register_forward_hook(_noting(site.name, sums, anchor))


def _noting(
    name: str, sums: dict[str, Tensor], anchor: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(gradient: Tensor) -> None:
        rows = gradient.transpose(0, 1).flatten(1).float()
        total = in_float64(rows @ rows.T)
        sums[name] = sums[name] + total if name in sums else total

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        anchored = output + anchor
        if not anchored.requires_grad:
            return output
        if not isinstance(module, DynamicConv2d):
            anchored.register_hook(add)
        elif args:  # its kernels are what is fitted, before they are mixed
            x = args[0].detach()
            anchored.register_hook(lambda gradient: add(module.stacked_gradient(gradient, x)))
        return anchored

    return hook


def roots_of(weights: Mapping[str, Tensor], site: Site) -> tuple[Tensor | None, ...]:
    """For every group of a site the upper triangular R with ``R^T R = G``; None where all outputs count alike."""
    groups = site.spec.groups
    if site.name not in weights:
        return (None,) * groups
    size = site.spec.out_channels // groups
    blocks = weights[site.name].unflatten(0, (groups, size)).unflatten(2, (groups, size))
    return tuple(torch.linalg.cholesky(blocks[g, :, g]).mT.contiguous() for g in range(groups))
