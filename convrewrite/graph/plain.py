"""Whether convolutions and BatchNorms compute what their attributes say.

Replacing a convolution and folding a BatchNorm rely on their attributes. Other code may have made these untrue since the module
was made: a padding that was set afterwards, a kernel that was cut by pruning, a forward or part of one that was put on the
instance, a hook that torch calls for every module. So each module is called once more on its own first input, and compared with
what its attributes say.
"""

from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from convrewrite.conv import CONV_TYPES, Conv, ConvSpec
from convrewrite.modules import alike, hooked, run


def odd_modules(model: nn.Module, inputs: tuple[Tensor, ...], names: Collection[str]) -> dict[str, str]:
    """The named convolutions and BatchNorms that do not compute what their attributes say -> a sentence on it."""
    looker = _Looker()
    with hooked(looker.handles(model, names)):
        run(model, inputs)
    return looker.found


class _Looker:
    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: set[str] = set()

    def handles(self, model: nn.Module, names: Collection[str]) -> Iterator[RemovableHandle]:
        for name in names:

            def look(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any, name: str = name
            ) -> None:
                if name in self._seen:  # only the first call counts, and not the one that is made below
                    return
                self._seen.add(name)
                odd = _odd(module, args[0] if args else next(iter(kwargs.values())))
                if odd is not None:
                    self.found[name] = odd

            yield model.get_submodule(name).register_forward_hook(look, with_kwargs=True)


def _odd(module: nn.Module, x: Tensor) -> str | None:
    if isinstance(module, CONV_TYPES):
        return _odd_convolution(module, x)
    plain = F.batch_norm(
        x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps  # type: ignore[arg-type]
    )  # fmt: skip
    return None if _same(module(x), plain) else "it computes something else than its attributes say"


def _odd_convolution(module: Conv, x: Tensor) -> str | None:
    spec = ConvSpec.of(module)
    if module.weight.shape != spec.weight_shape:
        shape = " x ".join(map(str, module.weight.shape))
        return (
            f"its attributes say {spec.describe()}, but its weight is {shape}; set in_channels, out_channels, groups and "
            "kernel_size to what it is"
        )
    if _same(module(x), _convolved(spec.build(device="meta"), x, module.weight, module.bias)):
        return None
    return (
        f"it computes something else than its attributes say ({spec.describe()}): they were changed after it was made, or a hook "
        "or other code stands in place of its own; make a new layer of them"
    )


def _convolved(geometry: Conv, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What this geometry gives, by functions alone: torch calls some hooks for every module, and its classes may be changed."""
    g = geometry
    if isinstance(g, nn.ConvTranspose1d | nn.ConvTranspose2d):
        transpose: Any = F.conv_transpose1d if isinstance(g, nn.ConvTranspose1d) else F.conv_transpose2d
        return transpose(x, weight, bias, g.stride, g.padding, g.output_padding, g.groups, g.dilation)
    convolve: Any = F.conv1d if isinstance(g, nn.Conv1d) else F.conv2d
    padding: Any = g.padding
    if g.padding_mode != "zeros":
        x, padding = F.pad(x, g._reversed_padding_repeated_twice, mode=g.padding_mode), 0
    return convolve(x, weight, bias, g.stride, padding, g.dilation, g.groups)


def _same(found: object, plain: Tensor) -> bool:
    return isinstance(found, Tensor) and alike({"": found}, {"": plain})
