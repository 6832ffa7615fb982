"""The parts of a training: order, pace, steps, and the processes that share it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import Refilling
from torch import Tensor, nn

from convrewrite import precision
from convrewrite.errors import CalibrationError, ProcessLostError, TraceError, UsageError
from convrewrite.meanings import Meaning
from convrewrite.settings import Recovery
from convrewrite.tuning import (
    Pace,
    Training,
    TrainingInputs,
    accelerated,
    keeps_outputs,
    require_place,
    resumed,
    task_of,
    tasks,
)
from convrewrite.tuning.distilling import LOOKS, PATIENCE
from convrewrite.tuning.examples import Examples
from convrewrite.tuning.pace import WARM_UP
from convrewrite.tuning.processes import PRECISION, Accelerated, OneProcess
from convrewrite.tuning.scaling import LARGEST, Scale
from convrewrite.tuning.stepping import DECAY, LEAST, Stepper, size_of
from convrewrite.tuning.trainable import numbers_of, put_numbers

EPS = torch.finfo(torch.float64).eps


def test_every_example_is_seen_once_in_an_epoch_and_processes_share_what_one_would_see() -> None:
    examples = Examples((torch.arange(20.0)[:, None],), 4, seed=3)
    epoch = torch.cat([examples.rows(step) for step in range(5)])
    assert sorted(epoch.tolist()) == list(range(20))
    assert not torch.equal(epoch, torch.cat([examples.rows(step) for step in range(5, 10)]))
    for step in (0, 7):
        parts = [examples.rows(step, part, 2) for part in range(2)]
        assert torch.equal(torch.cat(parts), examples.rows(step))
    assert len(replace(examples, batch=50).rows(0)) == 20


def test_augmentation_draws_the_same_however_many_processes_there_are() -> None:
    examples = Examples((torch.zeros(8, 1, 4, 4),), 4, 0, lambda batch: batch + torch.rand(len(batch), 1, 1, 1))
    whole = examples.drawn(1, examples.rows(1))[0]
    parts = [examples.drawn(1, examples.rows(1, part, 2), part, 2)[0] for part in range(2)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, examples.drawn(2, examples.rows(2))[0])


def test_outputs_that_have_no_row_for_each_example_are_not_kept() -> None:
    examples = Examples((torch.randn(10, 3),), 4, 0)
    kept = examples.with_outputs(nn.Linear(3, 2))
    assert kept.outputs["output"].shape == (10, 2)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    assert not examples.with_outputs(Mean()).outputs

    class Longest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : 1 + int(x.amax() > examples.inputs[0][4:].amax())]

    examples.inputs[0][0] = 10.0
    assert not examples.with_outputs(Longest()).outputs


@pytest.mark.parametrize(("index", "there", "others"), [(1, 24.0, 0.0), (0, -1.0, 0.5)], ids=["its own", "another's"])
def test_processes_that_find_different_checkpoints_do_not_wait_for_each_other(
    index: int, there: float, others: float, tmp_path: Path
) -> None:
    class OneOfTwo(OneProcess):
        def of_main(self, value: float) -> float:
            return there

        def mean(self, values: Tensor) -> Tensor:
            return values / 2 + others

    processes = OneOfTwo()
    processes.index, processes.count = index, 2
    training = SimpleNamespace(run="run", processes=processes, task=SimpleNamespace(parameters={}))
    with pytest.raises(
        UsageError, match=r"expected all processes to find what the main one does, .* found that they do not"
    ):
        resumed(tmp_path / "state", training, [])  # type: ignore[arg-type]


def test_the_rate_rises_falls_and_ends_at_nothing() -> None:
    pace = Pace(2.0, steps=100)
    rates = [pace.rate_at(pace.progress(step, 0.0)) for step in range(101)]
    top = max(rates)
    assert top == rates[round(100 * WARM_UP)] == 2.0
    assert rates[0] > 0 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    timed = Pace(1.0, seconds=60)
    assert (timed.progress(9, 15.0), timed.progress(9, 90.0)) == (0.25, 1.0)


def test_steps_are_those_of_adamw_with_a_rate_relative_to_each_size() -> None:
    own = {"a": nn.Parameter(torch.randn(3, 4).double()), "b": nn.Parameter(torch.randn(5).double())}
    other = [nn.Parameter(parameter.detach().clone()) for parameter in own.values()]
    sizes = [size_of(parameter) for parameter in other]
    groups = [{"params": [p], "lr": 0.1 * size} for p, size in zip(other, sizes, strict=True)]
    reference, stepper = torch.optim.AdamW(groups, weight_decay=DECAY, eps=LEAST), Stepper(own)
    for _ in range(5):
        for one, two in zip(own.values(), other, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        stepper.step(0.1)
        reference.step()
    for one, two in zip(own.values(), other, strict=True):
        assert torch.allclose(one, two, rtol=64 * EPS, atol=64 * EPS)
    with stepper.averaged():
        assert all(torch.equal(own[name], stepper.average[name]) for name in own)
    assert not torch.equal(own["a"], stepper.average["a"])


def test_the_average_follows_closely_at_first_and_a_hundred_steps_later_on() -> None:
    own = {"a": nn.Parameter(torch.zeros(2).double())}
    stepper, expected = Stepper(own), torch.zeros(2).double()
    for step in range(1, 1001):
        own["a"].grad = torch.tensor([1.0, -0.5]).double() if step < 3 else None
        stepper.step(0.1)
        part = min(0.99, step / (step + 9))
        expected = part * expected + (1 - part) * own["a"].detach()
        if step in (1, 2, 20, 891, 1000):
            assert torch.allclose(stepper.average["a"], expected, rtol=1e-9)
    assert stepper.taken == 1000


def test_without_gradients_kernels_only_decay_by_their_own_rates() -> None:
    own = {
        "matrix": nn.Parameter(torch.randn(16, 16, 1, 1).double()),
        "depthwise": nn.Parameter(torch.randn(16, 1, 3, 3).double()),
        "bias": nn.Parameter(torch.zeros(16).double() + 1e-4),
        "small": nn.Parameter(torch.zeros(2, 2).double() + 1e-6),
    }
    before = numbers_of(own)
    for sizes in (None, dict.fromkeys(own, 4.0)):
        put_numbers(own, before)
        stepper = Stepper(own, sizes, orthogonal=True)
        assert stepper._matrices == ["matrix"]
        stepper.step(0.5)
        by_hand = {"bias": 0.05, "small": 1e-3} | {
            n: float(before[n].square().mean().sqrt()) for n in ("matrix", "depthwise")
        }
        for name, parameter in own.items():
            size = by_hand[name] if sizes is None else 4.0
            assert torch.allclose(parameter, before[name] * (1 - 0.5 * size * DECAY), rtol=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_steps_are_those_of_single_precision_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (16, 16, 1, 1), "depthwise": (16, 1, 3, 3), "bias": (16,)}
    half = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
    single = {name: nn.Parameter(p.detach().float()) for name, p in half.items()}
    start = numbers_of(half)
    one, two = Stepper(half, orthogonal=True), Stepper(single, orthogonal=True)
    for step in range(8):
        for name, parameter in half.items():
            parameter.grad = 1e-6 * torch.randn(parameter.shape, generator=generator).to(
                dtype
            )  # squares are lost in float16
            single[name].grad = parameter.grad.float()
        if step == 4:
            resumed, exact = Stepper(half, one._sizes, orthogonal=True), numbers_of(one.exact)  # type: ignore[arg-type]
            put_numbers(half, start)
            resumed.resume(one.taken, exact, one.average, one.first, one.second)
            one = resumed
        for stepper in (one, two):
            stepper.step(1e-4)  # much less than a part that rounding leaves
        for name, parameter in half.items():
            assert torch.equal(parameter, single[name].to(dtype)) and torch.equal(one.exact[name], single[name]), name
            assert torch.equal(one.average[name], two.average[name]), name
    assert all(not torch.equal(one.exact[name], start[name]) for name in start)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Sequential(nn.Conv2d(3, 2, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(2, 4, 1))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.site(x)).mean((2, 3))
        return out


MEANING = {"output": Meaning("logits", "")}


def training(steps: int = 40, **asked: object) -> Training:
    torch.manual_seed(0)
    original, rewritten = Net().eval(), Net().eval()
    settings = Recovery(batch=8, **asked)  # type: ignore[arg-type]
    given = TrainingInputs.split((torch.randn(40, 3, 6, 6),), None, 0)
    task = task_of(original, rewritten, {"site": None}, given, MEANING, settings, OneProcess())
    return Training(task, Pace(settings.rate, steps=steps), OneProcess())


class InPlace(Net):
    """Normalises the image that it is given where it stands."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


class Apart(Net):
    """The same in another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - 0.5) / 0.25)


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_a_model_may_work_on_its_inputs_in_place(keep_outputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for kind in (InPlace, Apart):
        monkeypatch.setattr("test_training.Net", kind)
        told.append([point.effect for point in training(features=0.0).train(keep_outputs=keep_outputs).curve])
    assert told[0] == told[1]


def test_the_original_may_give_the_same_tensor_again_and_again() -> None:
    given = TrainingInputs.split((torch.randn(64, 3, 6, 6),), None, 0, 4)
    original = Refilling(Net()).eval()
    task = task_of(original, Refilling(Net()).eval(), {}, given, MEANING, Recovery(batch=4), OneProcess())
    for batch, wanted in task.held_out:
        assert torch.equal(wanted["output"], original.network(*batch))
    kept = task.examples.with_outputs(original).outputs["output"]
    assert torch.equal(kept[:4], original.network(task.examples.inputs[0][:4]))


class Fours(Net):
    """Takes four images at a time."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("expected four images")
        return super().forward(x)


def test_scales_are_measured_on_whole_batches_and_on_several_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SCALED_ON", 3)
    images, meaning = torch.randn(80, 3, 6, 6), {"output": Meaning("values", "")}
    told = []
    for kind, size in ((Net, 16), (Fours, 4)):
        given = TrainingInputs.split((images,), None, 0, size)
        torch.manual_seed(0)
        original, rewritten = kind().eval(), kind().eval()
        task = task_of(original, rewritten, {"site": None}, given, meaning, Recovery(batch=size), OneProcess())
        told.append(task.loss.scales["output"])
    torch.testing.assert_close(*told)


class Contiguous(Net):
    """Takes images with their channels first alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return super().forward(x)


@pytest.mark.parametrize(("kind", "last"), [(Fours, True), (Contiguous, False)])
def test_a_layout_is_tried_on_as_many_examples_as_a_model_takes_and_may_be_refused_in_any_way(
    kind: type[Net], last: bool
) -> None:
    given = TrainingInputs.split((torch.randn(40, 3, 6, 6),), None, 0, 4)
    task = task_of(kind().eval(), kind().eval(), {"site": None}, given, MEANING, Recovery(batch=4), OneProcess())
    assert task.examples.inputs[0].is_contiguous(memory_format=torch.channels_last) is last


def test_scales_are_measured_on_as_many_examples_as_a_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SCALED_ON", 3)
    given = TrainingInputs.split((torch.randn(40, 3, 6, 6),), None, 0, 4)
    task = task_of(Fours().eval(), Fours().eval(), {"site": None}, given, MEANING, Recovery(batch=4), OneProcess())
    assert task.loss.feature_scales


class First(OneProcess):
    """The first of two."""

    count = 2


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_each_process_gets_as_many_examples_as_a_model_takes(keep_outputs: bool) -> None:
    def trained(count: int) -> int:
        given = TrainingInputs.split((torch.randn(count, 3, 6, 6),), None, 0, 4)
        asked = Recovery(batch=4, features=0.0)
        task = task_of(Fours().eval(), Fours().eval(), {"site": None}, given, MEANING, asked, First())
        return Training(task, Pace(0.01, steps=4), First()).train(keep_outputs=keep_outputs).steps

    assert trained(20) == 4
    with pytest.raises(
        CalibrationError, match=r"expected at least 8 inputs to train on, .* 2 processes, found 4; give more"
    ):
        trained(8)


def test_each_process_gets_an_example() -> None:
    given = TrainingInputs.split((torch.randn(2, 3, 6, 6),), None, 0)
    with pytest.raises(
        CalibrationError, match="at least 2 inputs to train on, as there are 2 processes, found 1; give"
    ):
        task_of(Net().eval(), Net().eval(), {"site": None}, given, MEANING, Recovery(features=0.0), First())


def test_gradients_that_float16_has_no_numbers_for_are_scaled() -> None:
    torch.manual_seed(0)
    original, rewritten = Net().eval().half(), Net().eval().half()
    given = TrainingInputs.split((torch.randn(10, 3, 24, 24).half(),), None, 0)
    meaning = {"output": Meaning("values", "")}
    task = task_of(original, rewritten, {"site": None}, given, meaning, Recovery(features=0.0), OneProcess())
    faint = replace(task.loss, scales={"output": torch.full((4,), 1e4)})
    told = Training(replace(task, loss=faint), Pace(0.05, steps=10), OneProcess()).train()
    assert told.best.effect < 0.8 * told.before


def test_a_scale_under_which_gradients_overflow_is_made_smaller_until_the_next_checkpoint() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    scale = Scale(nn.ParameterList([weight]))

    def backwards(factor: float) -> float:
        (100 * weight.float() * factor).sum().backward()
        return factor

    assert scale.differentiated([weight], backwards) == scale.factor == 256.0
    assert weight.grad is not None and weight.grad.tolist() == [25_600.0] * 3
    scale.begin()
    assert scale.factor == LARGEST
    assert Scale(nn.Linear(2, 2)).differentiated([weight], lambda factor: factor) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_go_between_processes_as_exactly_as_they_are(dtype: torch.dtype) -> None:
    class Two(OneProcess):
        index, count = 0, 2

    run = training()
    run.processes = Two()
    run.task.rewritten.to(dtype)
    wanted = {name: torch.randn_like(parameter) for name, parameter in run.task.parameters.items()}
    for name, parameter in run.task.parameters.items():
        parameter.grad = wanted[name].clone()
    assert float(run._together(torch.tensor(0.1, dtype=torch.float64))) == pytest.approx(0.1)
    for name, parameter in run.task.parameters.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, wanted[name])


@pytest.mark.parametrize("features", [1.0, 0.0])
def test_the_original_runs_beside_for_its_features_and_else_once_for_its_outputs(
    features: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        precision, "multiplies_bfloat16", lambda: False
    )  # else it runs in bfloat16 once, to see what that does
    run = training(features=features)
    assert list(run.task.joins) == (["site"] if features else [])
    assert keeps_outputs(run.task, 1 << 30)
    runs = [0]
    run.task.original.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    run.train(keep_outputs=True)
    assert runs[0] == (40 if features else math.ceil(run.task.examples.count / 8))


class Batched(Net):
    """Normalises by the batch that it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_outputs_that_depend_on_the_rest_of_a_batch_are_not_kept() -> None:
    run = training()
    assert keeps_outputs(run.task, 1 << 30)
    torch.manual_seed(0)
    for count in (40, 5):
        original, given = Batched().eval(), TrainingInputs.split((torch.randn(count, 3, 6, 6),), None, 0)
        task = task_of(original, Batched().eval(), {"site": None}, given, MEANING, Recovery(batch=8), OneProcess())
        assert not keeps_outputs(task, 1 << 30)
    needed = 2 * run.task.examples.count * 4 * 4  # four numbers for each example, in half of the memory
    assert [keeps_outputs(run.task, memory) for memory in (needed, needed - 1)] == [True, False]


def test_a_training_looks_as_often_as_it_says_and_ends_where_nothing_is_gained() -> None:
    found = training(rate=0.02).train()
    assert len(found.curve) == LOOKS + 1 and found.ended is None and found.best.effect < found.before
    hopeless = training(rate=1e4).train()
    assert hopeless.ended is not None and len(hopeless.curve) <= PATIENCE + 2


def test_the_clock_ends_a_training_that_was_given_seconds() -> None:
    run = training()
    ticks = iter(range(1000))
    run.pace, run.clock = Pace(0.01, seconds=30.0), lambda: float(next(ticks))
    found = run.train()
    assert 25 <= found.seconds <= 35 and 20 <= found.steps <= 30


@pytest.mark.parametrize("asked", [False, True])
def test_steps_are_in_bfloat16_where_nobody_says_how_to_cast(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    run, seen = training(rate=0.02), set()
    monkeypatch.setattr(OneProcess, "precision_asked", asked)

    def note(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled():
            seen.add(output.dtype)

    run.task.rewritten.relu.register_forward_hook(note)
    found = run.train()
    assert seen == {torch.float32 if asked else torch.bfloat16}
    assert found.best.effect < 0.9 * found.before and found.best.effect == run.task.effect()


def test_a_gradient_that_does_not_pass_in_bfloat16_passes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    run = training(rate=0.02)

    def refuse(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad and output.dtype == torch.bfloat16:
            raise RuntimeError("derivative for this is not implemented for 'BFloat16'")

    run.task.rewritten.relu.register_forward_hook(refuse)
    found = run.train()
    assert not run.bfloat16 and found.best.effect < 0.9 * found.before


def test_the_environment_of_a_launcher_says_how_to_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(mixed_precision="no", process_index=0, num_processes=1, device=torch.device("cpu"))
    monkeypatch.delenv(PRECISION, raising=False)
    assert not Accelerated(fake).precision_asked
    monkeypatch.setenv(PRECISION, "no")
    assert Accelerated(fake).precision_asked
    monkeypatch.delenv(PRECISION)
    fake.mixed_precision = "bf16"
    assert Accelerated(fake).precision_asked


def test_outputs_that_cut_gradients_off_are_refused() -> None:
    run = training()
    run.task.rewritten.register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(TraceError, match="as the model cuts them off"):
        run.train()


class NoGradient(torch.autograd.Function):
    """An operator of the user's own that was written for use alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()


def for_inference(x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise ValueError("for inference only")
    return x


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (NoGradient.apply, "NotImplementedError"),
        (lambda x: x.exp().add_(1), "modified by an inplace operation"),
        (for_inference, "ValueError: for inference only"),
    ],
    ids=["no gradient", "in place", "refused"],
)
@pytest.mark.parametrize("fast", [False, True])
def test_what_torch_cannot_differentiate_is_refused(
    after: Callable[[Tensor], Tensor], told: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: fast)
    run = training()
    run.task.rewritten.register_forward_hook(lambda _module, _inputs, output: after(output))
    with pytest.raises(TraceError, match=f"that torch can differentiate, found that it cannot: .*{told}"):
        run.train()


def test_what_was_given_is_split_by_its_seed_and_enough_of_it_is_needed() -> None:
    inputs = (torch.arange(30.0)[:, None],)
    one, two, other = (TrainingInputs.split(inputs, torch.arange(30), seed) for seed in (0, 0, 1))
    assert torch.equal(one.train[0], two.train[0]) and not torch.equal(one.train[0], other.train[0])
    assert sorted(torch.cat([one.train[0], one.held_out[0]]).flatten().tolist()) == inputs[0].flatten().tolist()
    assert one.labels is not None and torch.equal(one.labels, one.train[0].flatten().long())
    assert (
        len(TrainingInputs.split(inputs, None, 0, 4).train[0]),
        len(TrainingInputs.split(inputs, None, 0, 4).held_out[0]),
    ) == (24, 4)
    with pytest.raises(CalibrationError, match="expected at least 8 inputs"):
        TrainingInputs.split((inputs[0][:6],), None, 0, 4)


def test_what_is_held_out_already_stays_so_with_the_labels_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MOST_HELD_OUT", 5)
    inputs = (torch.arange(30.0)[:, None],)
    for batch, sizes in ((None, (20, 5)), (4, (20, 4)), (6, (18, 6))):
        given = TrainingInputs.split(inputs, torch.arange(30), 0, batch, 20)
        trained, held_out = given.train[0].flatten(), given.held_out[0].flatten()
        assert (len(trained), len(held_out)) == sizes
        assert float(trained.max()) < 20 <= float(held_out.min())
        assert given.labels is not None and torch.equal(given.labels, trained.long())


def test_a_precision_that_needs_scaled_losses_is_refused() -> None:
    fake = SimpleNamespace(mixed_precision="fp16", process_index=0, num_processes=1, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="expected a mixed precision of no or bf16, found fp16"):
        Accelerated(fake)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (PRECISION, "fp8", "precision of no or bf16, found fp8"),
        ("LOCAL_RANK", "0", "found that it fails: ValueError: .*unset"),
    ],
)
def test_an_environment_that_accelerate_refuses_is_told_of(
    name: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^accelerate: expected .*{told}"), accelerated():
        pass
    monkeypatch.delenv(name)
    with accelerated() as processes:
        assert processes.count == 1


def test_a_process_that_is_gone_is_told_of() -> None:
    def gone(*_args: object, **_named: object) -> Tensor:
        raise RuntimeError("Connection closed by peer [127.0.0.1]")

    fake = SimpleNamespace(
        mixed_precision="no", process_index=0, num_processes=2, device=torch.device("cpu"), reduce=gone
    )
    with pytest.raises(ProcessLostError, match=r"Connection closed by peer .*; the last checkpoint stands"):
        Accelerated(fake).mean(torch.zeros(1))


def test_a_name_too_long_for_a_file_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written \(.*\); name another place"):
        require_place(tmp_path / ("a" * 5000))
