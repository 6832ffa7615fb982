"""Hooks stand while a block runs, and not longer."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from convrewrite.modules import hooked


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_stand_in_the_block_alone_and_others_stay() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    seen: list[str] = []
    with hooked(module.register_forward_pre_hook(lambda *_: seen.append("called")) for module in model):
        model(torch.zeros(1))
    model(torch.zeros(1))
    assert seen == ["called", "called"]
    assert hooks_of(model) == 1


def test_hooks_are_gone_after_an_error_in_the_block() -> None:
    model = nn.ReLU()
    with pytest.raises(ZeroDivisionError), hooked([model.register_forward_hook(lambda *_: None)]):
        raise ZeroDivisionError
    assert hooks_of(model) == 0


def test_hooks_before_one_that_could_not_be_registered_are_gone() -> None:
    model = nn.ReLU()

    def handles() -> Iterator[RemovableHandle]:
        yield model.register_forward_hook(lambda *_: None)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked(handles()):
        pytest.fail("the block must not run")
    assert hooks_of(model) == 0
