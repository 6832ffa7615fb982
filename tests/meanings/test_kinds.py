"""What outputs are taken for: every kind by its evidence, the user's word before it, and nothing by its shape alone."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import Calls, Refilling
from torch import Tensor, nn
from torch.nn import functional as F

from convrewrite.errors import ModelError, UsageError
from convrewrite.meanings.kinds import Meaning, OutputKind, asked_meanings, read, require_outputs, tell
from convrewrite.modules.outputs import named_outputs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 32, channels: int = 3, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=generator())


class Net(nn.Module):
    """Features, a linear layer under a name of one's own, and what comes behind it."""

    def __init__(
        self, classes: int, behind: Callable[[Tensor], object] = lambda x: x, name: str = "last", scale: float = 1.0
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 24, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.BatchNorm1d(24)
        self.add_module(name, nn.Linear(24, classes))
        self.name, self.behind = name, behind
        with torch.no_grad():
            self.get_submodule(name).weight.mul_(scale)  # type: ignore[operator]
        self.train()(images())
        self.eval()

    def forward(self, x: Tensor) -> object:
        features = self.norm(self.pool(self.conv(x)).flatten(1))
        return self.behind(self.get_submodule(self.name)(features))


def meaning(model: nn.Module, count: int = 32, *, representative: bool = True) -> Meaning:
    (found,) = tell(model.eval(), [(images(count),)], representative=representative).values()
    return found


def told(
    classes: int, behind: Callable[[Tensor], object] = lambda x: x, name: str = "last", scale: float = 1.0
) -> OutputKind:
    return meaning(Net(classes, behind, name, scale)).kind


def by_hand(x: Tensor) -> Tensor:
    powers = (x - x.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_what_a_linear_layer_gives_are_logits(classes: int) -> None:
    assert told(classes) == "logits"


@pytest.mark.parametrize(
    "behind",
    [
        lambda x: x.softmax(1),
        lambda x: F.dropout(x.softmax(1), training=False),
        lambda x: x.softmax(1)[:, :, None].squeeze(2).clone(),
        lambda x: x.log_softmax(1).exp(),
        by_hand,
    ],
    ids=["softmax", "dropout", "views", "exp", "by hand"],
)
@pytest.mark.parametrize("classes", [2, 10])
def test_rows_that_sum_to_one_are_probabilities(behind: Callable[[Tensor], object], classes: int) -> None:
    assert told(classes, behind) == "probabilities"


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "multilabel"), (torch.float16, "probabilities"), (torch.bfloat16, "probabilities")],
)
def test_rows_sum_to_one_as_exactly_as_their_numbers_allow(dtype: torch.dtype, kind: OutputKind) -> None:
    rows = 1.01 * torch.randn(32, 10, generator=generator()).softmax(1)
    assert read({"y": rows.to(dtype)}, {}, origins={}, representative=True)["y"].kind == kind


@pytest.mark.parametrize("name", ["last", "fc", "classifier", "bbox"])
def test_what_always_holds_of_values_goes_before_names(name: str) -> None:
    assert told(10, lambda x: x.softmax(1), name) == "probabilities"
    assert told(10, lambda x: F.normalize(x), name) == "embedding"
    assert told(10, lambda x: x / x.norm(dim=1, keepdim=True), name) == "embedding"
    assert told(10, lambda x: x.log_softmax(1), name) == "logits"


@pytest.mark.parametrize(("classes", "scale"), [(360, 1.0), (360, 20.0), (20, 1.0), (2, 1.0), (1, 1.0)])
@pytest.mark.parametrize("behind", [torch.sigmoid, nn.Sigmoid(), torch.special.expit, lambda x: x.sigmoid()[:, :]])
def test_independent_probabilities(behind: Callable[[Tensor], Tensor], classes: int, scale: float) -> None:
    assert told(classes, behind, scale=scale) == "multilabel"


@pytest.mark.parametrize("behind", [lambda x: 1 / (1 + (-x).exp()), lambda x: (x.tanh() + 1) / 2])
def test_a_sigmoid_that_is_written_out_is_one(behind: Callable[[Tensor], Tensor]) -> None:
    assert told(20, behind) == "multilabel"
    assert told(20, lambda x: x / 2) == "logits", "a temperature"
    assert told(4, behind) == "values", "coordinates"


def test_logarithms_of_independent_probabilities_are_no_class_scores() -> None:
    assert told(20, F.logsigmoid) == "values"


def corners(x: Tensor) -> Tensor:
    """Left, top, right, bottom of boxes of all sizes."""
    centre, half = x[:, :2], 0.05 + x[:, 2:].exp()
    return torch.cat([centre - half, centre + half], 1)


@pytest.mark.parametrize("name", ["last", "fc"])
def test_four_coordinates_are_values(name: str) -> None:
    assert told(4, torch.sigmoid, name) == "values"
    assert told(4, corners, name, scale=20.0) == "values"
    assert told(4, torch.sigmoid, "bbox_head") == "values"
    assert told(4, lambda x: x, "box_regressor") == "values"


class Boxes(nn.Module):
    """A linear layer that finds the corners of a bright rectangle, given its sums over rows and columns."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.last, self.scale = nn.Linear(4, 4), scale
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(4) * scale)
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        left, top = x[:, 0].mean((1, 2)), x[:, 1].mean((1, 2))
        size = x[:, 2, :2, 0] + 0.1
        corner = torch.stack([left, top], 1) + 0.5 * (x[:, 2, :2, 1] - 0.5)
        found: Tensor = self.last(torch.cat([corner, corner + size], 1))
        return found


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_corners_that_a_linear_layer_gives_are_values(scale: float) -> None:
    assert meaning(Boxes(scale)).kind == "values"


def test_coordinates_without_a_name_are_none_below_zero() -> None:
    """Ten landmarks in pixels."""
    model = Net(10)
    with torch.no_grad():
        model.last.bias.copy_(torch.linspace(20, 90, 10))  # type: ignore[operator, union-attr]
    found = meaning(model)
    assert (found.kind, "negative" in found.reason) == ("values", True)


def test_raw_embeddings_are_no_class_scores() -> None:
    class Face(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(512)
            self.features = nn.BatchNorm1d(512)

        def forward(self, x: Tensor) -> object:
            return self.features(self.net(x))

    class Nameless(Face):
        def __init__(self) -> None:
            super().__init__()
            self.end = self.features
            del self.features

        def forward(self, x: Tensor) -> object:
            return self.end(self.net(x))

    assert not meaning(Face()).scores
    assert meaning(Nameless()).kind == "embedding"
    assert told(512, name="embedding") == "embedding"
    assert told(512, scale=0.1) == "values", "hundreds of channels, none of which stands out"
    assert told(512, name="classifier", scale=0.1) == "logits"


@pytest.mark.parametrize("name", ["fc", "head", "classifier", "cls_head", "logits"])
def test_a_classifier_keeps_its_logits(name: str) -> None:
    assert told(10, name=name) == "logits"
    assert told(1000, name=name, scale=0.01) == "logits"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bbox_pred", "values"), ("reg_head", "values"), ("landmarks", "values"), ("depth", "values"),
        ("keypointHead", "values"), ("class_embed", "logits"), ("bbox_embed", "values"), ("exit_flow", "logits"),
    ],
)  # fmt: skip
def test_names_of_modules(name: str, kind: OutputKind) -> None:
    assert told(6, name=name) == kind


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("logits", "logits"), ("loc", "values"), ("embedding", "embedding"), ("x", "logits"),
        ("mu", "values"), ("logvar", "values"), ("log_var", "values"), ("sigma", "values"),
    ],
)  # fmt: skip
def test_names_of_outputs(key: str, kind: OutputKind) -> None:
    assert told(6, lambda x: {key: x}) == kind


def mapping(channels: int, behind: Callable[[Tensor], object], scale: float = 1.0, name: str = "end") -> nn.Module:
    """A fully convolutional network whose output is as large as its input."""
    torch.manual_seed(1)
    net = nn.Sequential()
    net.add_module(name, nn.Conv2d(3, channels, 1))
    with torch.no_grad():
        if channels > 1:
            net[0].weight.sub_(net[0].weight.mean(0)).mul_(scale)  # scores that are trained rise at each other's cost
        net[0].bias.zero_()

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> object:
            return behind(self.net(x - 0.5))

    return Behind()


def test_maps_of_class_scores_are_confident() -> None:
    for channels in (2, 3, 5, 21):
        assert meaning(mapping(channels, lambda x: x, scale=60.0)).kind == "logits"
    assert meaning(mapping(5, lambda x: F.interpolate(x, scale_factor=2.0), scale=60.0)).kind == "logits"
    assert meaning(mapping(5, lambda x: x)).kind == "values", "no class stands out"
    assert meaning(mapping(5, lambda x: x, name="classifier")).kind == "logits"
    found = meaning(mapping(5, lambda x: x.softmax(1)))
    assert (found.kind, found.axis) == ("probabilities", 1)


def test_boxes_beside_scores_are_values() -> None:
    """In maps of a detector, and in lists of what it found: as scores of classes they would have one on top everywhere."""

    def maps(x: Tensor) -> Tensor:
        boxes, scores = x.flatten(2).split((4, 3), 1)
        return torch.cat((20 + 60 * boxes, scores.sigmoid()), 1)

    def lists(x: Tensor) -> Tensor:
        return maps(x).transpose(1, 2)

    for behind in (maps, lists):
        found = meaning(mapping(7, behind))
        assert (found.kind, "beside large ones" in found.reason) == ("values", True)


def test_images_depth_and_heat_are_values() -> None:
    picture = lambda x: images(len(x)) * 255 + 0.0 * x  # noqa: E731
    assert meaning(mapping(3, picture)).kind == "values"
    assert meaning(mapping(1, lambda x: x * 100)).kind == "values"
    assert meaning(mapping(3, torch.sigmoid)).kind == "values", "an image like the input"
    assert meaning(mapping(17, lambda x: {"heatmaps": x.sigmoid()})).kind == "values"
    assert meaning(mapping(1, lambda x: {"depth": x.relu()})).kind == "values"
    assert meaning(mapping(1, lambda x: x.sigmoid()[:, :, ::2, ::2])).kind == "multilabel", "a mask"
    assert meaning(mapping(5, lambda x: x.flatten(2).softmax(2).reshape(x.shape))).kind == "values"


def test_sequences_have_their_classes_where_they_sum_to_one() -> None:
    rows = lambda x: x.flatten(2)  # noqa: E731
    found = meaning(mapping(5, lambda x: rows(x).transpose(1, 2).softmax(-1)))
    assert (found.kind, found.axis) == ("probabilities", -1)
    found = meaning(mapping(5, lambda x: rows(x).softmax(1)))
    assert (found.kind, found.axis) == ("probabilities", 1)
    found = meaning(mapping(5, lambda x: rows(x).transpose(1, 2) @ (30 * torch.eye(5)), scale=10.0))
    assert (found.kind, found.axis) == ("logits", -1)


def test_integers_are_discrete_and_single_numbers_values() -> None:
    assert told(5, lambda x: x.argmax(1)) == "discrete"
    assert told(5, lambda x: x > 0) == "discrete"
    assert told(1) == "values"
    assert told(5, lambda x: x.mean(1)) == "values"
    assert told(5, torch.tanh) == "values"
    assert told(5, torch.relu) == "values"


def test_looks_are_not_believed_of_noise_and_of_few_inputs() -> None:
    assert meaning(Net(512, scale=0.1), representative=False).kind == "logits"
    assert meaning(Net(512, scale=0.1), count=4).kind == "logits"


def test_values_alone_tell_where_nobody_knows_the_function() -> None:
    x = torch.randn(20, 30, generator=generator())
    kinds = {
        name: read({"output": sample}, {}, origins={}, representative=True)["output"].kind
        for name, sample in {"raw": x, "softmax": x.softmax(1), "sigmoid": x.sigmoid(), "unit": F.normalize(x)}.items()
    }
    assert kinds == {"raw": "logits", "softmax": "probabilities", "sigmoid": "multilabel", "unit": "embedding"}


def test_each_of_several_outputs_has_its_own() -> None:
    model = Net(6, lambda x: {"scores": x[:, :4].softmax(1), "box": x[:, 2:], "ids": x.argmax(1), "points": x[:, :1]})
    found = tell(model, [(images(),)])
    assert {name: meaning.kind for name, meaning in found.items()} == {
        "output.scores": "probabilities", "output.box": "values", "output.ids": "discrete", "output.points": "values",
    }  # fmt: skip


# --- the user's word


def test_the_users_word_goes_first_and_has_a_weight() -> None:
    for kind in ("logits", "embedding", "values"):
        found = tell(Net(6), [(images(),)], asked_meanings({"output": (kind, 2)}))["output"]
        assert (found.kind, found.weight, found.reason) == (kind, 2.0, "as asked")
    model = Net(6, lambda x: {"a": x, "b": x})
    found = tell(model, [(images(),)], asked_meanings({"a": "ignore", "output.b": "values"}))
    assert {name: m.kind for name, m in found.items()} == {"output.a": "ignore", "output.b": "values"}
    known = {"output.a": Meaning("embedding", "an earlier run", 3.0), "output.b": Meaning("values", "an earlier run")}
    found = tell(model, [(images(),)], asked_meanings({"a": "logits"}), known=known)
    assert (found["output.a"].kind, found["output.b"].reason) == ("logits", "an earlier run")


@pytest.mark.parametrize(
    ("wanted", "behind", "message"),
    [
        ({"output": "logit"}, None, "output output: expected one of logits, .* found 'logit'"),
        ({"output": ("logits", 0)}, None, "expected a positive number as its weight, found 0"),
        ({"output": ("logits", float("nan"))}, None, "expected a positive number"),
        ({"output": ("logits", float("inf"))}, None, "expected a positive number"),
        ({"output": ("logits", 10**400)}, None, "expected a positive number as its weight, found one of 1329 bits"),
        ({"output": ("logits", "2")}, None, "expected a positive number as its weight, found '2'"),
        ({"outpt": "logits"}, None, "output 'outpt': the model has no output of this name; it has output$"),
        ({"a": "logits", "output.a": "values"}, lambda x: {"a": x}, "was named twice"),
        ({"output": "logits"}, lambda x: x.argmax(1), "holds integers or booleans"),
        ({"output": "logits"}, lambda x: x[:, :1], r"shape \(32, 1\) has no axis"),
        ({"output": "embedding"}, lambda x: x[:, 0], r"shape \(32,\) has no axis"),
        ({"output": "probabilities"}, lambda x: x * 50, r"expected probabilities in \[0, 1\], found -"),
        ({"output": "multilabel"}, lambda x: x * 50, r"expected multilabel in \[0, 1\], found -"),
        ({"output": "ignore"}, None, "every output is ignored"),
    ],
)
def test_what_cannot_be_is_refused(
    wanted: dict[str, str], behind: Callable[[Tensor], object] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        tell(Net(5, behind or (lambda x: x)), [(images(),)], asked_meanings(wanted))


# --- nothing is left behind


def test_a_model_is_as_it_was_and_may_refuse_to_be_followed() -> None:
    model = Net(5)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    meaning(model)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before

    def refuse(x: Tensor) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not while anyone looks")
        return x.softmax(1)

    assert told(5, refuse) == "probabilities"


def test_threads_that_share_a_model_do_not_disturb_each_other() -> None:
    model = Net(6, name="bbox")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: meaning(model), range(16)))
    assert {(m.kind, m.reason) for m in found} == {("values", "its module is called 'bbox'")}


def test_every_reason_is_a_sentence() -> None:
    for behind in (torch.sigmoid, torch.tanh, lambda x: x.softmax(1), lambda x: x, lambda x: F.normalize(x)):
        assert re.fullmatch(r"[a-z(].{10,}[^.]", meaning(Net(6, behind)).reason)
    assert named_outputs(torch.zeros(1)).keys() == {"output"}


class Sampling(nn.Module):
    """Beside the numbers, some that are random."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"numbers": x * 2, "noise": F.dropout(x, 0.5, training=True)}


def test_outputs_that_change_from_run_to_run_are_refused_unless_they_are_ignored() -> None:
    given, ignored = (torch.ones(2, 50),), {"noise": Meaning("ignore", "it was said")}
    with pytest.raises(
        ModelError, match=r"'output\.noise': expected the same for the same input, found another each time"
    ):
        require_outputs(Sampling(), given, repeatable=True)
    with pytest.raises(ModelError, match="found another each time"):
        require_outputs(Refilling(Calls(lambda _self, x: x + torch.rand_like(x))), given, repeatable=True)
    require_outputs(Sampling(), given, ignored, repeatable=True)
    require_outputs(Sampling(), given)


def test_outputs_of_nan_alone_are_refused_with_what_holds_it() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    require_outputs(model, (torch.ones(1, 3),))
    with pytest.raises(
        ModelError, match=r"'output': expected numbers, found NaN alone; give an input that the model is made"
    ):
        require_outputs(model, (torch.full((1, 3), float("nan")),))
    with torch.no_grad():
        model[2].weight[0, 1] = float("nan")
    with pytest.raises(
        ModelError, match=r"found NaN among them; the model holds NaN or infinity in 2\.weight: give one"
    ):
        require_outputs(model, (torch.ones(1, 3),))
    require_outputs(model, (torch.ones(1, 3),), {"output": Meaning("ignore", "")})
    with torch.no_grad():
        model[2].weight[:, 1] = float("nan")
    with pytest.raises(ModelError, match=r"found NaN alone; the model holds NaN or infinity in 2\.weight: give one"):
        require_outputs(model, (torch.ones(1, 3),))


def test_what_a_sigmoid_that_is_not_trained_gives_has_no_sum_and_no_length() -> None:
    def halves(x: Tensor) -> Tensor:
        return (1e-5 * x).sigmoid()

    assert told(2, halves) == "multilabel"
    assert told(4, halves) == told(4, lambda x: {"pred_boxes": halves(x)}) == "values"


def test_masks_of_queries_are_no_classes() -> None:
    model = mapping(12, lambda x: {"masks_queries_logits": x, "class_queries_logits": x.flatten(2).transpose(1, 2)})
    found = tell(model, [(images(),)])
    assert {name: one.kind for name, one in found.items()} == {
        "output.masks_queries_logits": "values",
        "output.class_queries_logits": "logits",
    }
