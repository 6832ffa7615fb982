"""What the stages of a run share, made by hand for a test of one stage."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from convrewrite.calibration import Calibration
from convrewrite.conv import Cost
from convrewrite.lifting import Lifted
from convrewrite.meanings import tell
from convrewrite.preparing import Judged, Prepared, Progress, Settings, silent
from convrewrite.proposing import Menu
from convrewrite.stopwatch import Stopwatch
from convrewrite.structures import discover
from convrewrite.tracing import Traced, trace
from convrewrite.work import Work


def work_of(
    model: nn.Module,
    data: Calibration,
    *,
    traced: Traced | None = None,
    menus: Sequence[Menu] = (),
    weights: Mapping[str, Tensor] | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
    watch: Stopwatch | None = None,
) -> Work:
    """The model as it is, nothing of it lifted; its outputs judged on the held-out inputs, else on those to fit on."""
    prepared = Prepared(
        model, Lifted(model), (), traced or trace(model), tuple(menu.site for menu in menus), Cost(), (), discover(),
        tuple(menus),
    )  # fmt: skip
    batches = data.held_out or data.fit
    judged = Judged(batches, "a test", meanings=tell(model, batches) if batches else {})
    return Work(
        prepared, data, judged, weights or {}, settings or Settings(memory=1 << 30), progress, watch or Stopwatch()
    )
