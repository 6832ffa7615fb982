"""Where a run computes: on a device as long as the model runs and has room there, otherwise on the processor.

What has to be on the processor stays there: the model that is exported, timed and handed back. A stage of the run works on
copies, so if it runs out of room on the device, nothing is lost: it and all later stages are done on the processor.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from convrewrite.escaping import first_line
from convrewrite.modules import run
from convrewrite.places import PROCESSOR, described, let_go, out_of_memory, place_of
from convrewrite.process import whole_float32
from convrewrite.rewriting import Prepared

LOG = logging.getLogger(__name__)

HOME = torch.device(PROCESSOR)

Made = TypeVar("Made")


@dataclass(slots=True)
class Workplace:
    """The ``device`` on which stages work now; ``notes`` for the report name the device, and say why it was left if it was."""

    device: torch.device = HOME
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, asked: str | None, origin: torch.device) -> "Workplace":
        """The device that is ``asked`` for; None: the one on which the caller's model lay."""
        return cls(origin if asked is None else place_of(asked))

    def start(self, prepared: Prepared) -> Prepared:
        """The model on the device if it runs there; otherwise ``prepared`` itself, and all stages stay on the processor."""
        if self.device == HOME:
            return prepared
        refused: str | None = None
        try:
            placed = prepared.on(self.device)
            run(placed.model, placed.inputs)
            if placed.traced.whole is not None:
                run(placed.traced.whole, placed.inputs)
            torch.linalg.cholesky(torch.eye(1, device=self.device))  # its libraries must be opened by a single thread
        except Exception as error:  # a forward may fail in any way on a device for which it was not written
            refused = "it had no room left" if out_of_memory(error) else first_line(error, 300)
        if refused is not None:
            self._leave(refused)
            return prepared
        self.notes.append(f"computed on {described(self.device)}; exported, timed and verified on the processor")
        return placed

    def do(self, stage: Callable[[torch.device], Made]) -> Made:
        """The result of a stage on the device, or on the processor if the device has no room for it."""
        if self.device != HOME:
            try:
                with whole_float32():
                    return stage(self.device)
            except Exception as error:  # whatever wraps it, such as the error that a model did not run
                if not out_of_memory(error):
                    raise
            self._leave("it had no room left")  # here, where nothing holds the stage's tensors any more
        return stage(HOME)

    def _leave(self, reason: str) -> None:
        left, self.device = self.device, HOME
        gc.collect()
        let_go(left)
        self.notes.append(f"the processor took over from {described(left)}: {reason}")
        LOG.info("%s", self.notes[-1])
