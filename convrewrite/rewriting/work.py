"""What the stages of one run share: the model and its sites, the inputs, the settings, and who is told of progress."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.graph import Lifted, Site, Traced, needed_lifts
from convrewrite.inputs import Inputs, moved
from convrewrite.meanings import Evaluation
from convrewrite.modules import copy_model, put_on
from convrewrite.places import PROCESSOR, exact_place, free_memory
from convrewrite.progress import Progress, Stopwatch
from convrewrite.rules import Rule, SearchSpace
from convrewrite.settings import Settings
from convrewrite.stored import NOTHING_KEPT, RunCache
from convrewrite.structures import Structure

HOME = torch.device(PROCESSOR)
"""Where models that are read from files lie, and where models are exported."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model in eval mode with its sites, what the rules allow at each, and the whole model's cost.

    ``original`` is the caller's, which never runs; ``model`` is a copy of it with functional convolutions ``lifted``; ``hidden``
    is the part of the cost that a module made of an ONNX graph does not show; ``batch`` is how many examples the model takes at a
    time, None for any number. ``device`` is where ``model`` and ``inputs`` lie; ``home`` is the same on the processor, where
    ``device`` is another; ``origin`` is where the caller's model lay.
    """

    original: nn.Module
    lifted: Lifted
    inputs: Inputs
    traced: Traced
    sites: tuple[Site, ...]
    totals: Cost
    rules: tuple[Rule, ...]
    structures: dict[str, Structure]
    search_spaces: tuple[SearchSpace, ...]
    hidden: Cost = field(default_factory=Cost)
    batch: int | None = None
    device: torch.device = HOME
    home: "Prepared | None" = None
    origin: torch.device = HOME

    @property
    def layout(self) -> str:
        """Identifies a model whose time was measured, and is the same for a module and its ONNX file: a hash of every convolution
        with the sizes it runs on, and of the MACs of the whole. Neither weights nor biases, which an exporter may drop or add,
        count."""
        specs = [(replace(site.spec, bias=True), sorted(site.input_sizes)) for site in self.sites]
        sites = sorted(json.dumps([asdict(spec), sizes]) for spec, sizes in specs)
        return hashlib.sha256(json.dumps([sites, self.totals.macs]).encode()).hexdigest()

    def on(self, device: torch.device) -> "Prepared":
        """A copy of the model, its graphs and inputs on a device; for the processor, what such a copy was made from."""
        if device in (self.device, self.at_home.device):
            return self if device == self.device else self.at_home
        parts = self.traced.parts
        together = copy_model(nn.ModuleList([self.model, *parts.values()]))
        assert isinstance(together, nn.ModuleList)
        model, *graphs = put_on(device, together)
        return replace(
            self,
            lifted=replace(self.lifted, model=model),
            inputs=moved(self.inputs, device),
            traced=replace(self.traced, parts=dict(zip(parts, cast("list[fx.GraphModule]", graphs), strict=True))),
            device=device,
            home=self,
        )

    @property
    def at_home(self) -> "Prepared":
        """The same on the processor, where models are exported and timed, and from where they are handed back."""
        return self.home or self

    @property
    def model(self) -> nn.Module:
        """The model that is rewritten."""
        return self.lifted.model

    @property
    def budgeted(self) -> Cost:
        """What budgets are parts of: the whole model's cost, without kernels that are buffers and stay so, as no rule takes their
        sites."""
        kept = {space.site.name for space in self.search_spaces if not space.rank_ranges}
        held = 0
        for one in needed_lifts(self.lifted.lifts, kept):
            buffers = dict(self.original.get_submodule(one.module).named_buffers())
            names = [name for conv in one.convs if not conv.computed for name in (conv.weight, conv.bias)]
            held += sum(buffers[name].numel() for name in names if name in buffers)
        return replace(self.totals, parameters=self.totals.parameters - held)

    @property
    def rewritable(self) -> list[Site]:
        """The sites that may be rewritten, whatever the rules say: the same when a plan is made and when it is carried out."""
        return [site for site in self.sites if site.refusal is None]


@dataclass(frozen=True, slots=True)
class Work:
    """The model and its sites, the inputs, what the result is evaluated on, the weights of the sites' outputs, the settings, who
    is told of progress, and what earlier runs left."""

    prepared: Prepared
    data: Calibration
    evaluation: Evaluation
    weights: Mapping[str, Tensor]
    settings: Settings
    progress: Progress
    watch: Stopwatch
    cache: RunCache = NOTHING_KEPT

    def on(self, device: torch.device) -> "Work":
        """The same on a device; float64 stays on the processor where the device has none."""
        if device == self.prepared.device:
            return self
        data = self.data.on(device)
        shared = self.evaluation.batches is self.data.held_out
        evaluation = replace(self.evaluation, batches=data.held_out) if shared else self.evaluation.on(device)
        weights = {name: weight.to(exact_place(device)) for name, weight in self.weights.items()}
        return replace(self, prepared=self.prepared.on(device), data=data, evaluation=evaluation, weights=weights)

    @property
    def memory(self) -> int:
        """Bytes for activations and moments: on the processor as the settings say, on a device what is free there now."""
        device = self.prepared.device
        return self.settings.memory if device.type == PROCESSOR else free_memory(device)
