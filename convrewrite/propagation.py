"""The inputs of every site, front to back: in the original network and behind the prefix that is already rewritten.

With a graph of the whole model, activations are kept from site to site, so each layer runs once per stream however many
sites there are. Without one, or for a site with several calls, the model is run again for that site. Activations beyond a
memory limit wait on disk.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convrewrite.applying import copy_model, replace_site
from convrewrite.sites import Site
from convrewrite.streams import Inputs, Sample, Streams
from convrewrite.tracing import Traced, run


class Propagation:
    """Walks all batches through both networks, site by site. ``rewritten`` is the copy under the knife."""

    def __init__(
        self,
        model: nn.Module,
        traced: Traced,
        sites: Sequence[Site],
        batches: Sequence[Inputs],
        memory: int,
        start: nn.Module | None = None,
    ) -> None:
        """``memory`` in bytes bounds the activations that are kept. ``start``: a copy of the model in which all ``sites``
        are rewritten already, to go through once more."""
        self.model = model
        self.rewritten = copy_model(start or model)
        self._batches = batches
        self.batches = len(batches)
        self.examples = [len(inputs[0]) for inputs in batches]
        self._streams: Streams | None = None
        if traced.whole is not None:
            self._streams = Streams(traced.whole, sites, batches, memory)
            for site in sites if start is not None else ():
                self._streams.foresee(site, self.rewritten.get_submodule(site.name))

    def samples(self, site: Site) -> Iterator[Sample]:
        """One sample per batch and call, as often as wanted until :meth:`replace` is called for this site."""
        if self._streams is not None and self._streams.advance(site.name):
            return self._streams.samples(site)
        return self._rerun(site)

    def rectified(self, site: Site) -> bool:
        """Whether nothing but a ReLU sees the output of this site, or of the sum its samples' skips belong to."""
        return self._streams is not None and self._streams.advance(site.name) and self._streams.rectified(site)

    def outputs(self, site: Site, module: nn.Module, batches: Sequence[int]) -> Iterator[Any]:
        """What the rewritten network gives for these batches with ``module`` at the site, which it does not keep.

        Only what lies behind the site is run, where the graph of the whole model shows what that is.
        """
        if self._streams is not None and self._streams.advance(site.name):
            for index in batches:
                yield self._streams.finish(index, site, module)
            return
        trial = copy_model(self.rewritten)
        replace_site(trial, site, module)
        for index in batches:
            yield run(trial, self._batches[index])

    def replace(self, site: Site, module: nn.Module) -> None:
        """From here on the rewritten network has ``module`` at this site."""
        replace_site(self.rewritten, site, module)
        if self._streams is not None:
            self._streams.replace(site, module)

    def close(self) -> None:
        """Let go of the activations, on disk too."""
        if self._streams is not None:
            self._streams.store.close()

    def _rerun(self, site: Site) -> Iterator[Sample]:
        for index, inputs in enumerate(self._batches):
            before = _inputs_of(self.model, site, inputs)
            after = _inputs_of(self.rewritten, site, inputs)
            for original, rewritten in zip(before, after, strict=False):
                yield Sample(index, original, rewritten)


class _Stop(Exception):
    """Ends a forward that has shown what was wanted."""


def _inputs_of(model: nn.Module, site: Site, inputs: Inputs) -> list[Tensor]:
    """The inputs of a module at each of its calls in one forward."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen.append((x if x.dim() == site.spec.dims + 2 else x[None]).detach().clone())

    handle = model.get_submodule(site.name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(*(tensor.clone() for tensor in inputs))  # it may work on them in place
    finally:
        handle.remove()
    return seen
