"""Running a model: without gradients, in eval mode, with the same random numbers, and with errors that name the input."""

import pytest
import torch
from networks import Refilling
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.errors import TraceError
from convrewrite.modules.running import eval_mode, kept_outputs, run


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_what_is_run_needs_no_gradient_and_leaves_its_input() -> None:
    x = torch.ones(1, 2)
    assert not run(nn.Linear(2, 2), (x,)).requires_grad
    assert torch.equal(run(InPlace(), (x,)), 2 * torch.ones(1, 2))
    assert torch.equal(x, torch.ones(1, 2))


def test_a_model_that_does_not_run_is_told_with_the_shapes_it_was_given() -> None:
    with pytest.raises(TraceError, match=r"^Conv2d: the model does not run on input 1x3x4x4: .*--input"):
        run(nn.Conv2d(2, 1, 1), (torch.zeros(1, 3, 4, 4),))


def test_outputs_that_are_kept_are_not_those_of_a_later_run() -> None:
    model, x = Refilling(nn.Identity()), torch.ones(2)
    kept = [kept_outputs(model, (x * factor,))["output"] for factor in (1, 2)]
    assert torch.equal(torch.stack(kept), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))


class Importing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import no_such_module_beside_it

        return no_such_module_beside_it.double(x)  # type: ignore[no-any-return]


def test_what_a_forward_imports_is_no_matter_of_shapes() -> None:
    with pytest.raises(TraceError, match=r"No module named '\w+'; .* put the folder of that into PYTHONPATH"):
        run(Importing(), (torch.ones(1),))


class Flagged(nn.Module):
    def forward(self, image: Tensor, *, flag: Tensor) -> Tensor:
        return image * flag


def test_what_is_taken_by_keyword_only_has_to_be_wrapped() -> None:
    wrapped = (
        r"Flagged: .* keyword-only argument: 'flag'; wrap the model in a module whose forward takes tensors by position"
    )
    with pytest.raises(TraceError, match=wrapped):
        run(Flagged(), (torch.zeros(1, 3, 4, 4),))


def test_an_input_that_is_missing_is_no_matter_of_shapes() -> None:
    with pytest.raises(
        TraceError, match=r"Bilinear: .* argument: 'input2'; give every input of it \(--input once for each"
    ):
        run(nn.Bilinear(2, 2, 2), (torch.zeros(1, 2),))


@pytest.mark.parametrize(("text", "told"), [("", "ValueError"), ("first\nsecond", "first")])
def test_the_reason_is_one_line(text: str, told: str) -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(text)

    with pytest.raises(TraceError, match=f"on input 1: {told}; give") as caught:
        run(Refuses(), (torch.zeros(1),))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_model_that_draws_numbers_draws_the_same_ones_and_the_callers_go_on() -> None:
    x = torch.zeros(3)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = kept_outputs(Noisy(), (x,)), kept_outputs(Noisy(), (x,))
    assert torch.equal(first["output"], second["output"])
    assert first["output"].any()
    assert torch.equal(torch.rand(1), expected)


def test_eval_mode_is_that_of_every_part() -> None:
    model = nn.Sequential(nn.Sequential(nn.Dropout(1.0))).train()
    with eval_mode(model, F.relu):
        assert torch.equal(run(model, (torch.ones(2),)), torch.ones(2))
    assert model[0][0].training


def test_eval_mode_restores_every_flag_also_after_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model, None):
        raise KeyError
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before == [True, True, False]
