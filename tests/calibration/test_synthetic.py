"""Images synthesised from BatchNorm statistics: nearer to them than noise, repeatable, and harmless to the model."""

import pytest
import torch
from torch import Tensor, nn

from convrewrite.calibration.batches import Calibration
from convrewrite.calibration.choose import calibrate
from convrewrite.calibration.synthetic import _frozen_copy, _statistics_seen, synthesise
from convrewrite.errors import TraceError
from convrewrite.modules.running import run
from convrewrite.progress import silent

SHAPE = (3, 12, 12)
EXAMPLE = (torch.zeros(1, *SHAPE),)


def batch_norms(model: nn.Module) -> list[str]:
    """The names of the BatchNorms whose statistics are to be matched."""
    frozen = _frozen_copy(model)
    with _statistics_seen(frozen) as watch:
        run(frozen, EXAMPLE)
    return list(watch.moments)


def photographs(count: int) -> Tensor:
    """Smooth, bright images in [0, 1] with alike channels: unlike noise in every layer."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, 1, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    return (0.3 + 0.6 * smooth) * torch.tensor([1.0, 0.8, 0.5])[:, None, None]


def trained_net() -> nn.Sequential:
    """A small net whose BatchNorms have seen photographs; the last one is never trained."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(photographs(256))
    return net


def images_of(calibration: Calibration | None) -> Tensor:
    assert calibration is not None
    return torch.cat([inputs[0] for inputs in calibration.fit + calibration.held_out])


@torch.no_grad()
def distances(net: nn.Sequential, images: Tensor) -> list[float]:
    """For each BatchNorm: how far the means of its input are from the running ones, in standard deviations."""
    found = []
    x = images
    for module in net.eval():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            off = (x.mean((0, 2, 3)) - module.running_mean) / module.running_var.sqrt()
            found.append(float(off.square().mean().sqrt()))
        x = module(x)
    return found


def test_statistics_are_nearer_than_those_of_noise() -> None:
    net = trained_net()
    made = images_of(synthesise(net, EXAMPLE, count=32, batch=16, steps=60))
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(distances(net, made), distances(net, noise), strict=True):
        assert ours < 0.2 * theirs


def test_covariances_are_nearer_to_real_ones_than_those_of_noise() -> None:
    net = trained_net().eval()
    made = images_of(synthesise(net, EXAMPLE, count=32, batch=16, steps=60))
    noise = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(1))
    real, ours, theirs = (torch.cov(x.movedim(1, 0).flatten(1)) for x in (photographs(256), made, noise))
    assert (ours - real).norm() < 0.2 * (theirs - real).norm()


def test_the_result_is_a_split_calibration_that_says_what_it_is() -> None:
    calibration = synthesise(trained_net(), EXAMPLE, count=20, batch=8, steps=5)
    assert calibration is not None
    assert (calibration.fitted_on, calibration.held_out_count) == (16, 4)
    assert calibration.kind == "synthetic"
    assert "20 images" in calibration.notes[0]
    assert "5 steps" in calibration.notes[0]
    assert "only 20 images" in calibration.notes[1]


def test_the_same_seed_gives_the_same_bytes() -> None:
    net = trained_net()
    first, again, other = (images_of(synthesise(net, EXAMPLE, count=8, steps=4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_two_images_are_alike() -> None:
    made = images_of(synthesise(trained_net(), EXAMPLE, count=24, batch=8, steps=20)).flatten(1)
    apart = torch.cdist(made, made) + torch.eye(24) * 1e9
    assert float(apart.min()) > 0.1


def test_the_model_is_left_as_it_is() -> None:
    net = trained_net()
    net[0].requires_grad_(False)
    net[3].train(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]
    state = torch.get_rng_state()
    synthesise(net, EXAMPLE, count=8, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert ([p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]) == flags
    assert all(p.grad is None for p in net.parameters())
    assert all(not m._forward_pre_hooks for m in net.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_every_step_is_reported_and_the_mismatch_falls() -> None:
    steps: list[tuple[int, int, float]] = []
    synthesise(trained_net(), EXAMPLE, count=16, batch=8, steps=30, on_step=lambda *step: steps.append(step))
    assert [(done, total) for done, total, _ in steps] == [(i, 60) for i in range(1, 61)]
    assert steps[29][2] < 0.2 * steps[0][2]


def test_work_bounds_images_and_steps() -> None:
    calibration = synthesise(trained_net(), EXAMPLE, count=128, steps=200, work=1.0)
    assert calibration is not None
    assert "8 images" in calibration.notes[0]
    assert "40 steps" in calibration.notes[0]
    macs = 12 * 12 * 8 * 27 + 6 * 6 * 12 * 72
    calibration = synthesise(trained_net(), EXAMPLE, count=128, steps=60, work=2 * macs * 64 * 50)
    assert calibration is not None
    assert "64 images" in calibration.notes[0]
    assert "50 steps" in calibration.notes[0]


def test_under_no_grad_and_inference_mode() -> None:
    net = trained_net()
    plain = images_of(synthesise(net, EXAMPLE, count=8, steps=3))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            made = images_of(synthesise(net, EXAMPLE, count=8, steps=3))
        assert torch.equal(made.clone(), plain)


def test_the_dtype_is_that_of_the_example() -> None:
    net = trained_net()
    for dtype in (torch.float64, torch.bfloat16):
        example = (EXAMPLE[0].to(dtype),)
        assert images_of(synthesise(net.to(dtype), example, count=8, steps=3)).dtype == dtype


def test_a_shared_batch_norm_matches_the_average_of_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.norm(self.conv(x))
            return x

    torch.manual_seed(0)
    net = Twice()
    net(photographs(64))
    assert batch_norms(net) == ["norm"]
    assert len(images_of(synthesise(net, EXAMPLE, count=8, steps=3))) == 8


def test_only_batch_norms_that_are_called_and_trained_count() -> None:
    net = trained_net()
    net.append(nn.Identity())
    net[-1].unused = nn.BatchNorm2d(4)
    assert batch_norms(net) == ["1", "4"]
    net[4].reset_running_stats()  # type: ignore[operator]
    assert batch_norms(net) == ["1"]


def test_a_convolution_that_takes_no_image_is_not_counted() -> None:
    class Pair(nn.Conv2d):
        def forward(self, pair: tuple[Tensor, int]) -> Tensor:  # type: ignore[override]
            return super().forward(pair[0]) * pair[1]

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0]((x, 2)))

    norm = nn.BatchNorm2d(4)
    nn.init.ones_(norm.running_mean)  # type: ignore[arg-type]
    assert batch_norms(Net(Pair(3, 4, 3), norm).eval()) == ["1"]


def test_none_where_there_is_nothing_to_match() -> None:
    conv = nn.Conv2d(3, 4, 3)
    untracked = nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False))
    new = nn.Sequential(conv, nn.BatchNorm2d(4))
    for net in (nn.Sequential(conv, nn.ReLU()), untracked, new):
        assert synthesise(net, EXAMPLE) is None


def test_none_for_models_that_take_no_single_image() -> None:
    net = trained_net()
    for example in ((*EXAMPLE, *EXAMPLE), (torch.zeros(1, 5),), (torch.zeros(1, *SHAPE, dtype=torch.int64),)):
        assert synthesise(net, example) is None


class HalfInside(nn.Module):
    """Computes in half precision, between inputs and outputs in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained_net().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.to(torch.bfloat16))
        return y.float()


def test_none_where_a_model_does_not_run_in_the_precision_that_gradients_need() -> None:
    assert synthesise(HalfInside().eval(), EXAMPLE) is None
    with pytest.raises(TraceError, match="does not run on input 1x5x3x3"):
        synthesise(HalfInside().eval(), (torch.zeros(1, 5, 3, 3),))


def test_none_where_no_gradient_reaches_the_image() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    assert synthesise(nn.Sequential(Cut(), trained_net()), EXAMPLE) is None

    class ForInference(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError("for inference only")
            return x

    assert synthesise(nn.Sequential(ForInference(), trained_net()), EXAMPLE) is None


def test_a_network_that_torch_cannot_differentiate_gives_none() -> None:
    class Overwrites(nn.Module):
        """The second ReLU changes what the derivative of the first needs."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = trained_net()

        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[:2](x)
            return self.layers[3:](nn.functional.relu(nn.functional.relu(first).sigmoid_().mul_(first), inplace=True))

    with torch.no_grad():
        Overwrites().eval()(*EXAMPLE)
    assert synthesise(Overwrites().eval(), EXAMPLE, count=16, steps=2) is None


def test_the_reason_why_there_is_nothing_is_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    calibration = calibrate(net.eval(), EXAMPLE, None, seed=0, memory=1 << 30, progress=silent)
    assert calibration.kind == "weights only"
    assert "no BatchNorm statistics" in calibration.notes[0]
