"""The squared distance that training minimises, against the formula operator by operator."""

import math

import pytest
import torch
from torch import Tensor, nn

from convrewrite.errors import UsageError
from convrewrite.meanings import Meaning
from convrewrite.tuning import losses
from convrewrite.tuning.losses import Distillation, mean_square, output_loss, relative_loss


def plainly(wanted: Tensor, found: Tensor, scale: float) -> Tensor:
    difference = torch.where(wanted == found, 0.0, found - wanted)
    return difference.square().mean() / scale


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (7,), (), (0, 3)])
def test_the_distance_and_its_gradient_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, found, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    other = found.clone().requires_grad_()
    found.requires_grad_()
    one, two = relative_loss(wanted, found, 1.7), plainly(wanted, other, 1.7)
    if not wanted.numel():
        assert one == 0
        return
    torch.testing.assert_close(one, two)
    (3 * one).backward()
    (3 * two).backward()
    torch.testing.assert_close(found.grad, other.grad)


def test_bfloat16_is_summed_in_float32() -> None:
    wanted = torch.randn(64, 8, 28, 28, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = (wanted + 0.1 * wanted.abs()).requires_grad_()
    loss = relative_loss(wanted, found, 1.0)
    assert loss.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    expected = (found.detach() - wanted).double().square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=eps**2 * 64)
    loss.backward()
    assert found.grad is not None and found.grad.dtype == torch.bfloat16


def test_the_same_infinity_is_no_difference_and_other_ones_are() -> None:
    wanted = torch.tensor([math.inf, -math.inf, 1.0, 2.0])
    found = torch.tensor([math.inf, -math.inf, 1.0, 4.0], requires_grad=True)
    loss = relative_loss(wanted, found, 1.0)
    assert loss.item() == 1.0
    loss.backward()
    assert found.grad is not None and found.grad.tolist() == [0, 0, 0, 1]
    assert relative_loss(wanted, -found, 1.0).isinf()
    assert relative_loss(wanted, found * math.nan, 1.0).isnan()


def test_no_gradient_leads_to_what_is_wanted() -> None:
    wanted, found = (torch.ones(3, requires_grad=True) * k for k in (1.0, 2.0))
    relative_loss(wanted, found, 1.0).backward()
    assert wanted.grad_fn is not None and not relative_loss(wanted, found.detach(), 1.0).requires_grad


def test_values_in_float64_are_subtracted_in_float64() -> None:
    wanted = torch.full((4, 3), 1e6, dtype=torch.float64)
    loss = output_loss(wanted, wanted + 1e-3, Meaning("values", ""), torch.ones(1))
    assert loss.item() == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_scores_are_softened_by_the_temperature_and_their_divergence_is_multiplied_by_its_square(
    temperature: float,
) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, found = torch.randn(2, 6, 5, generator=generator)
    p, q = ((values / temperature).log_softmax(1) for values in (wanted, found))
    expected = temperature**2 * nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(output_loss(wanted, found, Meaning("logits", ""), torch.ones(1), temperature), expected)
    probabilities = wanted.softmax(1), found.softmax(1)
    soft = output_loss(*probabilities, Meaning("probabilities", ""), torch.ones(1), temperature)
    torch.testing.assert_close(soft, expected)


@pytest.mark.parametrize("processor", [losses.PROCESSOR, "elsewhere"])
def test_scores_that_are_masked_in_both_are_equal_and_get_no_gradient(
    processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PROCESSOR", processor)
    wanted, found = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logits, given, none = Meaning("logits", ""), found.clone().requires_grad_(), torch.full((2, 5), -math.inf)
    rows = torch.cat([wanted, none]), torch.cat([given, none + 0 * given[:2]])
    loss = output_loss(*rows, logits, torch.ones(1), 2.0)
    torch.testing.assert_close(loss, output_loss(wanted, found, logits, torch.ones(1), 2.0) * 4 / 6)
    loss.backward()
    assert given.grad is not None and bool(given.grad.isfinite().all()) and bool(given.grad.any())
    assert not output_loss(none, wanted[:2], logits, torch.ones(1)).isfinite()
    assert not output_loss(wanted[:2], none, logits, torch.ones(1)).isfinite()


def test_outputs_count_by_their_weights_and_features_as_one() -> None:
    meanings = {"a": Meaning("values", ""), "b": Meaning("values", "", weight=3.0), "c": Meaning("ignore", "")}
    ones = {name: torch.ones(2, 4) for name in meanings}
    features = {"f": torch.full((2, 4), 2.0), "g": torch.ones(2, 3), "picked": torch.ones(2, 3)}
    loss = Distillation.of(ones, meanings, features, weight=0.5)
    assert {name: scale.tolist() for name, scale in loss.scales.items()} == {"a": [1.0], "b": [1.0]}
    assert loss.feature_scales == {"f": 4.0, "g": 1.0, "picked": 1.0}
    found = {"a": ones["a"] + 2, "b": ones["b"] + 1, "c": ones["c"] + 9}
    assert loss(ones, found, {}, {}).item() == pytest.approx((1 * 4 + 3 * 1) / 4)
    others = {"f": features["f"] + 4, "g": features["g"] + 1, "picked": torch.ones(5, 3)}
    errors = (16 / 4, 1.0)  # what is picked has another shape, and does not count
    assert loss(ones, found, features, others).item() == pytest.approx(7 / 4 + 0.5 * sum(errors) / 2)
    assert loss(ones, found, features, {"g": others["g"]}).item() == pytest.approx(7 / 4 + 0.5)
    unweighed = Distillation.of(ones, meanings, features)
    assert unweighed(ones, found, features, others).item() == pytest.approx(7 / 4)
    with pytest.raises(UsageError, match="none is trained towards, and no feature was seen"):
        Distillation(meanings, {}, {"f": 4.0})({}, {}, {}, {})


def test_scales_are_those_of_all_examples_however_few_are_in_a_batch() -> None:
    meanings = {"y": Meaning("values", ""), "class": Meaning("logits", "")}
    outputs, features = {"y": 3 + torch.randn(12, 2), "class": torch.randn(12, 4)}, {"f": torch.randn(12, 5)}
    features["f"][0] = 0
    whole = Distillation.of(outputs, meanings, features)
    one = [tuple({name: t[i : i + 1] for name, t in named.items()} for named in (outputs, features)) for i in range(12)]
    apart = Distillation.over(one, meanings)  # type: ignore[arg-type]
    torch.testing.assert_close(dict(apart.scales), dict(whole.scales))
    assert apart.feature_scales == pytest.approx(whole.feature_scales)


def test_a_scale_is_the_mean_square_of_what_is_finite_or_one() -> None:
    assert mean_square(torch.tensor([3.0, math.inf, -1.0, math.nan])) == 5.0
    assert [mean_square(torch.tensor(values)) for values in ([0.0, 0.0], [math.inf], [])] == [1.0, 1.0, 1.0]
    assert mean_square(torch.tensor([3, 1])) == 5.0
