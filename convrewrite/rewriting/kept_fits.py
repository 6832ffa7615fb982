"""Fits of sites that are kept from run to run: what they depend on, and how they are checked.

A fit depends on the model, the inputs, the settings and the versions (the *context*), and on all that was put in place before it.
If two runs ask the same of the same model up to a site, the second takes that site's fit from the first, byte for byte.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn

import convrewrite
from convrewrite.calibration import Calibration
from convrewrite.fitting import Fit
from convrewrite.graph import Site
from convrewrite.inputs import Inputs
from convrewrite.machine import processor
from convrewrite.meanings import Evaluation
from convrewrite.modules import named_outputs, run
from convrewrite.places import described
from convrewrite.rewriting.outcomes import Outcome
from convrewrite.rewriting.work import Prepared
from convrewrite.rules import Candidate, Shortlist
from convrewrite.settings import Settings
from convrewrite.state import state_of
from convrewrite.stored import ResultCache, RunCache, tensors_digest
from convrewrite.structures import Structure

WITH_EFFECT = frozenset({"memory", "seed", "output_weighting"})
"""Settings that fits, surveys and refinements depend on. Whatever else they depend on, such as the inputs, the device, the times
of options or whether int8 counts, is among the facts in another form, or part of an entry's own key."""

EXAMPLES = 8
"""A model is identified by its outputs for this many inputs of each kind: a whole batch would take a large model seconds."""

PACKAGES = ("torch", "numpy", "scipy", "onnxruntime")

BUILT_IN = "convrewrite.structures."
"""Only fits of structures from here are kept: whether the code of any other structure has changed is not known."""


def run_cache_of(
    prepared: Prepared, data: Calibration, evaluation: Evaluation, weights: Mapping[str, Tensor], settings: Settings
) -> RunCache:
    """The cache in which this run keeps its results; one without effect where it is not to keep any, or where there is no
    room."""
    cache = ResultCache() if settings.resume else None
    if cache is None or not cache.keeps:
        return RunCache()
    facts = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "code": _code_digest(),
        "processor": (processor()[0], torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()),
        "device": described(prepared.device),
        "settings": {name: repr(getattr(settings, name)) for name in WITH_EFFECT},
        "model": _model_facts(prepared, data),
        "data": (data.kind, _inputs_digest(data.fit), _inputs_digest(data.held_out)),
        "evaluation": (_inputs_digest(evaluation.batches), evaluation.noise, repr(dict(evaluation.meanings))),
        "weights": tensors_digest(weights),
    }
    return RunCache(cache, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())


def _code_digest() -> str:
    """A digest of this package's sources: what other code computed is never reused."""
    found = hashlib.sha256()
    folder = Path(convrewrite.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def _model_facts(prepared: Prepared, data: Calibration) -> tuple[object, ...]:
    """What identifies the model: its ``repr``, its weights, the order of its operations, and its outputs for the example and for
    some of the data. Weights alone do not show how they are used, and an example of zeros shows little."""
    model, whole = prepared.model, prepared.traced.whole
    state = {name: value for name, value in state_of(model).items() if isinstance(value, Tensor)}
    nodes = () if whole is None else tuple(_node_facts(node) for node in whole.graph.nodes)
    few = prepared.batch or EXAMPLES
    some = (tuple(tensor[:few] for tensor in batch) for part in (data.fit, data.held_out) for batch in part[:1])
    given = (prepared.inputs, *some)
    outputs = [tensors_digest(named_outputs(run(model, inputs))) for inputs in given]
    return _shown(model), tensors_digest(state), nodes, outputs, [repr(site) for site in prepared.sites]


def _shown(model: nn.Module) -> str:
    try:
        return repr(model)
    except Exception:  # a class may define any ``__repr__``
        return type(model).__qualname__


def _node_facts(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else f"{target.__module__}.{getattr(target, '__qualname__', target)}"
    return f"{node.op} {node.name} {name} {node.args} {node.kwargs}"


def _inputs_digest(batches: Sequence[Inputs]) -> str:
    return tensors_digest({f"{b}.{i}": tensor for b, batch in enumerate(batches) for i, tensor in enumerate(batch)})


def keepable(structures: Sequence[Structure]) -> bool:
    """Whether fits of these structures are kept."""
    return all(type(structure).__module__.startswith(BUILT_IN) for structure in structures)


def candidate_facts(candidate: Candidate) -> object:
    """What a fit of a candidate depends on: the option, and the error that its rule allows."""
    option = candidate.option
    return option.structure, option.setting, option.lowering, candidate.rule.require.max_output_error


def stage_shapes(site: Site, candidate: Candidate, structure: Structure) -> list[tuple[int, ...]]:
    """The shapes of a candidate's stage kernels, groups joined."""
    spec = site.folded_spec
    shapes = [s.kernel_shape(spec.kernel_size) for s in structure.stages(spec.per_group, candidate.option.parameters)]
    return [(spec.groups * outputs, *rest) for outputs, *rest in shapes]


class _Kept(BaseModel):
    """What became of a site, as it is kept: the position of its candidate among those it was fitted with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    chosen: int | None = Field(ge=0)
    unexplained: float = Field(default=0.0, ge=0)
    reason: str | None = Field(default=None, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    positions: int | None = Field(default=None, ge=0)
    fit_error: float | None = Field(default=None, ge=0)
    held_out: bool = True


@dataclass(slots=True)
class KeptFits:
    """The fits of one rewriting, from the first site to the last. ``before`` identifies all that was put in place so far;
    ``known`` is False once that may include a structure that is not built in, which cannot be part of a key."""

    cache: RunCache
    structures: dict[str, Structure]
    before: str = ""
    known: bool = True

    def find(self, shortlist: Shortlist, way: Sequence[str]) -> tuple[Outcome, Fit | None] | None:
        """What became of this site in an earlier run, if that is kept and matches what the site can become. ``way``: what runs
        before it, in order; sites behind it matter only as far as they change that."""
        self.before = hashlib.sha256(json.dumps([self.before, list(way), *self._asked(shortlist)]).encode()).hexdigest()
        self.known = self.known and keepable([self.structures[c.option.structure] for c in shortlist.candidates])
        entry = self.cache.get("fit", self.before) if self.known else None
        if entry is None:
            return None
        try:
            kept = _Kept.model_validate(entry.facts)
            return self._restored(shortlist, kept, entry.tensors)
        except (ValueError, LookupError, TypeError):  # pydantic's ValidationError is a ValueError
            return None

    def keep(self, shortlist: Shortlist, outcome: Outcome, found: Fit | None) -> None:
        """Keep what became of the site that was asked for last."""
        if not self.known or (found is not None and not bool(torch.isfinite(found.bias).all())):
            return
        chosen = None if outcome.candidate is None else shortlist.candidates.index(outcome.candidate)
        kept = {
            "chosen": chosen,
            "unexplained": 0.0 if found is None else found.unexplained,
            "reason": outcome.reason,
            "positions": outcome.positions,
            "fit_error": outcome.fit_error,
            "held_out": outcome.held_out,
        }
        tensors = {} if found is None else {"bias": found.bias, **{str(i): k for i, k in enumerate(found.kernels)}}
        self.cache.put("fit", self.before, kept, tensors)

    def _restored(
        self, shortlist: Shortlist, kept: _Kept, tensors: Mapping[str, Tensor]
    ) -> tuple[Outcome, Fit | None] | None:
        site = shortlist.site
        if kept.chosen is None:
            return None if kept.reason is None or tensors else (Outcome(site, None, reason=kept.reason), None)
        candidate = shortlist.candidates[kept.chosen]
        shapes = stage_shapes(site, candidate, self.structures[candidate.option.structure])
        wanted = {"bias": (site.spec.out_channels,), **{str(i): shape for i, shape in enumerate(shapes)}}
        if kept.reason is not None or not _fits(tensors, wanted):
            return None
        found = Fit(tuple(tensors[str(i)] for i in range(len(shapes))), tensors["bias"], kept.unexplained)
        outcome = Outcome(site, candidate, found.error, None, kept.positions, kept.fit_error, kept.held_out)
        return outcome, found

    def _asked(self, shortlist: Shortlist) -> tuple[object, ...]:
        return (shortlist.site.name, [candidate_facts(candidate) for candidate in shortlist.candidates])


def _fits(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these are the tensors that are wanted: names, shapes, float64, finite."""
    return tensors.keys() == wanted.keys() and all(
        tuple(tensor.shape) == wanted[name] and tensor.dtype == torch.float64 and bool(torch.isfinite(tensor).all())
        for name, tensor in tensors.items()
    )
