"""Refinement: nearer to the original on inputs that no step has seen, or nothing at all."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from networks import Refilling
from torch import Tensor, nn

from convrewrite import Result, optimize, precision
from convrewrite.layers import DynamicConv2d
from convrewrite.meanings import Meaning, rounding_of, tell
from convrewrite.tuning import refining
from convrewrite.tuning.activations import Activations
from convrewrite.tuning.refining import (
    FEWEST,
    HOPELESS,
    LEAST_STEPS,
    PASSES,
    STEPS,
    STEPS_OF_EFFECT,
    WORK,
    Recipe,
    Refined,
    Refinement,
    _Towards,
    refine,
)
from convrewrite.tuning.trainable import numbers_of

RECIPE = Recipe(steps=120, examples=32)


@pytest.fixture(autouse=True)
def as_many_steps_as_elsewhere_than_in_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining, "LEAST_STEPS", LEAST_STEPS)
    monkeypatch.setattr(refining, "STEPS_OF_EFFECT", STEPS_OF_EFFECT)


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise in which a bright square stands in one of four quarters, which is its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    x = torch.randn(count, 1, 12, 12, generator=generator)
    for index, label in enumerate(labels.tolist()):
        top, left = 6 * (label // 2), 6 * (label % 2)
        x[index, 0, top + 1 : top + 5, left + 1 : left + 5] += 0.7
    return x, labels


def convolutions() -> list[nn.Module]:
    return [
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*convolutions(), nn.Flatten(), nn.Linear(12 * 36, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, labels = images(512, seed=1)
    for step in range(60):
        rows = slice(64 * (step % 8), 64 * (step % 8 + 1))
        nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rewritten(model: nn.Module, **asked: object) -> Result:
    x, _ = images(160, seed=2)
    asked = {"measure": False, "exclude": ["0"]} | asked
    return optimize(model, x[:1], ["asymmetric"], x, {"macs": 0.25}, **asked)  # type: ignore[arg-type]


def task_of(model: nn.Module, small: nn.Module, recipe: Recipe = RECIPE) -> Refinement:
    x, _ = images(160, seed=2)
    fit, held_out = [(part,) for part in x[:128].split(32)], [(x[128:],)]
    sites = {
        name: None for name, module in small.named_modules()
        if type(module) is nn.Sequential and name and isinstance(model.get_submodule(name), nn.Conv2d)
    }  # fmt: skip
    return Refinement(
        original=model, rewritten=small, sites=sites, fit=fit, held_out=held_out, meanings=tell(model, held_out), macs=1,
        memory=1 << 30, recipe=recipe,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small(classifier: nn.Sequential) -> nn.Module:
    return rewritten(classifier, refine=False).model


@pytest.fixture
def task(classifier: nn.Sequential, small: nn.Module) -> Refinement:
    return task_of(classifier, deepcopy(small))


def test_the_effect_on_held_out_inputs_falls(task: Refinement) -> None:
    before = task.effect()
    found = refine(task)
    assert found.steps == RECIPE.steps
    assert found.before == before
    assert found.after == task.effect() < 0.95 * before
    assert "refined in 120 steps: the effect" in found.note


def test_a_small_gain_is_told_in_as_many_digits_as_show_it() -> None:
    assert Refined(0.0053, 0.0041, 120).note.endswith("fell from 0.0053 to 0.0041")
    assert Refined(0.00053541, 0.00053511, 120).note.endswith("fell from 0.0005354 to 0.0005351")


def test_the_same_seed_gives_the_same_bytes(task: Refinement) -> None:
    other = replace(task, rewritten=deepcopy(task.rewritten))
    assert refine(task) == refine(other)
    for name, value in task.rewritten.state_dict().items():
        assert torch.equal(value, other.rewritten.state_dict()[name]), name


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_an_absurd_rate_gives_back_what_came_in(task: Refinement, rate: float) -> None:
    start = numbers_of(dict(task.rewritten.named_parameters()))
    found = refine(replace(task, recipe=replace(RECIPE, rate=rate)))
    assert found.after == found.before
    assert "left as it was" in found.note
    for name, value in task.rewritten.named_parameters():
        assert torch.equal(value, start[name]), name


def dtypes_of_steps(task: Refinement, at_most: int) -> set[torch.dtype]:
    """In which a refinement of so many steps computes; looks at held-out inputs are no part of them."""
    seen = set()

    class Noted(Activations):
        def __exit__(self, *raised: object) -> None:
            super().__exit__(*raised)  # type: ignore[arg-type]
            seen.update(value.dtype for value in self.seen.values() if value.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "Activations", Noted)
        refine(replace(task, recipe=replace(RECIPE, steps=at_most)))
    return seen


def test_steps_are_in_bfloat16_where_it_is_fast_and_does_little(
    task: Refinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = task.effect()
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    rounding = rounding_of(task.original, task.shown(), task.meanings)
    assert 0 < rounding < refining.ROUNDING * before
    assert dtypes_of_steps(task, 120) == {torch.bfloat16}
    assert task.effect() < 0.95 * before
    assert all(p.dtype == torch.float32 for p in task.rewritten.parameters())
    monkeypatch.setattr(refining, "ROUNDING", 0.5 * rounding / task.effect())
    assert dtypes_of_steps(task, 20) == {torch.float32}
    monkeypatch.setattr(refining, "ROUNDING", 0.1)
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    assert dtypes_of_steps(task, 20) == {torch.float32}


class NoGradientInBfloat16(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad and input.dtype == torch.bfloat16:
            raise RuntimeError("derivative for this is not implemented for 'BFloat16'")
        return super().forward(input)


def test_steps_are_in_float32_where_no_gradient_passes_in_bfloat16(
    classifier: nn.Sequential, small: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    original, rewritten = deepcopy(classifier), deepcopy(small)
    original[3] = rewritten[3] = NoGradientInBfloat16()
    task = task_of(original, rewritten)
    before = task.effect()
    assert dtypes_of_steps(task, 120) == {torch.float32}
    assert task.effect() < 0.95 * before


def test_parts_of_a_batch_give_the_gradients_of_the_whole(task: Refinement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: False)
    other = replace(task, rewritten=deepcopy(task.rewritten))
    few = replace(RECIPE, steps=20)
    refine(replace(task, recipe=few, memory=100_000))
    refine(replace(other, recipe=few))
    for name, value in task.rewritten.named_parameters():
        assert torch.allclose(value, other.rewritten.get_parameter(name), rtol=1e-3, atol=1e-4), name


def test_the_best_of_all_looks_is_kept_and_steps_end_where_it_is_far_behind(
    task: Refinement, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, seen = (
        iter([1.0, 0.5, 0.2, 0.8, 0.1 * HOPELESS, 0.1 * HOPELESS, 0.2 * HOPELESS, 0.3]),
        list[dict[str, Tensor]](),
    )

    def effect(self: Refinement, shown: object = None) -> float:
        del shown
        seen.append(numbers_of(dict(self.rewritten.named_parameters())))
        return next(told)

    monkeypatch.setattr(Refinement, "effect", effect)
    found = refine(replace(task, recipe=replace(RECIPE, steps=20)))
    assert (found.before, found.after, found.steps, next(told, None)) == (1.0, 0.3, 6, None)
    for name, value in task.rewritten.named_parameters():
        assert torch.equal(value, seen[2][name]) and torch.equal(value, seen[-1][name]), name
    assert any(not torch.equal(seen[2][name], value) for name, value in seen[6].items())


def test_an_interrupt_leaves_the_best_so_far(task: Refinement) -> None:
    before = task.effect()

    def stop(_stage: str, done: int, _total: int, _text: str) -> None:
        if done >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(task, stop)
    assert task.effect() <= before * (1 + 1e-5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in task.rewritten.parameters())


def test_a_model_of_values_is_refined_towards_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*convolutions(), nn.Conv2d(12, 2, 3, padding=1)).eval()
    task = task_of(model, rewritten(model, refine=False, exclude=["0", "6"]).model)
    assert {meaning.kind for meaning in task.meanings.values()} == {"values"}
    found = refine(task)
    assert found.after < 0.95 * found.before


class Ungradable(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Detached(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_scales_do_not_depend_on_how_many_examples_a_model_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*convolutions(), nn.Flatten(), nn.Linear(12 * 36, 3)).eval()
    task = replace(task_of(model, model), meanings={"output": Meaning("values", "")})
    one = replace(task, fit=[(image,) for image in task.fit[0][0].split(1)], batch=1)
    several, single = (_Towards.of(task).distillation for task in (task, one))
    torch.testing.assert_close(dict(single.scales), dict(several.scales))
    assert single.feature_scales == pytest.approx(several.feature_scales)


def test_where_no_gradient_passes_nothing_is_changed_and_it_is_said() -> None:
    torch.manual_seed(0)
    model = Ungradable(*convolutions()).eval()
    result = rewritten(model, refine=True)
    assert any(note.startswith("not refined: it cannot be trained: ") for note in result.report.notes)


def test_the_original_may_give_the_same_tensor_again_and_again() -> None:
    model = Refilling(nn.Sequential(*convolutions())).eval()
    batches = [(part,) for part in images(8, seed=2)[0].split(4)]
    shown = replace(task_of(model.network, model.network), original=model, held_out=batches).shown()
    assert all(torch.equal(wanted["output"], model.network(*batch)) for batch, wanted in shown)


class ForInference(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("for inference only")
        return super().forward(x)


def test_a_forward_may_refuse_gradients_in_any_way() -> None:
    torch.manual_seed(0)
    task = task_of(ForInference(*convolutions()).eval(), ForInference(*convolutions()).eval())
    found = refine(replace(task, sites={"0": None}))
    assert found.reason == "it cannot be trained: ValueError: for inference only"


def test_a_loss_that_is_no_number_is_told(task: Refinement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refining._Towards, "backward", lambda *_: math.inf)
    found = refine(task)
    assert found.note == "not refined: its loss is not a finite number on the inputs that are fitted on"
    assert (found.steps, found.before) == (0, found.after)


def test_features_are_trained_towards_where_outputs_have_no_gradient() -> None:
    torch.manual_seed(0)
    model = Detached(*convolutions()).eval()
    task = task_of(model, rewritten(model, refine=False).model)
    found = refine(task)
    assert found.steps == RECIPE.steps
    assert found.after < found.before


def without_held_out(task: Refinement) -> Refinement:
    return replace(task, held_out=())


def too_large(task: Refinement) -> Refinement:
    return replace(task, macs=10**12)


def too_large_unasked(task: Refinement) -> Refinement:
    return replace(too_large(task), asked=False)


def large(task: Refinement) -> Refinement:
    """So large that some steps would be made where it was asked for."""
    large = replace(task, macs=int(WORK / (PASSES * task.examples * (FEWEST - 10))))
    assert large.steps >= FEWEST > replace(large, asked=False).steps
    return replace(large, asked=False)


def few(task: Refinement) -> Refinement:
    return replace(task, fit=[(task.fit[0][0][:2],)])


def good_already(task: Refinement) -> Refinement:
    return replace(task, rewritten=deepcopy(task.original), sites={}, asked=False)


@pytest.mark.parametrize("change", [without_held_out, too_large, too_large_unasked, large, few, good_already])
def test_nothing_is_begun(task: Refinement, change: Callable[[Refinement], Refinement]) -> None:
    start = numbers_of(dict(task.rewritten.named_parameters()))
    found: Refined = refine(change(task))
    assert found.steps == 0
    assert ("--refine does it all the same" in found.note) == (change is large)
    assert ("not refined" in found.note) == (change is not good_already)
    for name, value in task.rewritten.named_parameters():
        assert torch.equal(value, start[name]), name


def refined_in(result: Result) -> bool:
    return any(note.startswith("refined in ") for note in result.report.notes)


@pytest.mark.slow
def test_a_run_refines_by_itself_unless_it_is_fast_or_told_not_to(classifier: nn.Sequential) -> None:
    result = rewritten(classifier)
    assert refined_in(result)
    assert result.report.seconds["refine"] > 0
    for options in ({"fast": True}, {"refine": False}):
        quick = rewritten(classifier, **options)
        assert not refined_in(quick)
        assert "refine" not in quick.report.seconds
    assert refined_in(rewritten(classifier, fast=True, refine=True))


def test_the_more_there_is_to_gain_the_more_steps_are_taken(task: Refinement) -> None:
    long = replace(task, recipe=Recipe(examples=1), asked=False)
    assert long.steps == STEPS
    assert (
        long.steps_for(1e-5) == LEAST_STEPS < long.steps_for(0.02) < long.steps_for(0.04) < long.steps_for(1.0) == STEPS
    )
    assert task.steps_for(1.0) == task.steps_for(float("inf")) == RECIPE.steps


def test_four_times_the_steps_are_taken_where_it_was_asked_for(task: Refinement) -> None:
    asked = replace(task, recipe=Recipe(examples=1))
    for effect in (1e-5, 0.006, 0.01):
        assert asked.steps_for(effect) == 4 * replace(asked, asked=False).steps_for(effect)
    assert asked.steps_for(1.0) == STEPS


def test_the_less_there_is_to_gain_the_smaller_are_the_steps(task: Refinement) -> None:
    rates = [task.rate_for(effect) for effect in (0.0, 1e-4, 0.001, 0.025, 0.1, 1.0)]
    assert rates == pytest.approx([0.0005, 0.0005, 0.001, 0.005, 0.01, 0.01])


class Beside(nn.Module):
    """A convolution of volumes, whose kernel has five axes, behind one of images."""

    def __init__(self) -> None:
        super().__init__()
        self.plane, self.dynamic = nn.Conv2d(1, 8, 3, padding=1), DynamicConv2d(8, 8, kernels=2)
        self.volume, self.head = nn.Conv3d(1, 1, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.dynamic(torch.relu(self.plane(x))))
        return self.head(torch.relu(self.volume(x[:, None])).mean((1, 3, 4)))


def test_kernels_of_five_axes_do_not_stand_in_the_way() -> None:
    torch.manual_seed(0)
    original, (x, _) = Beside().eval(), images(96, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    rewritten = deepcopy(original)
    with torch.no_grad():
        rewritten.plane.weight.mul_(0.8)
    refinement = Refinement(
        original=original, rewritten=rewritten, sites={"plane": None}, fit=((x[:64],),), held_out=((x[64:],),),
        meanings=tell(original, ((x,),)), macs=10**5, memory=1 << 30, recipe=replace(RECIPE, steps=FEWEST),
    )  # fmt: skip
    found = refine(refinement)
    assert found.reason is None and found.after < found.before
    assert rewritten.volume.weight.is_contiguous()
