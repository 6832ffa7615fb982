"""Files of whole modules, good, broken and hostile: nothing of a hostile file runs."""

import copy
import io
import os
import pickle
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_files import Call, forget_modules_below, install_fake, plain_net, write_archive
from torch import nn

from convrewrite.errors import ModelLoadError
from convrewrite.loading.files import load_model
from convrewrite.loading.user_code import import_object

pytestmark = pytest.mark.usefixtures("isolated")

# whole modules


def test_a_whole_module_loads_in_eval_mode_with_its_weights(tmp_path: Path) -> None:
    model = plain_net()
    torch.save(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.source == str(tmp_path / "m.pt")
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.notes == ("the model was in train mode and was put in eval mode",)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded.model(x), model.eval()(x))


def test_harmless_values_load_and_keep_their_meaning(tmp_path: Path) -> None:
    model: Any = plain_net()
    model.act = partial(nn.functional.leaky_relu, negative_slope=0.2)
    model.gelu = nn.functional.gelu
    model.init = nn.init.kaiming_normal_
    model.values = (frozenset({1}), slice(1, 2), range(3), np.float32(0.5), np.int64(3))
    model.array = np.arange(6, dtype=">f4").reshape(2, 3).copy(order="F")
    model.empty = (np.zeros((0, 3)), b"")
    torch.save(model, tmp_path / "m.pt")
    got: Any = load_model(tmp_path / "m.pt").model
    assert got.act.func is nn.functional.leaky_relu
    assert got.act.keywords == {"negative_slope": 0.2}
    assert got.gelu is nn.functional.gelu
    assert got.init is nn.init.kaiming_normal_
    assert got.values == model.values
    assert np.array_equal(got.array, model.array)
    assert got.empty[0].shape == (0, 3) and got.empty[1] == b""
    assert type(pickle.loads(pickle.dumps(got.array))) is np.ndarray


def test_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(plain_net()), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert type(loaded.model) is nn.Sequential
    assert "DataParallel" in loaded.notes[0]


def test_classes_of_the_users_file_need_the_factory(tmp_path: Path, net_file: Path) -> None:
    torch.save(import_object(f"{net_file}:make")(), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"asks for net_of_user\.Net; pass --factory .*--trust"):
        load_model(tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", factory=f"{net_file}:make")
    assert type(loaded.model).__name__ == "Net"
    assert "factory was not called" in loaded.notes[0]
    assert loaded.notes[1:] == ()
    torch.save(import_object(f"{net_file}:Net")().train(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", factory=f"{net_file}:make")
    assert loaded.notes[1:] == ("the model was in train mode and was put in eval mode",)


@pytest.mark.parametrize("home", ["net_of_user", "__main__"])
def test_a_trusted_file_whose_code_is_elsewhere_is_not_called_damaged(
    tmp_path: Path, net_file: Path, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = import_object(f"{net_file}:Net")
    with monkeypatch.context() as patch:
        patch.setattr(net, "__module__", home)
        patch.setattr(sys.modules[home], "Net", net, raising=False)
        torch.save(import_object(f"{net_file}:make")(), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "net_of_user")
    with pytest.raises(ModelLoadError, match=rf"whose code is at hand, .*{home}.*; pass --factory .* PYTHONPATH"):
        load_model(tmp_path / "m.pt", trust=True)


def test_a_class_saved_from_main_is_mapped_to_the_factorys(
    tmp_path: Path, net_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = import_object(f"{net_file}:Net")
    with monkeypatch.context() as patch:
        patch.setattr(net, "__module__", "__main__")
        patch.setattr(sys.modules["__main__"], "Net", net, raising=False)
        torch.save(net(), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"__main__\.Net"):
        load_model(tmp_path / "m.pt")
    assert type(load_model(tmp_path / "m.pt", factory=f"{net_file}:Net").model) is net


@pytest.mark.parametrize("key", ["model", "ema", "net"])
def test_a_module_in_a_checkpoint_is_found(tmp_path: Path, key: str) -> None:
    torch.save({key: plain_net(), "epoch": 3}, tmp_path / "m.ckpt")
    assert load_model(tmp_path / "m.ckpt").notes[0] == f"weights found under the key '{key}'"


# hostile files: each is refused with the name it asked for, and its payload did not run


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_that_calls_os_system_is_refused(tmp_path: Path, marker: Path, zipped: bool, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(Call(os.system, f"touch {marker}"), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelLoadError, match=r"asks for (posix|nt)\.system.*--trust"):
        load_model(path)
    assert not marker.exists()


def test_the_payload_of_these_tests_works(tmp_path: Path, marker: Path) -> None:
    torch.save(Call(os.system, f"touch {marker}"), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match="object of type int"):
        load_model(tmp_path / "m.pt", trust=True)
    assert marker.exists()


def test_a_bare_pickle_and_a_tar_archive_are_not_opened(tmp_path: Path, marker: Path) -> None:
    payload = pickle.dumps(Call(os.system, f"touch {marker}"))
    (tmp_path / "m.pt").write_bytes(payload)
    with tarfile.open(tmp_path / "t.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    for name in ("m.pt", "t.pt"):
        for trust in (False, True):
            with pytest.raises(ModelLoadError, match=r"expected a file written by torch\.save"):
                load_model(tmp_path / name, trust=trust)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(getattr, (nn.Conv2d, "forward")), (eval, ("open('executed', 'w')",)), (exec, ("open('executed', 'w')",))],
)
def test_builtins_that_reach_code_are_refused(tmp_path: Path, marker: Path, function: Any, arguments: Any) -> None:
    torch.save(Call(function, *arguments), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=rf"builtins\.{function.__name__}"):
        load_model(tmp_path / "m.pt")
    assert not marker.exists()


def test_a_graph_module_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(torch.fx.symbolic_trace(plain_net()), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match="reduce_graph_module"):
        load_model(tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt", trust=True).model, torch.fx.GraphModule)


@pytest.mark.parametrize("name", ["m.pt2", "renamed.pt"])
def test_a_hostile_program_is_refused_unopened(tmp_path: Path, marker: Path, name: str) -> None:
    payload = pickle.dumps(Call(os.system, f"touch {marker}"))
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/models/model.json", "{}")
        archive.writestr("m/data/weights/weight_0", payload)
        archive.writestr("m/data/sample_inputs/model.pt", payload)
    with pytest.raises(ModelLoadError, match=r"exported program \(\.pt2\).*--trust"):
        load_model(tmp_path / name)
    assert not marker.exists()


def test_numpy_types_that_forge_object_references_are_refused(tmp_path: Path) -> None:
    state = (3, "<", (np.dtype("O"), (1,)), None, None, -1, -1, 0)
    forged = Call(np.dtype, "f8", False, True)
    forged.call += (state,)
    nested = Call(np.dtype, "f8", False, True)
    nested.call += ((3, "<", (np.dtype("f4"), (2,)), None, None, -1, -1, 0),)
    for value in (forged, nested, np.array([None]), np.zeros(1, dtype=[("a", "f4")])):
        torch.save({"value": value}, tmp_path / "m.pt")
        with pytest.raises(ModelLoadError, match="not a number type"):
            load_model(tmp_path / "m.pt")


DETECTOR = Path(__file__).parents[2] / "examples" / "detection" / "model.py"


def test_zoo_names_are_refused_when_the_zoo_is_not_installed(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt", b"\x80\x02ctorchvision.models.net\nNet\n)\x81.")
    with pytest.raises(ModelLoadError, match=r"asks for torchvision\.models\.net\.Net"):
        load_model(path)
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_zoo_classes_load_when_the_zoo_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, zoo: str
) -> None:
    with monkeypatch.context() as patch:
        install_fake(zoo, tmp_path / "site", patch, marker)
        torch.save(import_object(f"{zoo}.models:net")(), tmp_path / "m.pt")
        forget_modules_below(tmp_path / "site")
        assert type(load_model(tmp_path / "m.pt").model).__name__ == "Net"
        forget_modules_below(tmp_path / "site")
    with pytest.raises(ModelLoadError, match=rf"{zoo}\.models\.net\.Config, {zoo}\.models\.net\.Net"):
        load_model(tmp_path / "m.pt")


def test_a_checkpoint_of_ultralytics_loads_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its averaged network, which is what it runs, and in float32: it stores halves. Every layer has a text for its
    ``type``, a method elsewhere, and what is still being trained has a record of settings."""
    package = tmp_path / "site" / "ultralytics" / "nn"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "tasks.py").write_text(DETECTOR.read_text(encoding="utf-8"), encoding="utf-8")
    (package.parent / "utils.py").write_text(
        "from types import SimpleNamespace\nclass IterableSimpleNamespace(SimpleNamespace): pass\n"
    )
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "site"))
        model, averaged = (import_object("ultralytics.nn.tasks:detector")().eval() for _ in range(2))
        for layer in (*model.model, *averaged.model):
            layer.type = f"ultralytics.nn.tasks.{type(layer).__name__}"
        averaged.args = import_object("ultralytics.utils:IterableSimpleNamespace")(imgsz=640)
        x = torch.rand(1, 3, 64, 64)
        wanted = copy.deepcopy(averaged.half()).float()(x)
        found = {"epoch": -1, "best_fitness": None, "updates": None, "train_args": {"imgsz": 640}, "date": "2026"}
        torch.save(found | {"model": model.half(), "ema": averaged}, tmp_path / "both.pt")
        torch.save(found | {"model": averaged, "ema": None}, tmp_path / "best.pt")
        for name, where in (("both", "'ema'; 'model' not used"), ("best", "'model'")):
            loaded = load_model(tmp_path / f"{name}.pt")
            assert loaded.notes == (
                f"weights found under the key {where}",
                "stored in half precision, taken in float32",
            )
            torch.testing.assert_close(loaded.model(x), wanted)
            assert vars(loaded.model)["args"].imgsz == 640
        torch.save(averaged, tmp_path / "half.pt")
        assert next(load_model(tmp_path / "half.pt").model.parameters()).dtype == torch.float16
        forget_modules_below(tmp_path / "site")
    with pytest.raises(ModelLoadError, match=r"ultralytics\.nn\.tasks\."):
        load_model(tmp_path / "best.pt")


@pytest.mark.parametrize("name", ["models.net\nrun", "models.net\nos.system", "payload\nNet", "models.net\nTraced"])
def test_other_names_of_an_installed_zoo_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, name: str
) -> None:
    install_fake("torchvision", tmp_path / "site", monkeypatch, marker)
    call = b"X" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode()
    data = b"\x80\x02ctorchvision." + name.encode() + b"\n" + call + b"\x85R."
    with pytest.raises(ModelLoadError, match=r"asks for torchvision\."):
        load_model(write_archive(tmp_path / "m.pt", data))
    assert not marker.exists()
    assert "torchvision.payload" not in sys.modules


# files that hold no model


def test_an_exported_program_loads_with_trust(tmp_path: Path) -> None:
    model = plain_net().eval()
    x = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    with pytest.raises(ModelLoadError, match="--trust"):
        load_model(tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2", trust=True)
    assert [type(layer) for layer in loaded.model.children()][:2] == [nn.Conv2d, nn.BatchNorm2d]
    torch.testing.assert_close(loaded.model(x), model(x))
    assert not loaded.model.training
    assert "executing the code" in loaded.notes[0]


def test_a_factory_may_return_a_program_but_not_its_module(tmp_path: Path, isolated: None) -> None:
    code = "import torch\nmodel = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()\n"
    code += "def program():\n    return torch.export.export(model, (torch.zeros(2, 3, 8, 8),))\n"
    (tmp_path / "made.py").write_text(code + "def module():\n    return program().module()\n")
    assert load_model(f"{tmp_path / 'made.py'}:program").model(torch.zeros(3, 3, 8, 8)).shape == (3, 4, 6, 6)
    with pytest.raises(ModelLoadError, match=r"ExportedProgram\.module\(\) gives; give the program itself"):
        load_model(f"{tmp_path / 'made.py'}:module")


def test_a_checkpoint_without_weights_names_its_keys(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, tmp_path / "m.pt")
    with pytest.raises(
        ModelLoadError, match="with the keys epoch, student, teacher, under which there is none or several"
    ):
        load_model(tmp_path / "m.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__/Net.py"):
            archive.writestr(name, b"")
    for trust in (False, True):
        with pytest.raises(ModelLoadError, match=r"TorchScript archive.*state_dict"):
            load_model(tmp_path / "m.pt", trust=trust)


def test_a_legacy_whole_module_is_read_as_any_other(tmp_path: Path) -> None:
    model = plain_net()
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    for trust in (False, True):
        loaded = load_model(tmp_path / "m.pt", trust=trust)
        assert not any("executing" in note for note in loaded.notes)
        assert torch.equal(loaded.model(torch.ones(1, 3, 8, 8)), model.eval()(torch.ones(1, 3, 8, 8)))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("trust", [True, False])
def test_a_truncated_file(tmp_path: Path, zipped: bool, share: float, trust: bool) -> None:
    torch.save(plain_net().state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data[: max(24, int(share * len(data)))])
    with pytest.raises(ModelLoadError, match="damaged, truncated"):
        load_model(tmp_path / "m.pt", trust=trust)


def test_a_zip_whose_tensors_are_gone(tmp_path: Path) -> None:
    torch.save(plain_net().state_dict(), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        write_archive(tmp_path / "m.pt", archive.read("whole/data.pkl"))
    with pytest.raises(ModelLoadError, match="damaged, truncated"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.pt", b"", "found an empty file"),
        ("m.safetensors", b"", "found an empty file"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", r"Git LFS .*\(git lfs pull\)"),
        ("m.safetensors.index.json", b"{}", "expected all weights in one file, found an index of several"),
        ("m-00001-of-00002.safetensors", b"x", "expected all weights in one file, found a part of several"),
        ("m-00001-of-00002.bin", b"x", r"with torch\.load of each part and torch\.save of all together"),
        ("m-00001-of-00001.safetensors", b"x", "damaged or truncated"),
        ("m.pt", b"no model at all", "begins with b'no model"),
        ("m.safetensors", b"no model at all", "damaged or truncated"),
        ("m.onnx", b"\x08\x08", r"found an ONNX file, .*give its path to convrewrite\.optimize\(path\)"),
        ("m.py", b"", "expected FILE.py:NAME"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / name)


def test_a_directory_a_missing_file_and_a_foreign_zip(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".metadata").write_bytes(b"x")
    for source, message in (
        (".", "found a directory"),
        ("parts", "dcp_to_torch_save"),
        ("nothing.pt", "no such file"),
        ("m.npz", "without data.pkl"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load_model(source)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {}, {"epoch": 3}, {1: torch.zeros(1)}, None, "text"])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"expected an nn\.Module or a state dict, found an object of type"):
        load_model(tmp_path / "m.pt")
