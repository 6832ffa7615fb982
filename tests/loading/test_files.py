"""Weights, programs and input shapes: what loads, and what is refused."""

import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import install_fake, plain_net, write_archive
from safetensors.torch import save as safetensors_of
from safetensors.torch import save_file
from safetensors.torch import save_model as save_safetensors
from torch import Tensor, nn

from convrewrite.errors import ModelLoadError, TraceError, UsageError
from convrewrite.loading.files import load_model
from convrewrite.loading.input_shapes import find_input_shape, initial_input_shapes, parse_shape
from convrewrite.loading.user_code import import_object

pytestmark = pytest.mark.usefixtures("isolated")

# state dicts


def test_a_state_dict_without_factory_says_how_to_give_one(tmp_path: Path) -> None:
    torch.save(plain_net().state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"found weights without .*--factory FILE\.py:NAME"):
        load_model(tmp_path / "m.pt")


SAFETENSORS = safetensors_of({"x": torch.zeros(2)})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["make", "Net", "instance"])
def test_a_state_dict_fills_the_factorys_network(tmp_path: Path, net_file: Path, name: str, zipped: bool) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    model = load_model(tmp_path / "m.pth", factory=f"{net_file}:{name}").model
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model is not import_object(f"{net_file}:instance")


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod."])
def test_nested_and_prefixed_weights_are_found_and_told(tmp_path: Path, net_file: Path, prefix: str) -> None:
    state = import_object(f"{net_file}:make")().state_dict()
    torch.save({"epoch": 3, "ema": {f"module.{prefix}{k}": v for k, v in state.items()}}, tmp_path / "m.ckpt")
    loaded = load_model(tmp_path / "m.ckpt", factory=f"{net_file}:make")
    assert loaded.notes[0] == "weights found under the key 'ema'"
    assert loaded.notes[-1] == f"prefix 'module.{prefix}' removed from the names of the weights"
    assert torch.equal(loaded.model.state_dict()["conv.weight"], state["conv.weight"])


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
        install_fake(zoo, tmp_path / f"site_{zoo}", monkeypatch, marker)
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


def test_a_file_that_was_changed_since_is_imported_again(tmp_path: Path) -> None:
    for channels in (4, 16):
        (tmp_path / "edited.py").write_text(
            f"from torch import nn\ndef make():\n    return nn.Conv2d(3, {channels}, 3)\n"
        )
        assert load_model("edited.py:make").model.get_parameter("weight").shape[0] == channels


# models that cannot be used


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    model: Any = plain_net()
    model[1].weight.data[2] = value
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"found 1\.weight with (NaN|infinity)"):
        load_model(tmp_path / "m.pt")


def test_an_infinite_mask_is_no_fault(tmp_path: Path) -> None:
    model = plain_net()
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


def test_weights_for_a_lazy_network_that_has_not_run_are_refused(tmp_path: Path) -> None:
    """Torch would fill it, but its layers would still not know their sizes."""
    (tmp_path / "odd.py").write_text(
        "import torch\nfrom torch import nn\ndef lazy():\n    return nn.Sequential(nn.LazyConv2d(4, 3))\n"
        "def run():\n    made = lazy()\n    made(torch.zeros(1, 3, 8, 8))\n    return made\n"
    )
    state = nn.Sequential(nn.Conv2d(3, 4, 3)).state_dict()
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"odd\.py:lazy: .* found 0 \(LazyConv2d\).* run the model once"):
        load_model("m.pt", factory="odd.py:lazy")
    assert torch.equal(load_model("m.pt", factory="odd.py:run").model.get_parameter("0.weight"), state["0.weight"])


def test_a_float_network_in_a_module_called_quantized_loads(tmp_path: Path) -> None:
    (tmp_path / "quantized.py").write_text(
        "from torch import nn\nclass Net(nn.Conv2d):\n    pass\nnet = Net(3, 4, 3)\n"
    )
    net = load_model("quantized.py:net").model
    torch.save(net, tmp_path / "m.pt")
    with pytest.raises(ModelLoadError, match=r"a file that asks for quantized\.Net; pass --factory"):
        load_model("m.pt")


def test_a_quantized_file_is_told_apart(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "m.pt", b"\x80\x02ctorch.ao.nn.quantized.modules.conv\nConv2d\n)\x81.")
    with pytest.raises(ModelLoadError, match="found a quantized one"):
        load_model(path)


@pytest.mark.parametrize("state", [b"", b"}b", b"}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00wK\x01ssb"])
def test_a_module_without_its_state_is_refused(tmp_path: Path, state: bytes) -> None:
    path = write_archive(tmp_path / "m.pt", b"\x80\x02ctorch.nn.modules.conv\nConv2d\n)\x81" + state + b".")
    with pytest.raises(ModelLoadError, match=r"without a usable state|damaged|is no Parameter"):
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
    model: Any = plain_net().double()
    shape, _ = find_input_shape(model)
    assert shape == (1, 3, 224, 224)
    assert model[1].num_batches_tracked == 0


def test_models_that_take_no_image() -> None:
    assert initial_input_shapes(nn.Linear(2, 2)) == []
    with pytest.raises(TraceError, match="expected a Conv2d"):
        find_input_shape(nn.Linear(2, 2))

    class ByKeyword(nn.Conv2d):
        def forward(self, *, image: Tensor) -> Tensor:
            return super().forward(image)

    with pytest.raises(UsageError, match="none, and image by keyword only"):
        find_input_shape(ByKeyword(3, 8, 3))
    picky = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 5))
    with pytest.raises(TraceError, match=r"none of 1x3x224x224, 1x3x32x32.*--input.*RuntimeError: mat1"):
        find_input_shape(picky)
    indices = nn.Sequential(nn.Embedding(8, 4), nn.Conv1d(4, 4, 1))
    with pytest.raises(
        TraceError, match=r"pass an example with numbers of the type that it takes.*--input FILE\.py:NAME"
    ):
        find_input_shape(indices)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.pt",
            b"\x08\x0a\x12\x07pytorch",
            "expected a file of torch.save by its name, found an ONNX file; call it m.onnx",
        ),
        (
            "m.bin",
            SAFETENSORS,
            "expected a file of torch.save by its name, found a safetensors file; call it m.safetensors",
        ),
        (
            "m.safetensors",
            b"PK\x03\x04 and more",
            "expected a safetensors file by its name, found a file of torch.save; call it",
        ),
        (
            "m.safetensors",
            b"\x08\x0a\x12\x07pytorch",
            "expected a safetensors file by its name, found an ONNX file; call it",
        ),
        (
            "m.safetensors",
            b"\x80\x04\x95 and more",
            "expected a safetensors file by its name, found a file of torch.save; call it",
        ),
        (
            "m.ort",
            b"\x18\x00\x00\x00ORTM and more",
            "expected a file of torch.save by its name, found a model in onnxruntime's own format",
        ),
    ],
)
def test_a_file_under_the_name_of_another_kind_is_told_as_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=f"{name}: {re.escape(message)}"):
        load_model(tmp_path / name)


def test_a_safetensors_file_with_a_header_as_long_as_the_mark_of_a_pickle_says(tmp_path: Path) -> None:
    length = int.from_bytes(SAFETENSORS[:8], "little")
    header = SAFETENSORS[8 : 8 + length].ljust(640)
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + SAFETENSORS[8 + length :])
    with pytest.raises(ModelLoadError, match="found weights without their network"):
        load_model(tmp_path / "m.safetensors")
