"""Where a training goes on: from its own checkpoint, while another training's is set aside."""

from pathlib import Path

from convrewrite.tuning.checkpoint import Checkpoint, load_checkpoint, place_aside, set_aside
from convrewrite.tuning.distilling import Training


def resumed(path: Path, training: Training, notes: list[str]) -> Checkpoint | None:
    """The checkpoint from which a training goes on, if there is one; ``notes`` says so, and where another training's is now.

    Raises UsageError for a file that is not a checkpoint, or a broken one.
    """
    other = set_aside(path, training.run) if training.processes.index == 0 else None
    if other is not None:
        notes.append(
            f"a checkpoint of another recovery, {other.step} steps in, was set aside as {place_aside(path, other.run).name}; "
            "that recovery goes on from it, and it may be removed otherwise"
        )
    found = load_checkpoint(path, training.run, training.task.parameters)
    if found is not None:
        notes.append(f"recovery went on from step {found.standing.step}, where an earlier run was ended")
    return found
