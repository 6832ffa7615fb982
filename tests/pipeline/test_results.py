"""Result folders: what is checked before a run, and what comes back from one."""

import os
from pathlib import Path

import pytest
import torch
from commands import images, listing, small_network
from safetensors.torch import load_file
from torch import Tensor, nn

from convrewrite import load, optimize
from convrewrite.errors import ModelLoadError, PlanError, UsageError
from convrewrite.results import folder as results
from convrewrite.results.folder import FILES, Result, check_writable


class Transposing(nn.Module):
    """A decoder: a grouped, a transposed and a dilated convolution, one of them with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dilated(torch.relu(self.up(torch.relu(self.norm(self.grouped(torch.relu(self.stem(x))))))))


def rewritten(model: nn.Module, rule: str = "separable") -> Result:
    return optimize(model, images(1), [rule], "weights", measure=False)


@pytest.fixture(scope="module")
def result() -> Result:
    return rewritten(small_network())


@pytest.fixture
def folder(result: Result, tmp_path: Path) -> Path:
    return result.save(tmp_path / "results" / "deep" / "out")


def test_saving_makes_the_folders_above_and_leaves_nothing_else(folder: Path, tmp_path: Path) -> None:
    assert listing(folder) == set(FILES) - {"model.onnx"}  # nothing was exported
    assert listing(tmp_path) - {f"results/deep/out/{name}" for name in FILES} == {
        "results", "results/deep", "results/deep/out",
    }  # fmt: skip


def test_loading_gives_the_same_outputs_for_any_instance(result: Result, folder: Path) -> None:
    original = small_network(seed=9)
    before = {key: value.clone() for key, value in original.state_dict().items()}
    model = load(folder, original)
    sample = images(4)
    assert torch.equal(model(sample), result.model(sample))
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())


@pytest.mark.parametrize("rule", ["separable", "asymmetric", "grouped"])
def test_every_kind_of_site_comes_back(rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = rewritten(Transposing().eval(), rule)
    assert any(row.action == "rewritten" for row in made.report.sites)
    model = load(made.save(tmp_path / "out"), Transposing().eval())
    assert torch.equal(model(images(2)), made.model(images(2)))


class Functional(nn.Module):
    """Convolutions as functions: on a parameter, twice, and on a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.register_buffer("blur", torch.rand(16, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            x = torch.relu(nn.functional.conv2d(x, self.kernel, padding=1))
        return nn.functional.conv2d(x, self.blur, groups=x.shape[1])


def test_functional_convolutions_are_rewritten_and_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = rewritten(Functional().eval())
    rows = {row.name: (row.action, row.calls) for row in made.report.sites}
    assert rows == {"stem": ("kept", 1), "kernel": ("rewritten", 2), "blur": ("kept", 1)}
    assert "functional convolutions became modules: kernel" in made.report.notes
    assert set(made.model.state_dict()) - {"stem.weight", "stem.bias", "blur"} == {
        "kernel.0.0.weight", "kernel.0.1.weight", "kernel.1.0.weight", "kernel.1.1.weight",
    }  # fmt: skip
    other = Functional().eval()
    model = load(made.save(tmp_path / "out"), other)
    assert torch.equal(model(images(2)), made.model(images(2)))
    assert set(other.state_dict()) == {"stem.weight", "stem.bias", "kernel", "blur"}


def test_a_plan_that_lifts_what_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    class Silent(Functional):
        """The same tensors, used in another way."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.stem(x))

    folder = rewritten(Functional().eval()).save(tmp_path / "out")
    with pytest.raises(PlanError, match="expected a forward that calls kernel as a convolution, found none"):
        load(folder, Silent())


def test_the_pickled_model_is_a_whole_module(result: Result, folder: Path) -> None:
    model = torch.load(folder / "model.pt", weights_only=False)
    assert torch.equal(model(images(2)), result.model(images(2)))


def test_the_weights_hold_the_whole_state_once(result: Result, folder: Path) -> None:
    stored = load_file(folder / "weights.safetensors")
    assert set(stored) == set(result.model.state_dict())


def test_saving_twice_replaces_and_is_byte_equal(result: Result, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
    result.save(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
    assert after == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="the plan was made for another model"):
        load(folder, Transposing())


def test_missing_and_broken_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"plan\.json: missing; expected a folder written by"):
        load(tmp_path, small_network())
    (folder / "plan.json").write_text('{"schema_version": 1}')
    with pytest.raises(PlanError, match=r"plan\.json: tool_version"):
        load(folder, small_network())
    (folder / "plan.json").write_text("nothing")
    with pytest.raises(PlanError, match=r"plan\.json: the file"):
        load(folder, small_network())


def test_a_plan_with_an_unknown_structure_or_site(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"structure": "separable"', '"structure": "butterfly"'))
    with pytest.raises(PlanError, match=r"'butterfly' is not known; known are .* install or pass it"):
        load(folder, small_network())
    (folder / "plan.json").write_text(text.replace('"name": "3"', '"name": "2"'))
    with pytest.raises(PlanError, match=r"2: expected a convolution .* found ReLU"):
        load(folder, small_network())
    (folder / "plan.json").write_text(text.replace('"name": "3"', '"name": "33"'))
    with pytest.raises(PlanError, match=r"33: expected a convolution .* found nothing"):
        load(folder, small_network())


def test_a_folder_with_other_things_in_it_is_never_replaced(result: Result, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which would be lost"):
        result.save(tmp_path)
    assert listing(tmp_path) == {"notes.txt"}


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert listing(tmp_path) == set()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="found a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be written"):
        check_writable(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="cannot be written"):
            check_writable(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_a_class_that_cannot_be_pickled_leaves_its_state(tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = small_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    made = rewritten(Local().eval())
    with pytest.warns(UserWarning, match="cannot be pickled"):
        made.save(tmp_path / "out")
    state = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert set(state) == set(made.model.state_dict())
    model = load(tmp_path / "out", Local().eval())
    assert torch.equal(model(images(2)), made.model(images(2)))


def test_tied_weights_are_stored_and_come_back(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = small_network()
        model.append(nn.Linear(10, 10))
        model.append(nn.Linear(10, 10))
        model[13].weight = model[12].weight
        return model

    made = rewritten(tied())
    model = load(made.save(tmp_path / "out"), tied())
    assert torch.equal(model(images(2)), made.model(images(2)))
    assert model.get_parameter("13.weight") is model.get_parameter("12.weight")


def test_an_error_while_writing_leaves_the_earlier_result(
    result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(_report: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "render_markdown", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        result.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
