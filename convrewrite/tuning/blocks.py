"""Features on the way to the outputs: where blocks end, and what modules of a name give there."""

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
"""Types of modules behind a site in a chain at which it is compared instead: what an activation cuts off does not matter."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Types of modules that only hold others: their end is no join."""


def joins(
    original: nn.Module, rewritten: nn.Module, sites: Mapping[str, str | None], inputs: Inputs
) -> tuple[str, ...]:
    """Names of modules at whose outputs both models are compared: for every rewritten site the block around it, and where
    there is none, or it does not give one tensor of the same shape in both, the site and the activation behind it.

    ``sites``: names of rewritten sites and of the BatchNorms that were folded into them. A block is the nearest module around
    a site that is no mere container and not the model itself: with residual connections its output is the end of a sum.
    Both models run on ``inputs``.
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
    """The names under which both models gave tensors of numbers of the same shape."""
    shown = []
    for model in (original, rewritten):
        with eval_mode(model), observed(model, names) as seen:
            run(model, inputs)
            shown.append({name: value.shape for name, value in seen.items() if value.is_floating_point()})
    first, second = shown
    return {name for name, shape in first.items() if second.get(name) == shape}


@contextmanager
def observed(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that has, after every run of the model within the block, what the modules of these names gave, with its
    gradients; of a module called several times the last. What gives no single tensor, or is not called, is not in it."""
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
