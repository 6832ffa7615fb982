"""When a fitted result is refined, what its report says about that, and what is kept of it from run to run."""

import logging
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from convrewrite.pipeline.notes import SITES_AS_FITTED
from convrewrite.rewriting import Rewritten, Work
from convrewrite.runtime import measure_fidelity
from convrewrite.settings import Keep
from convrewrite.stored import RunCache, tensors_digest
from convrewrite.tuning import Refined, Refinement, refine, rewritten_parameters

LOG = logging.getLogger(__name__)


def refined(work: Work, rewritten: Rewritten, keep: Keep | None) -> list[str]:
    """Refine all rewritten sites together, in place, where it was asked for or there is something to gain; returns notes for the
    report.

    Unasked it is done only on real inputs, in runs that are not ``fast``, and where the effect on held-out inputs is worth it.
    It is undone where less than the fidelity to ``keep`` is left, which was there before: the effect is a mean over all outputs,
    and one of them may lose what others gain.
    """
    sites = {o.site.name: o.site.batch_norm for o in rewritten.outcomes if o.candidate is not None}
    if not sites or not _wanted(work):
        return []
    task = Refinement(
        original=work.prepared.model,
        rewritten=rewritten.model,
        sites=sites,
        fit=work.data.fit,
        held_out=work.data.held_out,
        meanings=work.evaluation.meanings,
        macs=work.prepared.totals.macs,
        memory=work.memory,
        seed=work.settings.seed,
        batch=work.prepared.batch,
        asked=bool(work.settings.refine),
    )
    with work.watch.timed("refine"):
        before = {name: tensor.clone() for name, tensor in _numbers(task).items()}
        found = _refined(task, work)
        if keep is not None and found.after < found.before and not _keeps_on(task, keep, before):
            return [f"refined in {found.steps} steps, after which a {keep} did not hold any more: left as it was"]
    LOG.info("%s", found.note or "nothing to refine")
    return [f"{found.note}{SITES_AS_FITTED if found.after < found.before else ''}"] if found.note else []


def _keeps_on(task: Refinement, keep: Keep, before: Mapping[str, Tensor]) -> bool:
    """Whether the fidelity is kept, or was not kept ``before`` either. Where it is lost, the numbers before are put back."""
    if _keeps(task, keep):
        return True
    own = _numbers(task)
    after = {name: tensor.clone() for name, tensor in own.items()}
    _put(own, before)
    if _keeps(task, keep):
        return False
    _put(own, after)
    return True


def _keeps(task: Refinement, keep: Keep) -> bool:
    found = measure_fidelity(task.original, task.rewritten, task.held_out, task.meanings)
    return keep.allows(found.least_agreement, found.worst_error)


class _Kept(BaseModel):
    """A refinement as it is kept, together with the numbers it came to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    before: float = Field(ge=0)
    after: float = Field(ge=0)
    steps: int = Field(ge=1)


def _refined(task: Refinement, work: Work) -> Refined:
    """Refine in place, or take what an earlier run came to from the same numbers."""
    asked = (tensors_digest(_numbers(task)), task.asked, task.batch, sorted(task.sites))
    known = _known(task, work.cache, asked)
    if known is not None:
        LOG.info("refined in an earlier run")
        return known
    found = refine(task, work.progress)
    if found.steps:
        facts = {"before": found.before, "after": found.after, "steps": found.steps}
        work.cache.put("refinement", asked, facts, _numbers(task))
    return found


def _known(task: Refinement, cache: RunCache, asked: object) -> Refined | None:
    """Put a kept refinement in place, if it has the shapes of the present numbers, and is as near to the original as it says."""
    entry = cache.get("refinement", asked)
    own = _numbers(task)
    if entry is None or entry.tensors.keys() != own.keys():
        return None
    if any(_unlike(entry.tensors[name], tensor) for name, tensor in own.items()):
        return None
    try:
        kept = _Kept.model_validate(entry.facts)
    except ValidationError:
        return None
    before = {name: tensor.clone() for name, tensor in own.items()}
    _put(own, entry.tensors)
    if task.effect() != kept.after:
        _put(own, before)
        return None
    return Refined(kept.before, kept.after, kept.steps)


def _unlike(found: Tensor, own: Tensor) -> bool:
    return found.shape != own.shape or found.dtype != own.dtype or not bool(torch.isfinite(found).all())


def _numbers(task: Refinement) -> dict[str, Tensor]:
    """What is refined, under the model's own names; not copied."""
    return {name: p.detach() for name, p in rewritten_parameters(task.rewritten, list(task.sites)).items()}


def _put(own: dict[str, Tensor], numbers: Mapping[str, Tensor]) -> None:
    for name, tensor in own.items():
        tensor.copy_(numbers[name])


def _wanted(work: Work) -> bool:
    if work.settings.refine is not None:
        return work.settings.refine
    return not work.settings.fast and work.data.kind == "data"
