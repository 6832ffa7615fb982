"""Pickles of nothing but allowed names that would run code, call what saving does not call, or change what is not theirs."""

import functools
import os
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from commands import call
from model_files import Call, install_fake, plain_net, write_archive
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError
from convrewrite.loading.files import load_model
from convrewrite.loading.user_code import import_object
from convrewrite.stored.bounds import ForbiddenError
from convrewrite.stored.unpickling import read_pickle

pytestmark = pytest.mark.usefixtures("isolated")

REBUILD, WITH_STATE = torch._tensor._rebuild_from_type_v2, torch._utils._rebuild_parameter_with_state
PARTIAL = functools.partial(nn.functional.relu)


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model, path)
    return path


def refused(path: Path, message: str) -> None:
    """The file is refused, as a whole model and on the command line, where it is exit code 3."""
    with pytest.raises(ModelLoadError, match=f"found a file that may run code: {message}.*--trust"):
        load_model(path)
    ran = call("analyze", path, "--input", "1x3x8x8")
    assert ran.code == 3
    assert "Traceback" not in ran.err


def with_attribute(**attributes: Any) -> nn.Module:
    model = plain_net()
    vars(model[0]).update(attributes)
    return model


@pytest.mark.parametrize(
    "name", ["forward", "_conv_forward", "extra_repr", "_apply", "state_dict", "_call_impl", "register_buffer"]
)
def test_an_attribute_in_place_of_a_method(tmp_path: Path, name: str) -> None:
    path = saved(with_attribute(**{name: PARTIAL}), tmp_path / "m.pt")
    refused(path, f"it puts '{name}' in place of the code of a Conv2d")


def test_a_text_in_place_of_a_method_that_it_is_known_to_stand_for(tmp_path: Path) -> None:
    """Ultralytics keeps a layer's kind under ``type``; nothing else may stand there, and no text anywhere else."""
    load_model(saved(with_attribute(type="nn.Conv2d"), tmp_path / "m.pt"))
    refused(saved(with_attribute(type=PARTIAL), tmp_path / "m.pt"), "it puts 'type' in place of the code of a Conv2d")
    refused(saved(with_attribute(eval="x"), tmp_path / "m.pt"), "it puts 'eval' in place of the code of a Conv2d")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_scripting_leaves_on_a_model(tmp_path: Path) -> None:
    model = plain_net()
    torch.jit.script(model)
    assert vars(model[0])["__overloads__"] == {}
    load_model(saved(model, tmp_path / "m.pt"))
    for other in ({"forward": ["eval"]}, PARTIAL, ""):
        refused(
            saved(with_attribute(__overloads__=other), tmp_path / "m.pt"),
            "it puts '__overloads__' in place of the code",
        )


def test_a_namespace_is_made_empty_and_has_no_method_replaced(tmp_path: Path) -> None:
    class Settings(SimpleNamespace):
        def get(self, name: str) -> Any:
            return getattr(self, name)

    settings = Settings(size=640)
    made = Call(Settings, {"size": 640})
    Settings.__qualname__, Settings.__module__ = "Settings", "known"
    known = ModuleType("known")
    known.Settings = Settings  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "known", known)
        read = functools.partial(read_pickle, tmp_path / "m.pt", {"known.Settings": Settings}.get)
        torch.save(settings, tmp_path / "m.pt")
        assert read() == settings
        torch.save(made, tmp_path / "m.pt")
        with pytest.raises(ForbiddenError, match="it makes a Settings in another way than saving does"):
            read()
        torch.save(Settings(get=1), tmp_path / "m.pt")
        with pytest.raises(ForbiddenError, match="it puts 'get' in place of the code of a Settings"):
            read()


@pytest.mark.parametrize(
    "name", ["__deepcopy__", "__class__", "__call__", "__torch_function__", "a.b", 'a"b', "a\x1b[31m"]
)
def test_an_attribute_whose_name_is_none(tmp_path: Path, name: str) -> None:
    refused(saved(with_attribute(**{name: PARTIAL}), tmp_path / "m.pt"), "it puts .* in place of the code of a Conv2d")


@pytest.mark.parametrize(
    "table",
    ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"],
)
def test_a_stored_hook(tmp_path: Path, table: str) -> None:
    path = saved(with_attribute(**{table: OrderedDict({0: PARTIAL})}), tmp_path / "m.pt")
    refused(path, "it stores hooks on a Conv2d")


def test_other_code_for_a_call_and_a_mode_that_is_none(tmp_path: Path) -> None:
    refused(saved(with_attribute(training="yes"), tmp_path / "m.pt"), "the mode of a Conv2d is no truth value")


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers"])
def test_what_is_no_part_of_a_module(tmp_path: Path, table: str) -> None:
    model = plain_net()
    getattr(model, table)["extra"] = PARTIAL
    refused(saved(model, tmp_path / "m.pt"), "extra of a Sequential is no ")


@pytest.mark.parametrize("table", ["_modules", "_parameters", "_buffers"])
@pytest.mark.parametrize("reached", [True, False])
def test_code_in_a_name(tmp_path: Path, marker: Path, table: str, reached: bool) -> None:
    model = plain_net()
    value = {"_modules": nn.ReLU(), "_parameters": nn.Parameter(torch.ones(1))}.get(table, torch.ones(1))
    hidden = f'1" if getattr(__import__("os"), "system")("touch {marker}") else "1'
    part = nn.Sequential(nn.ReLU())
    getattr(part, table)[hidden] = value
    if reached:
        model.append(part)
    else:
        vars(model)["later"] = [functools.partial(nn.functional.relu, inplace=part)]
    refused(saved(model, tmp_path / "m.pt"), "it calls a part of a Sequential .*, which is no name")
    assert not marker.exists()


def test_a_name_that_is_put_in_after_the_module_was_made(tmp_path: Path) -> None:
    names: Any = OrderedDict()
    model = nn.Sequential()
    model._modules = names
    torch.save([model, names], tmp_path / "m.pt")
    data = torch._C.PyTorchFileReader(str(tmp_path / "m.pt")).get_record("data.pkl")
    assert data.endswith(b"e."), "the list, whose second element is the dictionary again"
    changed = data[:-2] + b'X\x03\x00\x00\x00a"bNse.'
    refused(write_archive(tmp_path / "m.pt", changed), "it calls a part of a Sequential .*, which is no name")


def built(function: Any, arguments: tuple[Any, ...], state: Any) -> Call:
    made = Call(function, *arguments)
    made.call += (state,)
    return made


CALLS: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (nn.Conv2d, (3, 4, 3), "it calls Conv2d"),
    (nn.Sequential, (OrderedDict(),), "it calls Sequential"),
    (nn.init.ones_, (torch.ones(1),), "it calls ones_"),
    (nn.functional.relu, (torch.ones(1),), "it calls relu"),
    (functools.partial, (os.path.join,), "asks for posixpath.join"),
    (functools.partial, (nn.ReLU, 1), "it binds arguments"),
    (set, (range(3),), "it makes a set of another type"),
    (frozenset, (range(3),), "it makes a frozenset of another type"),
    (bytearray, (10**12,), "it makes a bytearray of another type"),
    (bytes, (10**12,), "it makes bytes of something"),
    (range, (10**9,), "a range of 1000000000 numbers, the limit is 1000000"),
    (defaultdict, (PARTIAL,), "a dictionary makes its values by a call"),
    (
        torch._tensor._rebuild_from_type_v2,
        (nn.functional.relu, Tensor, (torch.ones(1),), {}),
        "it makes a tensor of another type",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), CALLS, ids=[message for *_, message in CALLS])
def test_a_call_that_saving_does_not_make(
    tmp_path: Path, function: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    torch.save({"x": Call(function, *arguments)}, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / "m.pt")


STATES: list[tuple[Any, str]] = [
    (built(OrderedDict, (), {"items": PARTIAL}), "it puts attributes on a dictionary"),
    (built(set, ([],), {"x": 1}), "it changes a set"),
    (built(functools.partial, (nn.ReLU,), (nn.init.ones_, (), {}, None)), "it changes a function"),
    (built(functools.partial, (nn.ReLU,), (nn.ReLU, (), {}, {"__wrapped__": 1})), "it changes a function"),
    (
        built(torch._utils._rebuild_parameter_with_state, (torch.ones(1), True, OrderedDict(), {"data": 1}), None),
        "it puts 'data' on",
    ),
    (built(torch._utils._rebuild_parameter, (torch.ones(1), True, OrderedDict({0: PARTIAL})), None), "has hooks"),
]


@pytest.mark.parametrize(("value", "message"), STATES, ids=[message for _, message in STATES])
def test_a_state_that_saving_does_not_store(tmp_path: Path, value: Call, message: str) -> None:
    torch.save({"x": value}, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path / "m.pt")


def test_an_enumeration_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path) -> None:
    install_fake("torchvision", tmp_path / "site", monkeypatch, marker)
    net = tmp_path / "site" / "torchvision" / "models" / "net.py"
    net.write_text(net.read_text() + "\nfrom enum import Enum\nclass Way(Enum):\n    UP = 'up'\n")
    start = b"\x80\x02ctorchvision.models.net\nWay\nX\x02\x00\x00\x00up\x85R"
    refused(
        write_archive(tmp_path / "m.pt", start + b"}X\x06\x00\x00\x00_name_X\x01\x00\x00\x00(sb."), "it changes a Way"
    )
    with pytest.raises(ModelLoadError, match="found an object of type Way"):
        load_model(write_archive(tmp_path / "n.pt", start + b"."))


@pytest.mark.parametrize("home", ["timm.models._features_fx", "torchvision.models.feature_extraction"])
def test_classes_that_follow_a_model_when_they_are_made_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path, home: str
) -> None:
    zoo, _, name = home.partition(".models.")
    install_fake(zoo, tmp_path / "site", monkeypatch, marker)
    models = tmp_path / "site" / zoo / "models"
    (models / f"{name}.py").write_text((models / "net.py").read_text())
    with pytest.raises(ModelLoadError, match=f"asks for {home}.Net"):
        load_model(write_archive(tmp_path / "m.pt", f"\x80\x02c{home}\nNet\n)\x81.".encode("latin1")))


def test_a_tensor_has_the_numbers_of_its_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(16.0)}, tmp_path / "good.pt")
    data = torch._C.PyTorchFileReader(str(tmp_path / "good.pt")).get_record("data.pkl")
    assert data.count(b"K\x10\x85") == 1
    wide = data.replace(b"K\x10\x85", b"J\x00\x00\x00\x10\x85")
    path = write_archive(tmp_path / "m.pt", wide)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", b"\x00" * 64)
    with pytest.raises(
        ModelLoadError, match="a tensor of shape 268435456 ends at element 268435456 of a storage of 16"
    ):
        load_model(path)


def test_opcodes_that_saving_does_not_write(tmp_path: Path, marker: Path) -> None:
    later = r"its pickle is of protocol 4, .*; save it again without pickle_protocol"
    for data, message in (
        (b"(S'touch x'\nios\nsystem\n.", "damaged"),
        (b"\x80\x02\x8c\x02os\x8c\x06system\x93.", "damaged"),
        (pickle.dumps(plain_net().state_dict(), protocol=4), later),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load_model(write_archive(tmp_path / "m.pt", data))
    assert not marker.exists()


def test_attributes_of_tensors_and_conventional_layers_come_back(tmp_path: Path) -> None:
    model: Any = plain_net()
    model[0].weight.tag = "first"
    model[0].register_buffer("mask", torch.ones(2, 2, dtype=torch.bool)[:, 1:])
    model.shape = torch.Size([1, 2])
    model.kinds = (nn.ReLU, torch.float16, torch.device("cpu"), {1, 2}, 1j, b"bytes", bytearray(b"x"))
    model.append(nn.LSTM(4, 4))
    model.append(nn.MultiheadAttention(4, 2))
    torch.save(model, tmp_path / "m.pt")
    got: Any = load_model(tmp_path / "m.pt").model
    assert got[0].weight.tag == "first"
    assert got.kinds == model.kinds
    assert got.shape == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(got.state_dict().values(), model.state_dict().values(), strict=True))
    assert got[0].mask.stride() == model[0].mask.stride()


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_that_torch_conjugates_or_negates_when_they_are_read(tmp_path: Path, zipped: bool) -> None:
    """A lazy view is stored as the numbers it is a view of, with a mark: without it a weight has the wrong sign."""
    spectrum = torch.complex(torch.ones(2), torch.arange(2.0))
    weight = nn.Parameter(spectrum.clone().conj().imag)
    state = {"conjugated": spectrum.conj(), "negated": weight, "both": spectrum.conj()._neg_view()}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    got: Any = read_pickle(tmp_path / "m.pt")
    assert got["negated"].tolist() == [0.0, -1.0]
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert got["conjugated"].is_conj(), "as torch.load gives it"


@pytest.mark.parametrize(
    ("tensor", "marks", "message"),
    [
        (torch.ones(1), {"conj": True}, "it marks numbers of torch.float32 as conjugated"),
        (torch.ones(1, dtype=torch.uint16), {"neg": True}, "it marks numbers of torch.uint16 as negated"),
        (torch.ones(1), {"neg": 1}, "it marks a tensor in a way that torch does not"),
        (torch.ones(1), {"neg": True, "x": True}, "it marks a tensor in a way that torch does not"),
    ],
)
def test_marks_of_lazy_views_that_torch_does_not_store(
    tmp_path: Path, tensor: Tensor, marks: dict[str, Any], message: str
) -> None:
    function, arguments = tensor.__reduce_ex__(2)
    torch.save({"x": Call(function, *arguments, marks)}, tmp_path / "m.pt")
    with pytest.raises(ForbiddenError, match=message):
        read_pickle(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_state_dict_is_told_apart(tmp_path: Path) -> None:
    torch.save({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match="found a quantized one"):
        load_model(tmp_path / "m.pt")


def test_the_factorys_classes_may_be_called_and_be_hooks_but_its_modules_are_not_called(tmp_path: Path) -> None:
    path = tmp_path / "users.py"
    path.write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    pass\n"
        "class Hook:\n    def __init__(self, x):\n        self.x = x\n    def __call__(self, *args):\n        return None\n"
        "    def __reduce__(self):\n        return Hook, (self.x,)\n"
        "def make():\n    return Net(nn.Conv2d(3, 4, 3))\n"
    )
    factory = f"{path}:make"
    net = load_model(factory).model
    kind = import_object(f"{path}:Hook")
    net[0].register_forward_hook(kind(3))  # type: ignore[index,operator]
    torch.save(net, tmp_path / "m.pt")
    loaded: Any = load_model(tmp_path / "m.pt", factory=factory).model
    assert next(iter(loaded[0]._forward_hooks.values())).x == 3
    torch.save({"x": Call(type(net), nn.ReLU())}, tmp_path / "n.pt")
    with pytest.raises(ModelLoadError, match="it calls Net"):
        load_model(tmp_path / "n.pt", factory=factory)


def test_what_python_2_and_the_old_format_wrote_is_read(tmp_path: Path) -> None:
    pairs = Call(OrderedDict, [["a", 1], ["b", torch.ones(2)[1:]]])
    for zipped in (True, False):
        torch.save(pairs, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        got: Any = read_pickle(tmp_path / "m.pt")
        assert list(got) == ["a", "b"]
        assert got["b"].tolist() == [1.0]


RUNS_TEXT = """
from torch import nn
class Net(nn.Module):
    def __init__(self, activation="nn.ReLU()", *rest):
        super().__init__()
        self.act = eval(activation)
"""


def test_a_class_of_ultralytics_that_evaluates_text_is_not_called_by_another_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: Path
) -> None:
    """Its networks evaluate the activation that they are made with; a layer calls whatever it holds as its activation."""
    package = tmp_path / "site" / "ultralytics" / "nn"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "tasks.py").write_text(RUNS_TEXT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    net = import_object("ultralytics.nn.tasks:Net")
    layer: Any = nn.TransformerEncoderLayer(8, 2, 8)
    for bound in (functools.partial(net, f"open({str(marker)!r}, 'w')"), net, {"within": [net]}, defaultdict(net)):
        layer.activation = bound
        for zipped in (True, False):
            torch.save(layer, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(
                ModelLoadError, match=r"may run code: (it keeps the class Net|it binds|a dictionary makes)"
            ):
                load_model(tmp_path / "m.pt").model(torch.zeros(1, 1, 8))
            assert not marker.exists()
    layer.activation = net()
    torch.save(layer, tmp_path / "m.pt")
    assert type(load_model(tmp_path / "m.pt").model.activation) is net
