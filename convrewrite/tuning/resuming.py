"""Where a training goes on: from its own checkpoint, while another training's is set aside."""

from pathlib import Path

import torch

from convrewrite.errors import UsageError
from convrewrite.tuning.checkpoint import Checkpoint, load_checkpoint, place_aside, set_aside
from convrewrite.tuning.distilling import Training
from convrewrite.tuning.processes import Processes


def resumed(path: Path, training: Training, notes: list[str]) -> Checkpoint | None:
    """The checkpoint from which a training goes on, if there is one; ``notes`` says so, and where another training's is now.

    Raises UsageError for a file that is not a checkpoint, or a broken one, and where several processes find different ones.
    """
    processes = training.processes
    main = processes.index == 0
    there = 0.0 if main else processes.of_main(0.0)  # which looks first, as it may put files in other places
    other = set_aside(path, training.run) if main else None
    if other is not None:
        notes.append(
            f"a checkpoint of another recovery, {other.step} steps in, was set aside as {place_aside(path, other.run).name}; "
            "that recovery goes on from it, and it may be removed otherwise"
        )
    found = load_checkpoint(path, training.run, training.task.parameters)
    _require_same(path, found, processes.of_main(_step(found)) if main else there, processes)
    if found is not None:
        notes.append(f"recovery went on from step {found.standing.step}, where an earlier run was ended")
    return found


def _step(found: Checkpoint | None) -> float:
    return -1.0 if found is None else float(found.standing.step)


def _require_same(path: Path, found: Checkpoint | None, there: float, processes: Processes) -> None:
    """Raise UsageError, in every process, where one has another checkpoint than the main one, at step ``there``: they would wait
    for each other for ever, as on machines whose folders of one name are not one folder."""
    other = torch.tensor([float(_step(found) != there)], device=processes.device)
    if float(processes.mean(other)) > 0:
        at = "no checkpoint" if there < 0 else f"a checkpoint of step {there:.0f}"
        raise UsageError(
            f"{path}: expected all processes to find what the main one does, {at}, found that they do not; name a file in a "
            "folder that all of them share, or start again with --no-resume"
        )
