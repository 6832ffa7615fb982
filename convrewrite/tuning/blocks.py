"""Features between inputs and outputs: where blocks end, and what named modules output there."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from convrewrite.inputs import Inputs
from convrewrite.modules import eval_mode, hooked, run

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh,
    nn.Softplus, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
"""If a module of one of these types follows a site in a chain, the site is compared at its output: what an activation cuts off
does not matter."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Types of modules that only hold others: their outputs are not joins."""


def joins(
    original: nn.Module, rewritten: nn.Module, sites: Mapping[str, str | None], inputs: Inputs
) -> tuple[str, ...]:
    """Names of modules at whose outputs both models are compared: for every rewritten site the block around it; or where there is
    none, or it does not output one tensor of the same shape in both, the activation behind the site, or the site itself.

    ``sites``: names of rewritten sites and of the BatchNorms that were folded into them. A block is the nearest module around a
    site that is neither a mere container nor the model itself: with residual connections its output is the result of a sum. Both
    models run on ``inputs``.
    """
    behind = {name: _activation(original, norm or name) for name, norm in sites.items()}
    around = {name: _block(original, name) for name in sites}
    wanted = {name for name in (*behind.values(), *around.values()) if name is not None}
    usable = _usable(original, rewritten, sorted(wanted), inputs)
    found: dict[str, None] = {}
    for name in sites:
        choice = next((place for place in (around[name], behind[name]) if place in usable), None)
        if choice is not None:
            found[choice] = None
    return tuple(found)


def _block(model: nn.Module, site: str) -> str | None:
    modules = dict(model.named_modules(remove_duplicate=False))
    name = site
    while name := name.rpartition(".")[0]:
        if not isinstance(modules.get(name, model), CONTAINERS):
            return name
    return None


def _activation(model: nn.Module, name: str) -> str:
    """The activation that follows a module in a chain of modules; the module itself where none does."""
    parent, _, key = name.rpartition(".")
    chain = model.get_submodule(parent)
    if not isinstance(chain, nn.Sequential):
        return name
    keys = list(chain._modules)
    after = keys[keys.index(key) + 1 :][:1]
    found = after and isinstance(chain._modules[after[0]], ACTIVATIONS)
    return f"{parent}.{after[0]}".lstrip(".") if found else name


def _usable(original: nn.Module, rewritten: nn.Module, names: Sequence[str], inputs: Inputs) -> set[str]:
    """The names of modules that output floating-point tensors of the same shape in both models, for whole batches: some of the
    examples alone need not be the same ones in both."""
    shown = []
    for model in (original, rewritten):
        with eval_mode(model), observed(model, names) as seen:
            run(model, inputs)
            shown.append({name: value.shape for name, value in seen.items() if value.is_floating_point()})
    first, second = shown
    examples = len(inputs[0])
    whole = {name for name, shape in first.items() if not shape or shape[0] % examples == 0 or examples in shape}
    return {name for name in whole if second.get(name) == first[name]}


@contextmanager
def observed(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds, after every run of the model within the block, the outputs of the modules of these names, with
    their graphs; for a module called several times the last output. Modules that do not return a single tensor, or are not
    called, are not in it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[str, Tensor] = {}

    def noted(name: str) -> RemovableHandle:
        def note(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                seen[name] = output

        return modules[name].register_forward_hook(note)

    def clear(_module: nn.Module, _inputs: object) -> None:
        seen.clear()

    def handles() -> Iterator[RemovableHandle]:
        yield model.register_forward_pre_hook(clear)
        for name in names:
            if name in modules:
                yield noted(name)

    with hooked(handles()):
        yield seen
