"""Outputs without any number, as those of a detector that finds nothing."""

from typing import Any

import pytest
import torch
from commands import images, small_network
from torch import Tensor, nn

from convrewrite import optimize
from convrewrite.errors import ModelError
from convrewrite.meanings.kinds import Meaning, tell


class Detector(nn.Module):
    """Of every image the scores beyond a threshold, as four outputs of other kinds; ``beside``: all scores, too."""

    def __init__(self, least: float, beside: bool = False) -> None:
        super().__init__()
        self.net, self.least, self.beside = small_network(), least, beside

    def forward(self, x: Tensor) -> Any:
        scores = self.net(x)
        found = scores[scores.amax(1) > self.least]
        outputs = {
            "logits": found,
            "probabilities": found.softmax(1),
            "multilabel": found.sigmoid(),
            "labels": found.argmax(1),
        }
        return outputs | ({"all": scores} if self.beside else {})


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ModelError, match=r"expected numbers to compare, found none at all on 1 inputs.*\(--calib\)"):
        optimize(Detector(1e9).eval(), images(1), calibration=images(5), measure=False)


def test_what_is_ignored_is_nothing_to_compare() -> None:
    ignored = {"output.all": Meaning("ignore", "it was said")}
    with pytest.raises(ModelError, match="expected numbers"):
        tell(Detector(1e9, beside=True).eval(), [(images(2),)], ignored)


def test_one_output_with_numbers_is_enough() -> None:
    made = optimize(Detector(1e9, beside=True).eval(), images(1), calibration=images(16), measure=False)
    assert any(row.action == "rewritten" for row in made.report.sites)
    assert torch.equal(made.model(images(2))["labels"], torch.zeros(0, dtype=torch.long))
