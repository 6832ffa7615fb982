"""What a report of a run says in its notes, besides what the stages note themselves."""

from collections.abc import Sequence

from torch import nn

from convrewrite.conv import Cost
from convrewrite.graph import Traced
from convrewrite.onnx_graph import is_graph
from convrewrite.rewriting import Outcome, Prepared, Work
from convrewrite.runtime import Measured
from convrewrite.settings import Settings
from convrewrite.state import parameters_of
from convrewrite.values import some_of

NOT_MEASURED = "no ONNX file was asked for: nothing was exported or timed, and onnxruntime was not compared"
"""The note of a result without an ONNX file."""

NOT_TRIED = "as was asked, the ONNX file was neither timed nor compared: outputs were compared in torch alone"
"""The note of the result of an ONNX model, which has its file whether it was measured or not."""

NOT_TIMED = "; the result was not timed here"
"""The end of the note on a result that was chosen by times from another machine."""

SITES_AS_FITTED = "; the errors of single sites are those before"
"""The end of the note on a refinement, while the report has these errors."""


def notes_on(
    work: Work,
    outcomes: Sequence[Outcome],
    costs: tuple[Cost, Cost],
    counted: int,
    measured: Measured,
    *,
    exported: bool,
) -> list[str]:
    """What is to be known about the inputs and the result. ``costs`` of the whole model are before and after, ``counted`` are the
    MACs that a run of the result took."""
    before, after = costs
    return [
        *work.data.notes, *_lost(work.prepared.traced), *_beside(work.prepared.traced),
        *measured.notes, *_beyond_its_own(before, work.prepared),
        *_went_another_way(after, counted), *_nothing_done(outcomes), *_elsewhere(work.settings),
        *([] if exported else [unmeasured(work.prepared.original)]),
    ]  # fmt: skip


def unmeasured(original: nn.Module) -> str:
    """The note of a result of this model that was not measured."""
    return NOT_TRIED if is_graph(original) else NOT_MEASURED


def _went_another_way(after: Cost, counted: int) -> list[str]:
    """A note if a run of the result counted other MACs than the report has from its sites."""
    if counted == after.macs:
        return []
    return [
        f"a run of the result on the example input counted {counted:,} MACs of one example, not the {after.macs:,} that are "
        "reported for the path that the original took: which operations run depends on numbers that the model computes, or it "
        "takes second derivatives, or its forward starts threads, in which nothing is counted"
    ]


def _beyond_its_own(before: Cost, prepared: Prepared) -> list[str]:
    """A note if the report counts more parameters for the original than it has."""
    own = sum(parameter.numel() for parameter in parameters_of(prepared.original)) + prepared.hidden.parameters
    if before.parameters <= own:
        return []
    return [
        f"the original has {own:,} parameters, {before.parameters - own:,} fewer than the report counts before: kernels that are "
        "buffers, and biases or BatchNorms that layers share, count once for every rewritten site, as each gets its own copy"
    ]


def _lost(traced: Traced) -> list[str]:
    if not traced.lost:
        return []
    names = some_of([name or "the model itself" for name in traced.lost], 5)
    return [
        f"{names} could not be followed as a graph: convolutions there are rewritten, "
        "but a BatchNorm that follows one is not folded into it"
    ]


def _beside(traced: Traced) -> list[str]:
    if not traced.stateful:
        return []
    return [
        "the model may hand something on beside its graph (by a hook, a buffer that it overwrites, a part or function that is "
        "not torch's): it was run from its beginning for every site, which takes longer"
    ]


def _elsewhere(settings: Settings) -> list[str]:
    profile = settings.profile
    if profile is None:
        return []
    return [f"chosen by times in {profile.describe()}, from {settings.timings}{NOT_TIMED}"]


def _nothing_done(outcomes: Sequence[Outcome]) -> list[str]:
    if any(outcome.candidate is not None for outcome in outcomes):
        return []
    return ["no site was rewritten; each row says why, and `convrewrite analyze` shows what other rules would take"]
