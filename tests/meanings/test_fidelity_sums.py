"""The fidelity of each kind of output, against torch's own distributions and by hand; the sums of several batches are those of
one."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from convrewrite.errors import VerificationError
from convrewrite.meanings import Fidelity, Meaning, OutputFidelity, RunningFidelity, effect_of, fidelity

EPSILON = torch.finfo(torch.float64).eps


def drawn(*size: int) -> tuple[Tensor, Tensor]:
    """Numbers in float64, and others near them."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*size, dtype=torch.float64, generator=generator)
    return a, a + 0.3 * torch.randn(*size, dtype=torch.float64, generator=generator)


def summed(a: Tensor, b: Tensor, kind: str, *, parts: int = 3) -> OutputFidelity:
    """The fidelity of one output, added in several batches."""
    running = RunningFidelity({"y": Meaning(kind, "")})  # type: ignore[arg-type]
    for one, other in zip(a.chunk(parts), b.chunk(parts), strict=True):
        running.add({"y": one}, {"y": other})
    (found,) = running.outputs()
    return found


def test_class_scores_have_the_divergence_of_their_distributions() -> None:
    a, b = drawn(9, 5)
    b[0] = a[0].flip(0)
    wanted = kl_divergence(Categorical(logits=a), Categorical(logits=b)).mean()
    agreed = (a.argmax(1) == b.argmax(1)).double().mean()
    found = summed(a, b, "logits")
    assert found.kl == pytest.approx(float(wanted), rel=1e-12)
    assert found.top1_agreement == float(agreed) < 1
    assert found.effect == found.kl
    as_probabilities = summed(a.softmax(1), b.softmax(1), "probabilities")
    assert as_probabilities.kl == pytest.approx(float(wanted), rel=1e-12)


def test_independent_probabilities_have_the_mean_divergence_of_their_entries() -> None:
    a, b = (numbers.sigmoid() for numbers in drawn(6, 7))
    found = summed(a, b, "multilabel")
    assert found.kl == pytest.approx(float(kl_divergence(Bernoulli(a), Bernoulli(b)).mean()), rel=1e-12)
    assert (found.top1_agreement, found.cosine, found.equal_share) == (None, None, None)
    assert found.effect == found.kl


def test_a_certain_probability_that_was_wrong_is_finite() -> None:
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 0.0]]).double()
    found = summed(a, b, "multilabel", parts=1)
    assert found.kl == pytest.approx(-math.log(EPSILON) / 2, rel=1e-9)


def test_embeddings_have_the_mean_cosine_and_its_distance() -> None:
    a, b = drawn(6, 7)
    found = summed(a, b, "embedding")
    wanted = float(torch.cosine_similarity(a, b).mean())
    assert found.cosine == pytest.approx(wanted, rel=1e-12)
    units = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
    assert found.effect == pytest.approx(float(units.square().sum(1).mean()), rel=1e-9)
    assert found.kl is None and found.relative_error > 0


def test_numbers_have_their_relative_error_and_the_variance_that_is_lost() -> None:
    a, b = drawn(6, 2, 3)
    found = summed(a, b, "values")
    assert found.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)
    rows = a.movedim(1, -1).flatten(0, -2)
    squares = (a - b).movedim(1, -1).flatten(0, -2).square()
    assert found.effect == pytest.approx(float((squares.mean(0) / rows.var(0)).mean()), rel=1e-12)
    assert (found.kl, found.cosine, found.top1_agreement) == (None, None, None)


def test_indices_have_the_share_that_is_equal() -> None:
    a = torch.arange(12).reshape(6, 2)
    b = a.clone()
    b[0] += 1
    b[1, 0] = 0
    found = summed(a, b, "discrete")
    assert found.equal_share == 9 / 12 and found.relative_error == pytest.approx(3 / 12)
    assert found.effect == pytest.approx((3 / 12) ** 2)


def test_equal_infinities_are_equal_and_others_are_not() -> None:
    a = torch.tensor([[3.0, -math.inf, 4.0]]).double()
    assert summed(a, a, "values", parts=1).relative_error == 0
    b = torch.tensor([[3.0, -math.inf, 5.0]]).double()
    assert summed(a, b, "values", parts=1).relative_error == pytest.approx(1 / 5)
    b[0, 1] = 0
    assert summed(a, b, "values", parts=1).relative_error == math.inf


@pytest.mark.parametrize(("kind", "axis"), [("logits", 1), ("logits", -1), ("probabilities", 1)])
def test_scores_that_are_masked_in_both_are_equal_and_in_one_alone_infinitely_far(kind: str, axis: int) -> None:
    a, b = (numbers.softmax(axis) for numbers in drawn(6, 5, 5))

    def kl(original: Tensor, found: Tensor) -> float | None:
        running = RunningFidelity({"y": Meaning(kind, "", axis=axis)})  # type: ignore[arg-type]
        running.add({"y": original.movedim(1, axis)}, {"y": found.movedim(1, axis)})
        return running.outputs()[0].kl

    known = a.clone(), b.clone()
    known[1][:, :, 4] = known[0][:, :, 4]  # equal there: nothing is added, either
    for infinity in (-math.inf, math.inf):
        masked = tuple(numbers.clone().index_fill_(2, torch.tensor([4]), infinity) for numbers in (a, b))
        assert kl(masked[0], masked[0]) == 0
        assert kl(*masked) == pytest.approx(kl(*known), rel=1e-12)
        if kind == "logits":
            assert kl(masked[0], b) == kl(a, masked[1]) == math.inf
    assert kl(a * math.nan, a * math.nan) == math.inf


def test_nothing_is_as_far_from_zero_as_can_be_and_zero_is_not() -> None:
    zero, one = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
    assert summed(zero, zero, "values", parts=1).relative_error == 0
    assert summed(zero, one, "values", parts=1).relative_error == math.inf


def test_the_effect_of_several_outputs_is_their_weighted_mean() -> None:
    a, b = drawn(6, 4)
    values, scores = Meaning("values", "", weight=3.0), Meaning("logits", "")
    meanings = {"v": values, "s": scores, "left": Meaning("ignore", "")}
    original, found = {"v": a, "s": a, "left": a}, {"v": b, "s": b, "left": b[:, :1]}
    parts = {name: summed(a, b, kind).effect for name, kind in (("v", "values"), ("s", "logits"))}
    effect = effect_of([(original, found)], meanings)
    assert effect == pytest.approx((3 * parts["v"] + parts["s"]) / 4, rel=1e-12)


def test_the_worst_output_speaks_for_all() -> None:
    outputs = (OutputFidelity("a", 0.1, 0.9), OutputFidelity("b", 0.3), OutputFidelity("c", 0.2, 0.7))
    fidelity = Fidelity(outputs, 4)
    assert (fidelity.worst_error, fidelity.least_agreement) == (0.3, 0.7)
    assert Fidelity(outputs[1:2], 4).least_agreement is None


@pytest.mark.parametrize(
    ("name", "classes", "what"), [("z", 3, "expected outputs y; found z"), ("y", 4, "expected shape")]
)
def test_other_outputs_are_refused(name: str, classes: int, what: str) -> None:
    running = RunningFidelity({"y": Meaning("values", "")}, "the other")
    with pytest.raises(VerificationError, match=f"the other.*{what}"):
        running.add({"y": torch.zeros(2, 3)}, {name: torch.zeros(2, classes)})


@pytest.mark.parametrize("kind", ["logits", "probabilities", "multilabel", "embedding", "values", "discrete"])
@pytest.mark.parametrize("size", [(6, 5), (6, 5, 3, 4), (6, 2, 5), (1, 5)])
def test_what_is_compared_in_pieces_gives_what_it_does_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str, size: tuple[int, ...]
) -> None:
    a, b = drawn(*size)
    if kind == "probabilities":
        a, b = a.softmax(1), b.softmax(1)
    elif kind == "multilabel":
        a, b = a.sigmoid(), b.sigmoid()
    elif kind == "discrete":
        a, b = (3 * a).long(), (3 * b).long()
    else:
        b[0, 0] = a[0, 0] = -math.inf if kind == "values" else 0.5
    found = []
    for piece in (1, a.numel()):
        monkeypatch.setattr(fidelity, "PIECE", piece)
        one = summed(a, b, kind, parts=1)
        found.append([one.relative_error, one.effect, one.top1_agreement or 0.0, one.cosine or 0.0])
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0][0] > 0
