"""Sources of models: what loads, what is refused, and that nothing of a hostile file runs."""

import io
import os
import pickle
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from safetensors.torch import save_model as save_safetensors
from torch import nn

from convrewrite.errors import ModelLoadError, TraceError, UsageError
from convrewrite.loading import (
    find_input_shape,
    import_object,
    initial_input_shapes,
    load_model,
    parse_shape,
)

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(x))

def make():
    return Net().eval()

def wide():
    return Net(5)

def number():
    return 3

def needs(width):
    return Net(width)

def broken():
    raise ValueError("no weights here")

instance = Net()
"""


FAKE_ZOO = """
import os
from dataclasses import dataclass
from torch import fx, nn

@dataclass
class Config:
    width: int = 4

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.config = Config()

    def forward(self, x):
        return self.conv(x)

class Traced(fx.GraphModule):
    pass

def net(weights=None):
    return Net()

def run(command):
    os.system(command)
"""


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Seeded, in a folder of its own; modules imported from there are forgotten afterwards."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    yield
    _forget_modules_below(tmp_path)


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net_of_user.py"
    path.write_text(NET)
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file a hostile payload would create."""
    return tmp_path / "executed"


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call: tuple[Any, ...] = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _forget_modules_below(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def _plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def _write_archive(path: Path, data: bytes) -> Path:
    """What torch.save would write around this pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def _install_fake(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    models = folder / name / "models"
    models.mkdir(parents=True)
    (folder / name / "__init__.py").write_text(
        "from .models import Net\ndef create_model(name, pretrained=True):\n"
        "    assert name == 'net' and not pretrained\n    return Net()\n"
    )
    (folder / name / "payload.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Net: pass\n")
    (models / "__init__.py").write_text("from .net import Net, net, run\n")
    (models / "net.py").write_text(FAKE_ZOO)
    monkeypatch.syspath_prepend(str(folder))


# whole modules


def test_a_whole_module_loads_in_eval_mode_with_its_weights(tmp_path: Path) -> None:
    model = _plain_net()
    torch.save(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.source == str(tmp_path / "m.pt")
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.notes == ("the model was in train mode and was put in eval mode",)
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded.model(x), model.eval()(x))


def test_harmless_values_load_and_keep_their_meaning(tmp_path: Path) -> None:
    model: Any = _plain_net()
    model.act = partial(nn.functional.leaky_relu, negative_slope=0.2)
    model.gelu = nn.functional.gelu
    model.init = nn.init.kaiming_normal_
    model.values = (frozenset({1}), slice(1, 2), range(3), np.float32(0.5), np.int64(3))
    model.array = np.arange(6, dtype=">f4").reshape(2, 3).copy(order="F")
    torch.save(model, tmp_path / "m.pt")
    got: Any = load_model(tmp_path / "m.pt").model
    assert got.act.func is nn.functional.leaky_relu
    assert got.act.keywords == {"negative_slope": 0.2}
    assert got.gelu is nn.functional.gelu
    assert got.init is nn.init.kaiming_normal_
    assert got.values == model.values
    assert np.array_equal(got.array, model.array)
    assert type(pickle.loads(pickle.dumps(got.array))) is np.ndarray


def test_data_parallel_is_unwrapped(tmp_path: Path) -> None:
    torch.save(nn.DataParallel(_plain_net()), tmp_path / "m.pt")
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
    torch.save({key: _plain_net(), "epoch": 3}, tmp_path / "m.ckpt")
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
    torch.save(torch.fx.symbolic_trace(_plain_net()), tmp_path / "m.pt")
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


def test_zoo_names_are_refused_when_the_zoo_is_not_installed(tmp_path: Path) -> None:
    path = _write_archive(tmp_path / "m.pt", b"\x80\x02ctorchvision.models.net\nNet\n)\x81.")
    with pytest.raises(ModelLoadError, match=r"asks for torchvision\.models\.net\.Net"):
        load_model(path)
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("zoo", ["torchvision", "timm"])
def test_zoo_classes_load_when_the_zoo_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, zoo: str
) -> None:
    with monkeypatch.context() as patch:
        _install_fake(zoo, tmp_path / "site", patch, marker)
        torch.save(import_object(f"{zoo}.models:net")(), tmp_path / "m.pt")
        _forget_modules_below(tmp_path / "site")
        assert type(load_model(tmp_path / "m.pt").model).__name__ == "Net"
        _forget_modules_below(tmp_path / "site")
    with pytest.raises(ModelLoadError, match=rf"{zoo}\.models\.net\.Config, {zoo}\.models\.net\.Net"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("name", ["models.net\nrun", "models.net\nos.system", "payload\nNet", "models.net\nTraced"])
def test_other_names_of_an_installed_zoo_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, name: str
) -> None:
    _install_fake("torchvision", tmp_path / "site", monkeypatch, marker)
    call = b"X" + len(f"touch {marker}").to_bytes(4, "little") + f"touch {marker}".encode()
    data = b"\x80\x02ctorchvision." + name.encode() + b"\n" + call + b"\x85R."
    with pytest.raises(ModelLoadError, match=r"asks for torchvision\."):
        load_model(_write_archive(tmp_path / "m.pt", data))
    assert not marker.exists()
    assert "torchvision.payload" not in sys.modules


# state dicts


def test_a_state_dict_without_factory_says_how_to_give_one(tmp_path: Path) -> None:
    torch.save(_plain_net().state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"found weights without .*--factory FILE\.py:NAME"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["make", "Net", "instance"])
def test_a_state_dict_fills_the_factorys_network(tmp_path: Path, net_file: Path, name: str, zipped: bool) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    model = load_model(tmp_path / "m.pth", factory=f"{net_file}:{name}").model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model is not import_object(f"{net_file}:instance")


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "ema", "model_ema", "net", "weights", "params"]
)
@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_nested_and_prefixed_weights_are_found_and_told(tmp_path: Path, net_file: Path, key: str, prefix: str) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    torch.save({"epoch": 3, key: {f"module.{prefix}{k}": v for k, v in state.items()}}, tmp_path / "m.ckpt")
    loaded = load_model(tmp_path / "m.ckpt", factory=f"{net_file}:make")
    assert loaded.notes[0] == f"weights found under the key '{key}'"
    assert f"prefix '{prefix}' removed" in loaded.notes[-1]
    assert torch.equal(loaded.model.state_dict()["conv.weight"], state["conv.weight"])


def test_weights_passed_over_are_told(tmp_path: Path, net_file: Path) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "m.pt")
    assert "'ema' not used" in load_model(tmp_path / "m.pt", factory=f"{net_file}:make").notes[0]


def test_a_mismatch_is_one_clear_message(tmp_path: Path, net_file: Path) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    state["head.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError) as caught:
        load_model(tmp_path / "m.pt", factory=f"{net_file}:wide")
    message = str(caught.value)
    assert "1 missing: norm.weight; 1 unexpected: head.weight; 5 of another shape:" in message
    assert "conv.weight (4x3x3x3 stored, 5x3x3x3 expected)" in message
    assert "\n" not in message


def test_safetensors_need_a_factory_and_load(tmp_path: Path, net_file: Path) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ModelLoadError, match="--factory"):
        load_model(tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors", factory=f"{net_file}:make")
    assert torch.equal(loaded.model.state_dict()["conv.weight"], state["conv.weight"])


def test_tied_safetensors_weights_stay_tied(tmp_path: Path) -> None:
    source = tmp_path / "tied.py"
    source.write_text(
        "from torch import nn\ndef make():\n    m = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)).eval()\n"
        "    m[1].weight = m[0].weight\n    return m\n"
    )
    model = import_object(f"{source}:make")()
    save_safetensors(model, str(tmp_path / "m.safetensors"))
    loaded = load_model(tmp_path / "m.safetensors", factory=f"{source}:make")
    layers: Any = loaded.model
    assert layers[1].weight is layers[0].weight
    assert torch.equal(layers[0].weight, model[0].weight)
    assert "tied weights" in loaded.notes[-1]


# programs


@pytest.mark.parametrize("name", ["make", "Net", "instance"])
def test_a_program_gives_a_model(net_file: Path, name: str) -> None:
    loaded = load_model(f"{net_file}:{name}")
    assert isinstance(loaded.model.conv, nn.Conv2d)
    assert "random weights unless" in loaded.notes[0]
    assert not loaded.model.training


def test_a_module_of_the_working_folder_is_a_program(net_file: Path) -> None:
    before = list(sys.path)
    assert isinstance(load_model("net_of_user:make").model.conv, nn.Conv2d)
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"expected missing in .*found only Net, broken, instance, make"),
        ("number", "expected an nn.Module or a callable .*found an object of type int"),
        ("needs", "TypeError: needs.. missing 1 required .*takes no arguments"),
        ("broken", "found ValueError: no weights here"),
    ],
)
def test_programs_that_give_no_model(net_file: Path, name: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_model(f"{net_file}:{name}")


@pytest.mark.parametrize("body", ["raise SystemExit(2)", "import does_not_exist_here", "this is no python"])
def test_a_file_that_cannot_be_imported(tmp_path: Path, body: str) -> None:
    (tmp_path / "bad.py").write_text(body)
    before = list(sys.path)
    with pytest.raises(ModelLoadError, match=r"bad\.py: expected code that imports"):
        import_object("bad.py:make")
    assert "bad" not in sys.modules
    assert sys.path == before


def test_the_zoos_are_programs_when_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    for zoo in ("torchvision", "timm"):
        with pytest.raises(ModelLoadError, match=rf"{zoo} is not installed; pip install {zoo}"):
            load_model(f"{zoo}:net")
        _install_fake(zoo, tmp_path / f"site_{zoo}", monkeypatch, marker)
        assert type(load_model(f"{zoo}:net").model).__module__ == f"{zoo}.models.net"


def test_a_missing_module_and_a_malformed_target() -> None:
    with pytest.raises(ModelLoadError, match="no_such_package is not installed"):
        import_object("no_such_package.models:net")
    with pytest.raises(UsageError, match=r"expected FILE\.py:NAME or pkg\.mod:NAME"):
        import_object("net")
    with pytest.raises(UsageError, match="is a program already"):
        load_model("a.py:b", factory="c.py:d")


def test_files_are_imported_once_beside_their_neighbours(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "user_net.py").write_text(
            f"from beside_{folder} import VALUE\ndef lazy():\n    from beside_{folder} import VALUE\n    return VALUE\n"
            "class Thing: pass\n"
        )
        (tmp_path / folder / f"beside_{folder}.py").write_text(f"VALUE = {folder!r}\n")
    before = list(sys.path)
    first = import_object("one/user_net.py:Thing")
    second = import_object("two/user_net.py:Thing")
    assert import_object("one/user_net.py:Thing") is first
    assert import_object("two/user_net.py:Thing") is second
    assert first.__module__ == "user_net"
    assert second.__module__ not in ("user_net", first.__module__)
    assert type(pickle.loads(pickle.dumps(second()))) is second
    assert (import_object("one/user_net.py:VALUE"), import_object("two/user_net.py:VALUE")) == ("one", "two")
    assert sys.path == before


# files that hold no model


def test_an_exported_program_loads_with_trust(tmp_path: Path) -> None:
    model = _plain_net().eval()
    x = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "m.pt2")
    with pytest.raises(ModelLoadError, match="--trust"):
        load_model(tmp_path / "m.pt2")
    loaded = load_model(tmp_path / "m.pt2", trust=True)
    torch.testing.assert_close(loaded.model(x), model(x))
    assert not loaded.model.training
    assert "executing the code" in loaded.notes[0]


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__/Net.py"):
            archive.writestr(name, b"")
    for trust in (False, True):
        with pytest.raises(ModelLoadError, match=r"TorchScript archive.*state_dict"):
            load_model(tmp_path / "m.pt", trust=trust)


def test_a_legacy_whole_module_loads_with_trust_alone(tmp_path: Path) -> None:
    torch.save(_plain_net(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelLoadError, match=r"old, non-zip format.*torch\.nn\.modules.*--trust"):
        load_model(tmp_path / "m.pt")
    assert type(load_model(tmp_path / "m.pt", trust=True).model) is nn.Sequential


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("trust", [True, False])
def test_a_truncated_file(tmp_path: Path, zipped: bool, share: float, trust: bool) -> None:
    torch.save(_plain_net().state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data[: max(24, int(share * len(data)))])
    with pytest.raises(ModelLoadError, match="damaged, truncated"):
        load_model(tmp_path / "m.pt", trust=trust)


def test_a_zip_whose_tensors_are_gone(tmp_path: Path) -> None:
    torch.save(_plain_net().state_dict(), tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:
        _write_archive(tmp_path / "m.pt", archive.read("whole/data.pkl"))
    with pytest.raises(ModelLoadError, match="damaged, truncated"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.pt", b"", "found an empty file"),
        ("m.safetensors", b"", "found an empty file"),
        ("m.pt", b"no model at all", "begins with b'no model"),
        ("m.safetensors", b"no model at all", "damaged or truncated"),
        ("m.onnx", b"\x08\x08", "found an ONNX file"),
        ("m.py", b"", "expected FILE.py:NAME"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / name)


def test_a_directory_a_missing_file_and_a_foreign_zip(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    for source, message in ((".", "found a directory"), ("nothing.pt", "no such file"), ("m.npz", "without data.pkl")):
        with pytest.raises(ModelLoadError, match=message):
            load_model(source)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {}, {"epoch": 3}, {1: torch.zeros(1)}, None, "text"])
def test_a_pickle_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"expected an nn\.Module or a state dict, found an object of type"):
        load_model(tmp_path / "m.pt")


# models that cannot be used


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model: Any = _plain_net()
    model[1].weight.data[2] = value
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"found 1\.weight with (NaN|infinity)"):
        load_model(tmp_path / "m.pt")


def test_an_infinite_mask_is_no_fault(tmp_path: Path) -> None:
    model = _plain_net()
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    torch.save(model, tmp_path / "m.pt")
    mask = load_model(tmp_path / "m.pt").model.get_buffer("mask")
    assert bool(torch.isinf(mask).all())


def test_meta_lazy_and_quantized_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\nmeta = nn.Conv2d(3, 4, 3, device='meta')\n"
        "def lazy():\n    return nn.LazyConv2d(4, 3)\n"
        "class Packed(nn.Module):\n    __module__ = 'torch.ao.nn.quantized.modules.conv'\n"
    )
    for name, message in (("meta", "weight on the meta device"), ("lazy", "lazy module"), ("Packed", "quantized")):
        with pytest.raises(ModelLoadError, match=message):
            load_model(f"odd.py:{name}")


def test_a_quantized_file_is_told_apart(tmp_path: Path) -> None:
    path = _write_archive(tmp_path / "m.pt", b"\x80\x02ctorch.ao.nn.quantized.modules.conv\nConv2d\n)\x81.")
    with pytest.raises(ModelLoadError, match="found a quantized one"):
        load_model(path)


@pytest.mark.parametrize("state", [b"", b"}b", b"}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00wK\x01ssb"])
def test_a_module_without_its_state_is_refused(tmp_path: Path, state: bytes) -> None:
    path = _write_archive(tmp_path / "m.pt", b"\x80\x02ctorch.nn.modules.conv\nConv2d\n)\x81" + state + b".")
    with pytest.raises(ModelLoadError, match=r"without a usable state|damaged"):
        load_model(path)


# input shapes


def test_parse_shape() -> None:
    assert parse_shape("1x3x224x224") == (1, 3, 224, 224)
    assert parse_shape("7") == (7,)


@pytest.mark.parametrize("text", ["", "x", "1x", "1,3", "1x0x2", "-1x3", "1X3", "1x3x224x224 ", "1x3\n", "1x\u0663"])
def test_malformed_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="such as 1x3x224x224"):
        parse_shape(text)


def test_the_first_accepted_size_is_assumed_and_told() -> None:
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), flat=nn.Flatten(), head=nn.Linear(2 * 26 * 26, 3)))
    model.train()
    assert initial_input_shapes(model)[:3] == [(1, 1, 224, 224), (1, 1, 32, 32), (1, 1, 28, 28)]
    assert find_input_shape(model) == ((1, 1, 28, 28), "input size assumed 1x1x28x28; pass --input to change it")
    assert model.training


def test_finding_a_shape_leaves_statistics_and_dtype_alone() -> None:
    model: Any = _plain_net().double()
    shape, _ = find_input_shape(model)
    assert shape == (1, 3, 224, 224)
    assert model[1].num_batches_tracked == 0


def test_models_that_take_no_image() -> None:
    assert initial_input_shapes(nn.Linear(2, 2)) == []
    with pytest.raises(TraceError, match="expected a Conv2d"):
        find_input_shape(nn.Linear(2, 2))
    picky = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5))
    with pytest.raises(TraceError, match=r"none of 1x3x224x224, 1x3x32x32.*--input.*RuntimeError: mat1"):
        find_input_shape(picky)
