"""The inputs of every site, front to back: in the original network and behind the prefix that is already rewritten.

With a graph of the whole model, activations are kept from site to site, so each layer runs once per stream however many sites
there are. Without a graph, or for a site with several calls, the model is run again for that site; so is one that draws random
numbers, as two runs draw the same only from their beginning on, and one that may hand on something beside its graph, in which
batches would mix. Activations beyond a memory limit wait on disk.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.errors import FitError
from convrewrite.graph import Site, Traced
from convrewrite.inputs import Inputs
from convrewrite.machine import give_back_heap
from convrewrite.modules import copy_model, hooked, run
from convrewrite.places import PROCESSOR
from convrewrite.rewriting.samples import Sample
from convrewrite.rewriting.streams import Streams
from convrewrite.rewriting.surgery import build_conv, folded_kernel, replace_site

SHARE = 0.4
"""Part of the memory that activations take at most. The rest waits on disk, which costs little time, as the system caches files
in whatever memory is free. With all of 4 GB, a VGG-16 with 256 inputs of 224 x 224 took 5.4 GB, with half of it 4.4, with two
fifths 3.9; its forward passes took 48, 57 and 57 s of three minutes."""


NORMS_NOT_ALL = (
    "on some calibration inputs its BatchNorm does not follow it, so it cannot be folded into what replaces it"
)
"""Why a site stays whose model takes another path on other inputs."""


class Propagation:
    """Walks all batches through both networks, site by site. ``rewritten`` is the copy that is being rewritten."""

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        sites: Sequence[Site],
        batches: Sequence[Inputs],
        memory: int,
        start: nn.Module | None = None,
    ) -> None:
        """``memory`` in bytes bounds what is kept: activations, and what :meth:`make_room` asks for. ``start``: a copy of the
        model in which all ``sites`` are rewritten already, to walk through once more."""
        self.model = model
        self.memory = memory
        before = model if start is None else start  # a model may have a length of zero
        self.rewritten = copy_model(before, sharing=_untouched(before))
        self._batches = batches
        self.batches = len(batches)
        self.examples = [len(inputs[0]) for inputs in batches]
        self._streams: Streams | None = None
        self._passed: list[tuple[Site, nn.Module | None]] = []
        give_back_heap()
        if traced.whole is not None and not traced.draws and not traced.stateful:
            self._streams = Streams(traced.whole, sites, batches, self._for_activations(0))
            for site in sites:
                if _folds(model, site):
                    self._streams.fold(site, _folded(model, site))
            for site in sites if start is not None else ():
                self._streams.foresee(site, self.rewritten.get_submodule(site.name))

    def way_to(self, site: Site) -> list[str]:
        """What runs before a site, by name and in order; the order also depends on the sites behind it. Empty without a graph."""
        return [] if self._streams is None else self._streams.ahead(site.name)

    def samples(self, site: Site) -> Iterator[Sample]:
        """One sample per batch and call, to be taken once, before :meth:`replace` is called for this site."""
        mixture = _mixture(self.model, site)
        if self._streams is not None and self._at(self._streams, site):
            return self._streams.samples(site, mixture)
        return self._rerun(site, mixture)

    def make_room(self, size: int) -> None:
        """From now on activations leave ``size`` bytes of the memory free for other things."""
        if self._streams is not None:
            self._streams.store.shrink(self._for_activations(size))

    def _for_activations(self, others: int) -> int:
        """Bytes that activations may take, where other things take ``others`` bytes."""
        return max(0, min(int(SHARE * self.memory), self.memory - others))

    def rectified(self, site: Site) -> bool:
        """Whether only a ReLU uses the output of this site, or the sum that its samples' skips belong to."""
        return self._streams is not None and self._at(self._streams, site) and self._streams.rectified(site)

    def outputs(self, site: Site, module: nn.Module, batches: Sequence[int]) -> Iterator[Any]:
        """The rewritten network's outputs for these batches with ``module`` at the site, where it stays only for this.

        Only what lies behind the site is run, where the graph of the whole model shows what that is.
        """
        if self._streams is not None and self._at(self._streams, site):
            for index in batches:
                yield self._streams.finish(index, site, module)
            return
        trial = copy_model(self.rewritten)
        replace_site(trial, site, module)
        for index in batches:
            yield run(trial, self._batches[index])

    def replace(self, site: Site, module: nn.Module, stand_in: nn.Module | None = None) -> None:
        """From here on the rewritten network has ``module`` at this site. ``stand_in`` computes the same in less time."""
        replace_site(self.rewritten, site, module)
        if self._streams is not None:
            self._streams.replace(site, module if stand_in is None else stand_in)

    def pass_over(self, site: Site, module: nn.Module | None = None, stand_in: nn.Module | None = None) -> None:
        """Skip a site, as if its samples had been taken and ``module``, if there is one, put in its place. Nothing runs until a
        later site asks for samples."""
        if module is not None:
            replace_site(self.rewritten, site, module)
        self._passed.append((site, module if stand_in is None else stand_in))

    def _at(self, streams: Streams, site: Site) -> bool:
        """Run the streams to a site. Sites that were passed over leave the streams as they would have without that."""
        passed, self._passed = self._passed, []
        for other, module in passed:
            if streams.advance(other.name):
                for _ in streams.samples(other, _mixture(self.model, other)):
                    pass
            if module is not None:
                streams.replace(other, module)
        return streams.advance(site.name)

    def close(self) -> None:
        """Let go of the activations, on disk too."""
        if self._streams is not None:
            self._streams.store.close()

    def _rerun(self, site: Site, mixture: nn.Module | None) -> Iterator[Sample]:
        for index, inputs in enumerate(self._batches):
            before = _calls_of(self.model, site, inputs)
            after = _calls_of(self.rewritten, site, inputs)
            for (x, output), (rewritten, _) in zip(before, after, strict=False):
                sample = Sample(index, rewritten, output if mixture is None else mixture(x))
                yield sample.of_the_same_examples(x, self.examples[index])


def _untouched(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that neither a rewrite nor a forward changes, so that two copies can share them: those of linear layers, which
    are most of some models (0.5 GB in the three of a VGG-16). On a device each copy has its own, as one of the two leaves it
    first."""
    linear = (module for module in model.modules() if type(module) is nn.Linear)
    parameters = (parameter for module in linear for parameter in module.parameters(recurse=False))
    return [parameter for parameter in parameters if parameter.device.type == PROCESSOR]


def _mixture(model: nn.Module, site: Site) -> nn.Module | None:
    """For a dynamic convolution, one with all kernels that it mixes and an output for each, as these are what is fitted."""
    return None if site.spec.kernels == 1 else _folded(model, site)


def _folds(model: nn.Module, site: Site) -> bool:
    """Whether a site and the BatchNorm behind it may run as one operator: in half precision the difference in rounding would
    show."""
    weight = model.get_submodule(site.name).weight
    return site.batch_norm is not None and site.spec.kernels == 1 and weight.dtype in (torch.float32, torch.float64)


def _folded(model: nn.Module, site: Site) -> nn.Module:
    """A site's convolution and the BatchNorm that follows it as one convolution; for a dynamic one, with all its kernels."""
    kernel, bias = folded_kernel(model, site)
    like = model.get_submodule(site.name).weight
    assert isinstance(like, Tensor)
    return build_conv(site.folded_spec, kernel, bias, like).requires_grad_(False)


def _calls_of(model: nn.Module, site: Site, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Input and output of a convolution at each of its calls in one forward, its BatchNorm included where one is folded. Raises
    FitError where that does not follow at every call."""
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(_batched(args[0] if args else next(iter(kwargs.values())), site))

    def leave(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        left.append(_batched(output, site))

    end = model.get_submodule(site.batch_norm or site.name)
    handles = (
        model.get_submodule(site.name).register_forward_pre_hook(enter, with_kwargs=True),
        end.register_forward_hook(leave),
    )
    with hooked(handles):
        run(model, inputs)
    if len(entered) != len(left):
        raise FitError(site.name, NORMS_NOT_ALL)
    return list(zip(entered, left, strict=True))


def _batched(tensor: Tensor, site: Site) -> Tensor:
    """A copy, so that later changes in place do not reach it, with a batch axis, which a convolution may be called without."""
    return (tensor if tensor.dim() == site.spec.dims + 2 else tensor[None]).detach().clone()
