"""When a fitted result is refined, and what its report says of that."""

from convrewrite.onnx_graph import batch_of
from convrewrite.rewriting import Rewritten, Work
from convrewrite.tuning import Refinement, refine


def refined(work: Work, rewritten: Rewritten) -> list[str]:
    """Refine all rewritten sites together, in place, where it was asked or there is something to gain; notes for the report.

    By itself it is done on real inputs alone, unless the run is ``fast``, and where the effect on held-out inputs is worth it.
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
        memory=work.settings.memory,
        seed=work.settings.seed,
        batch=batch_of(work.prepared.original),
        asked=bool(work.settings.refine),
    )
    with work.watch.timed("refine"):
        found = refine(task, work.progress)
    return [found.note] if found.note else []


def _wanted(work: Work) -> bool:
    if work.settings.refine is not None:
        return work.settings.refine
    return not work.settings.fast and work.data.kind == "data"
