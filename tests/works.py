"""What the stages of a run share, made by hand for a test of one stage."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from convrewrite.calibration.batches import Calibration
from convrewrite.conv import Cost
from convrewrite.graph.lifting import Lifted
from convrewrite.graph.tracing import Traced, trace
from convrewrite.meanings.evaluation import Evaluation
from convrewrite.meanings.kinds import tell
from convrewrite.progress import Progress, Stopwatch, silent
from convrewrite.rewriting.work import Prepared, Work
from convrewrite.rules.options import SearchSpace
from convrewrite.settings import Settings
from convrewrite.structures.discovery import discover


def work_of(
    model: nn.Module,
    data: Calibration,
    *,
    traced: Traced | None = None,
    search_spaces: Sequence[SearchSpace] = (),
    weights: Mapping[str, Tensor] | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
    watch: Stopwatch | None = None,
    batch: int | None = None,
) -> Work:
    """The model as it is, nothing of it lifted; its outputs evaluated on the held-out inputs, else on those to fit on."""
    prepared = Prepared(
        model, Lifted(model), (), traced or trace(model), tuple(space.site for space in search_spaces), Cost(), (), discover(),
        tuple(search_spaces), batch=batch,
    )  # fmt: skip
    batches = data.held_out or data.fit
    evaluation = Evaluation(batches, "a test", meanings=tell(model, batches) if batches else {})
    return Work(
        prepared, data, evaluation, weights or {}, settings or Settings(memory=1 << 30), progress, watch or Stopwatch()
    )
