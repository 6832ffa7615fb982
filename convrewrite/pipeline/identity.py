"""Identifies a recovery, so that it does not go on from another one's checkpoint."""

import hashlib
from collections.abc import Mapping

from torch import nn

from convrewrite.meanings import Meaning
from convrewrite.pipeline.keywords import RecoveryExtras
from convrewrite.planning import Fingerprint, Plan
from convrewrite.settings import Recovery
from convrewrite.stored import raw_bytes
from convrewrite.tuning import TrainingInputs, code_of, fingerprint

NOT_TOLD = (
    "the augmentation holds something of which cannot be told whether it is as it was, such as a lock or an open file: no "
    "recovery goes on from this one, whose state is not kept"
)

UNTOLD = "cannot be told"
"""In place of what identifies an augmentation: it is none of an earlier run, and no later one is the same."""


def identity_of(
    plan: Plan,
    rewritten: nn.Module,
    given: TrainingInputs,
    asked: Recovery,
    meanings: Mapping[str, Meaning],
    augment: str | None,
) -> str:
    """Differs where anything does that the steps depend on. What outputs mean is part of it, as effects are measured in units of
    that; ``augment`` is what :func:`augmentation_of` gave."""
    digest = hashlib.sha256()
    for tensor in (*given.train, *given.held_out, *([] if given.labels is None else [given.labels])):
        digest.update(raw_bytes(tensor))
    return fingerprint(
        original=str(plan.model),
        rewritten=str(Fingerprint.of(rewritten)),
        inputs=digest.hexdigest(),
        recipe=[
            "orthogonal steps",
            asked.minutes,
            asked.epochs,
            asked.rate,
            asked.batch,
            asked.temperature,
            asked.features,
            asked.everything,
        ],
        outputs={name: [meaning.kind, meaning.weight, meaning.axis] for name, meaning in sorted(meanings.items())},
        seed=asked.seed,
        augment=augment,
    )


def augmentation_of(extras: RecoveryExtras, notes: list[str]) -> str | None:
    """Identifies the augmentation; UNTOLD where that cannot be done, and then ``notes`` says so, where a checkpoint was named."""
    if extras.augment is None:
        return None
    found = code_of(extras.augment)
    if found is None and extras.checkpoint is not None:
        notes.append(NOT_TOLD)
    return found or UNTOLD
