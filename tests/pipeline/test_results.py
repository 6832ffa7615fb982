"""Result folders: what is checked before a run, and what comes back from one."""

import copy
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import images, listing, small_network
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from convrewrite import Sweep, load, optimize
from convrewrite.errors import ModelLoadError, PlanError, UsageError
from convrewrite.exports import Written
from convrewrite.folders import Scratch, temporary
from convrewrite.reporting.report import ExportRow
from convrewrite.results import folder as results
from convrewrite.results.digests import require_described
from convrewrite.results.folder import FILES, Result, add_exports, check_writable, save_plan
from convrewrite.results.further import add_int8
from convrewrite.results.reading import read_plan, read_report
from convrewrite.results.weights import read_weights, write_weights


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


def test_a_folder_for_its_plan_and_a_file_for_its_folder_are_told_by_the_right_name(folder: Path) -> None:
    with pytest.raises(PlanError, match=rf"name the plan in it, {re.escape(str(folder / 'plan.json'))}$"):
        read_plan(folder)
    with pytest.raises(PlanError, match=r"found a report; name the plan beside it, .*plan\.json$"):
        read_plan(folder / "report.json")
    with pytest.raises(
        ModelLoadError, match=r"plan\.json: expected the folder of a result, found a file; name the folder"
    ):
        read_report(folder / "plan.json")


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


def test_every_file_of_a_result_is_as_open_to_others_as_the_umask_says(result: Result, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = result.save(tmp_path / "closed")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o077 for path in folder.iterdir()} == dict.fromkeys(os.listdir(folder), 0)


def test_saving_twice_replaces_and_is_byte_equal(result: Result, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
    result.save(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
    assert after == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_another_architecture_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="the plan was made for another model"):
        load(folder, Transposing())


def test_an_instance_without_memory_is_refused(folder: Path) -> None:
    with torch.device("meta"):
        instance = small_network()
    with pytest.raises(ModelLoadError, match=r"with memory for its weights, found 0\.weight on the meta"):
        load(folder, instance)
    instance = small_network().append(nn.LazyLinear(2))
    with pytest.raises(ModelLoadError, match=r"found \d+ \(LazyLinear\), .*; run the model once before"):
        load(folder, instance)


def test_missing_and_broken_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"plan\.json: missing; expected a folder written by"):
        load(tmp_path, small_network())
    (folder / "report.json").unlink()  # which says what the plan was
    (folder / "plan.json").write_text('{"schema_version": 1}')
    with pytest.raises(PlanError, match=r"plan\.json: tool_version"):
        load(folder, small_network())
    (folder / "plan.json").write_text("nothing")
    with pytest.raises(PlanError, match=r"plan\.json: the file"):
        load(folder, small_network())


def test_a_plan_with_an_unknown_structure_or_site(folder: Path) -> None:
    (folder / "report.json").unlink()  # which says what the plan was
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
    (tmp_path / "notes.txt").rename(tmp_path / "plan.json")  # another tool's plan makes no result of a model beside it
    (tmp_path / "model.pt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds model\.pt, plan\.json, which would be lost"):
        result.save(tmp_path)
    (tmp_path / "model.pt").unlink()
    with pytest.raises(UsageError, match=r"holds plan\.json, which would be lost"):
        result.save(tmp_path)


def test_a_model_is_never_replaced_by_the_result_that_is_made_of_it(result: Result, tmp_path: Path) -> None:
    """Nor is a model beside its plan an earlier result, which a report tells of."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "model.pt").write_text("mine")
    save_plan(result.plan, place / "plan.json")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"work: holds model\.pt, plan\.json, which would be lost"):
            result.save(place)
        (place / "report.json").write_text('{"tests": 3}')  # of another tool
    assert (place / "model.pt").read_text() == "mine"
    (place / "model.pt").unlink()
    assert result.save(place) == place
    made_of = result.report.model_copy(update={"model": str(place / "model.pt")})
    with pytest.raises(UsageError, match=r"holds .*model\.pt, which this run reads and would replace"):
        replace(result, report=made_of).save(place)


def test_what_a_killed_run_left_within_a_folder_is_cleared_and_a_living_one_waited_for(
    result: Result, folder: Path
) -> None:
    left = folder / ".convrewrite-run-abcdefgh"  # as quantise puts its file there
    left.mkdir()
    (left / "lock").touch()
    check_writable(folder)
    assert not left.exists()
    with Scratch(folder), pytest.raises(UsageError, match="another run writes in it; wait until that has ended"):
        check_writable(folder)
    with Scratch(folder), pytest.raises(UsageError, match="another run writes in it; wait until that has ended"):
        Sweep.check(folder)
    assert result.save(folder) == folder


def test_what_may_lie_in_a_result_is_found_out_once(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, asked, known = result.save(tmp_path / "out"), [], results.file_names()
    monkeypatch.setattr(results, "file_names", lambda: known if asked.append("once") is None else None)
    check_writable(place)
    assert asked == ["once"], "for it the metadata of all packages is read"


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


def holding(seed: int, **buffers: Tensor) -> nn.Module:
    """Two layers with one weight, and buffers of many sorts, all of which follow from the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    weight, spread = model[0].weight.data, torch.randn(1, 4).expand(3, 4)
    complexes = torch.randn(2, 3, dtype=torch.complex128)
    for name, buffer in {
        "expanded": spread, "expanded_too": spread[:], "slice": torch.randn(9, 4)[:3], "row": weight[:1], "turned": weight.t(),
        "square": torch.randn(4, 4).t(), "conjugated": torch.randn(3, dtype=torch.complex64).conj(), "complex": complexes,
        "negated": complexes.conj().imag, "scalar": complexes[0, 0].clone(), "empty": torch.empty(0, 3),
        "float8": torch.randn(4).to(torch.float8_e4m3fn), "scale8": torch.rand(4).to(torch.float8_e8m0fnu),
        "whole": torch.tensor([seed, 1], dtype=torch.uint16), **buffers,
    }.items():  # fmt: skip
        model.register_buffer(name, buffer)
    return model


def numbers(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()


def test_every_sort_of_tensor_comes_back_bit_by_bit(tmp_path: Path) -> None:
    first, second = holding(1), holding(2)
    write_weights(first, tmp_path / "a")
    read_weights(second, tmp_path / "a")
    state = second.state_dict()
    assert {name: numbers(value) for name, value in first.state_dict().items()} == {
        n: numbers(v) for n, v in state.items()
    }
    assert second.get_parameter("1.weight") is second.get_parameter("0.weight")
    assert {"0.weight", "1.weight"} - load_file(tmp_path / "a").keys() == {"1.weight"}
    write_weights(holding(1), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class Exacting(nn.Linear):
    """Takes no weights of an unknown version of itself, as MNASNet of torchvision does."""

    def _load_from_state_dict(self, state: Any, prefix: str, noted: dict[str, Any], *rest: Any) -> None:
        if noted.get("version") != 1:
            raise ValueError("version should be set to 1")
        super()._load_from_state_dict(state, prefix, noted, *rest)


def test_weights_are_read_as_those_of_the_present_versions_of_their_classes(tmp_path: Path) -> None:
    first, second = nn.Sequential(Exacting(2, 2)), nn.Sequential(Exacting(2, 2))
    write_weights(first, tmp_path / "a")
    read_weights(second, tmp_path / "a")
    assert torch.equal(second[0].weight, first[0].weight)


def test_weights_that_safetensors_itself_wrote_are_read(tmp_path: Path) -> None:
    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
        model[1].weight = model[0].weight
        model.register_buffer("row", model[0].weight.data.view(-1))
        return model

    first, second = tied(1), tied(2)
    save_model(first, str(tmp_path / "a"))
    assert len(load_file(tmp_path / "a")) == 3
    read_weights(second, tmp_path / "a")
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "a")
    with pytest.raises(RuntimeError, match="it has no bias"):
        read_weights(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(RuntimeError, match="it has weight besides"):
        read_weights(nn.ReLU(), tmp_path / "a")
    with pytest.raises(RuntimeError, match="size mismatch"):
        read_weights(nn.Linear(3, 2, bias=False), tmp_path / "a")
    with pytest.raises(RuntimeError, match=r"expected weight in torch\.float64, found torch\.float32"):
        read_weights(nn.Linear(2, 2, bias=False).double(), tmp_path / "a")


class Versioned(nn.Module):
    """State beside the tensors."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.layers, self.said = small_network(), said

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def get_extra_state(self) -> Any:
        return self.said

    def set_extra_state(self, state: Any) -> None:
        self.said = state


@pytest.mark.parametrize("said", [{"version": 3, "names": ["a"]}, None, torch.ones(2)])
def test_state_that_is_no_tensor_comes_back(said: Any, tmp_path: Path) -> None:
    made = rewritten(Versioned(said).eval())
    model = load(
        made.save(tmp_path / "out"), Versioned({"version": 1} if not isinstance(said, Tensor) else 0 * said).eval()
    )
    assert numbers(model.said) == numbers(said)
    assert torch.equal(model(images(2)), made.model(images(2)))


def test_what_no_weights_can_hold_is_in_the_pickle_and_said(tmp_path: Path) -> None:
    made = rewritten(Versioned((1, 2)).eval())
    made.model.register_buffer("sparse", torch.eye(3).to_sparse())
    made.model.register_buffer("nowhere", torch.empty(3, device="meta"))
    with pytest.warns(
        UserWarning,
        match=r"^sparse, nowhere, _extra_state: only in model\.pt, .* leaves it as the original model has it$",
    ):
        folder = made.save(tmp_path / "out")
    assert torch.load(folder / "model.pt", weights_only=False).said == (1, 2)
    original = Versioned((3, 4)).eval()
    with pytest.warns(UserWarning, match=r"^_extra_state: only in model\.pt"):
        assert load(folder, original).said == (3, 4)


@pytest.fixture
def exported(result: Result) -> Result:
    """A result with files of its own: a graph, its weights beside it, and a form that is a folder."""
    folder = temporary()
    (folder.path / "forms" / "model.mlpackage").mkdir(parents=True)
    further = [folder.path / "forms" / "model.mlpackage", folder.path / "model.half.onnx"]
    for file in (folder.path / "model.onnx", folder.path / "model.onnx.data", further[0] / "inner", further[1]):
        file.write_text(file.name)
    return replace(result, _onnx=folder.path / "model.onnx", _folder=folder, _further=further)


def test_a_copy_and_a_pickle_are_whole_results(exported: Result, tmp_path: Path) -> None:
    expected, outputs, report = listing(exported.save(tmp_path / "first")), exported.model(images(2)), exported.report
    assert expected >= {"model.onnx", "model.onnx.data", "model.mlpackage/inner", "model.half.onnx"}
    others = {
        "copied": copy.copy(exported),
        "deep": copy.deepcopy(exported),
        "pickled": pickle.loads(pickle.dumps(exported)),
    }
    assert others["copied"].model is exported.model and others["deep"].model is not exported.model
    for name, other in others.items():
        assert torch.equal(other.model(images(2)), outputs) and other.report == report
        folder = other.save(tmp_path / name)
        assert listing(folder) == expected
        for file in (path for path in folder.rglob("*") if path.is_file() and path.name != "model.pt"):
            assert file.read_bytes() == (tmp_path / "first" / file.relative_to(folder)).read_bytes(), file


def test_weights_beside_a_graph_are_replaced_with_it_and_held_to_the_report(result: Result, tmp_path: Path) -> None:
    files, beside = temporary(), "model.onnx.0123abcd.data"
    for name in ("model.onnx", beside):
        (files.path / name).write_text(name)
    made = replace(result, _onnx=files.path / "model.onnx", _folder=files)
    folder = made.save(made.save(tmp_path / "out"))
    require_described(folder, read_report(folder), ("model.onnx",))
    (folder / beside).write_text("others")
    with pytest.raises(ModelLoadError, match=f"{beside}: the folder is not what its report describes"):
        require_described(folder, read_report(folder), ("model.onnx",))


def test_a_result_whose_files_are_gone_is_neither_pickled_nor_saved(exported: Result, tmp_path: Path) -> None:
    exported._folder.close()
    for use in (pickle.dumps, lambda gone: gone.save(tmp_path / "out")):
        with pytest.raises(UsageError, match="was removed from the temporary files since the run"):
            use(exported)


def test_a_result_that_lacks_a_form_is_no_success(result: Result) -> None:
    lacking = ExportRow(name="half", package="onnx 1", refused="it overflows")
    assert result.refused is None
    assert replace(result, report=result.report.model_copy(update={"exports": (lacking,)})).refused == (
        "export half: it overflows"
    )


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


def test_what_cannot_be_added_leaves_a_result_as_it_was_and_what_can_leaves_all_else(
    result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "link").symlink_to("plan.json")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_given: object) -> str:
        raise OSError(28, "No space left on device")

    report, form = read_report(folder), Written("half", "onnxruntime 1", refused="it overflows")
    with monkeypatch.context() as patch:
        patch.setattr(results, "render_html", fail)
        with pytest.raises(UsageError, match="No space left on device"):
            add_exports(folder, result.plan, report, [form])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    add_exports(folder, result.plan, report, [form])
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"report.json", "report.md", "report.html"} and (folder / "link").is_symlink()


def test_forms_are_added_to_the_result_that_they_were_made_of_alone(result: Result, folder: Path) -> None:
    """Exporting takes minutes, in which another run may add forms, or replace the result."""
    report = read_report(folder)
    forms = [Written(name, "any 1", refused="it overflows") for name in ("half", "coreml")]
    for form in forms:
        add_exports(folder, result.plan, report, [form])
    assert [row.name for row in read_report(folder).exports] == ["half", "coreml"]
    another = report.model_copy(update={"digests": report.digests | {"plan.json": "of another"}})
    (folder / "report.json").write_text(another.model_dump_json())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ModelLoadError, match=r"expected the result that this run began with, found another"):
        add_exports(folder, result.plan, report, forms)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_forms_are_not_added_beside_a_run_that_replaces_the_folder(
    result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is exchanged after it was copied: what was copied is no longer what is there."""

    def replacing(*_given: object) -> str:
        monkeypatch.undo()
        result.save(folder)
        return ""

    monkeypatch.setattr(results, "render_html", replacing)
    with pytest.raises(ModelLoadError, match="another run has changed it"):
        add_exports(folder, result.plan, read_report(folder), [])
    assert (folder / "report.html").read_bytes()


def test_forms_are_not_added_beside_a_run_that_adds_a_file(
    result: Result, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As quantise does, whose file would be gone with the folder that was copied before."""

    def adding(*_given: object) -> str:
        add_int8(folder, result.report, folder / "plan.json")
        return ""

    monkeypatch.setattr(results, "render_html", adding)
    with pytest.raises(ModelLoadError, match="another run has changed it"):
        add_exports(folder, result.plan, read_report(folder), [])
    assert (folder / "model.int8.onnx").is_file()
