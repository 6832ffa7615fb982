"""Where checkpoints of trainers have their weights, and what stands before the names."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from model_files import plain_net
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from convrewrite.errors import ModelLoadError
from convrewrite.loading.state_dicts import find_weights, load_weights, widened

STATE = plain_net().state_dict()


class Rescaled(nn.Module):
    """Its first version stored weights twice as large, and its second one takes those, too, by the version beside the weights."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def _load_from_state_dict(self, state: Any, prefix: str, noted: dict[str, Any], *rest: Any) -> None:
        if noted.get("version", 1) < 2:
            state[f"{prefix}conv.weight"] = state[f"{prefix}conv.weight"] / 2
        super()._load_from_state_dict(state, prefix, noted, *rest)


KEYS = [
    "model", "state_dict", "model_state_dict", "model_state", "ema", "model_ema", "state_dict_ema", "ema_state_dict",
    "net", "network", "module", "weights", "params", "params_ema",
]  # fmt: skip


def filled(state: dict[str, Tensor]) -> tuple[nn.Module, tuple[str, ...]]:
    """A network with other weights, filled with these, and the notes."""
    model = plain_net()
    return model, load_weights(model, dict(state), "m.pt", "net.py:make")


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize("key", [*KEYS, "a_name_of_its_own"])
def test_weights_are_found_under_their_key(key: str) -> None:
    optimizer = torch.optim.SGD(plain_net().parameters(), lr=0.1, momentum=0.9).state_dict()
    found, notes = find_weights({"epoch": 3, "optimizer": optimizer, key: STATE, "best": 0.5})
    assert found == STATE
    assert notes == (f"weights found under the key {key!r}",)


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        ({"ema": {"state_dict": STATE, "decay": 0.99}}, ("'ema'", "'state_dict'")),
        ({"checkpoint": {"model_ema": STATE}}, ("'checkpoint'", "'model_ema'")),
        ({"model": None, "ema": plain_net()}, ("'ema'",)),
        ({"model": STATE, "ema": STATE}, ("'model'; 'ema' not used",)),
        ({"state_dict_ema": STATE, "state_dict": STATE}, ("'state_dict'; 'state_dict_ema' not used",)),
    ],
)
def test_every_step_and_what_was_passed_over_is_told(content: dict[str, Any], notes: tuple[str, ...]) -> None:
    found, told = find_weights(content)
    assert found is not None
    assert told == tuple(f"weights found under the key {note}" for note in notes)


def test_tensors_in_the_extra_state_of_a_layer_are_not_taken_for_the_weights() -> None:
    state: dict[str, Any] = STATE | {"0._extra_state": {"scale": torch.ones(4)}}
    assert find_weights(state) == (state, ())
    assert find_weights({"state_dict": state})[0] == state


def test_a_dictionary_to_which_many_ways_lead_is_looked_through_once() -> None:
    asked: list[object] = []

    class Noted(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            asked.append(key)
            return super().get(key, default)

    content: object = 1
    for _ in range(5):
        content = Noted({f"k{number}": content for number in range(8)})
    assert find_weights(content) == (None, ())
    assert len(asked) < 500


@pytest.mark.parametrize("content", [{"student": STATE, "teacher": STATE}, {"epoch": 3}, {3: STATE}, [STATE], 3])
def test_nothing_is_guessed(content: object) -> None:
    assert find_weights(content) == (None, ())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module.backbone.", "net."])
def test_a_prefix_before_every_name_is_removed(prefix: str) -> None:
    model, notes = filled(prefixed(prefix))
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())
    assert notes == (f"prefix {prefix!r} removed from the names of the weights",)


def test_what_stands_beside_the_network_is_left_out_and_told() -> None:
    average = AveragedModel(plain_net())
    average.module.load_state_dict(STATE)
    model, notes = filled(average.state_dict())
    assert torch.equal(model.state_dict()["0.weight"], STATE["0.weight"])
    assert notes[1] == "only names that begin with it were taken, not n_averaged"
    _, notes = filled(prefixed("model.") | prefixed("model_ema.") | {"loss.weight": torch.ones(3)})
    assert notes[0] == "prefix 'model.' removed from the names of the weights"
    assert "not model_ema.0.weight" in notes[1] and notes[1].endswith("and 4 more")


def test_what_torch_compile_puts_into_names_is_removed() -> None:
    stored, model = (nn.ModuleDict({"a": Rescaled(), "b": plain_net()}) for _ in range(2))
    compiled = nn.ModuleDict({name: nn.ModuleDict({"_orig_mod": part}) for name, part in stored.items()})
    notes = load_weights(model, nn.DataParallel(compiled).state_dict(), "m.pt", "net.py:make")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stored.state_dict().items())
    assert notes[0] == "'_orig_mod.', which torch.compile puts into names, was removed from them"


def test_one_branch_of_a_network_is_found_though_the_whole_has_one_of_its_names() -> None:
    whole = {"0.bias": torch.ones(9), "text.0.weight": torch.ones(3)} | prefixed("visual.")
    model, notes = filled(whole)
    assert torch.equal(model.state_dict()["0.bias"], STATE["0.bias"])
    assert notes[1] == "only names that begin with it were taken, not 0.bias, text.0.weight"


def test_names_that_fit_are_not_touched() -> None:
    model = nn.ModuleDict({"module": plain_net()})
    assert load_weights(model, prefixed("module."), "m.pt", "net.py:make") == ()
    with pytest.raises(ModelLoadError, match=r"1 unexpected: extra"):
        filled({**STATE, "extra": torch.ones(1)})


def test_a_part_of_the_network_is_not_enough() -> None:
    state = prefixed("module.")
    del state["module.1.bias"]
    with pytest.raises(ModelLoadError, match=r"m\.pt: expected the weights of net\.py:make .* 1 missing: 1\.bias"):
        filled(state)
    with pytest.raises(ModelLoadError, match=r"7 missing: .*; 1 unexpected: other\.weight"):
        filled({"other.weight": torch.ones(1)})
    with pytest.raises(ModelLoadError, match=r"found 1 on the meta device, without values: 0\.weight"):
        filled(STATE | {"0.weight": STATE["0.weight"].to("meta")})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_that_a_conversion_would_change_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelLoadError, match=rf"0\.weight \({dtype} stored, torch\.float32 expected\)"):
        filled(STATE | {"0.weight": STATE["0.weight"].to(dtype)})


def test_indices_that_half_precision_has_rounded_are_refused() -> None:
    for count, refusal in (
        (2048, nullcontext()),
        (2049, pytest.raises(ModelLoadError, match=r"indices \(torch\.float16 stored")),
    ):
        model = nn.Conv2d(3, 4, 3)
        model.register_buffer("indices", torch.arange(count))
        with refusal:
            load_weights(
                model, {name: value.half() for name, value in model.state_dict().items()}, "m.pt", "net.py:make"
            )


def test_other_numbers_for_each_name_of_one_tensor_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    apart = model.state_dict()
    alike = apart | {"1.weight": apart["0.weight"].clone()}
    model[1].weight = model[0].weight
    load_weights(model, alike, "m.pt", "net.py:make")
    with pytest.raises(ModelLoadError, match=r"in which 0\.weight and 1\.weight are one tensor, found other numbers"):
        load_weights(model, apart, "m.pt", "net.py:make")


def test_other_types_of_real_numbers_are_taken_and_told() -> None:
    model, notes = filled({name: value.double() for name, value in STATE.items()})
    assert torch.equal(model.state_dict()["0.weight"], STATE["0.weight"])
    assert notes == ("weights stored in torch.float64 were taken in torch.float32, as the factory has them",)


def test_a_network_stored_in_half_precision_but_for_its_batch_norms_is_widened() -> None:
    model = plain_net().half()
    model[1].float()
    wide, notes = widened(model)
    assert {value.dtype for value in wide.parameters()} == {torch.float32} and len(notes) == 1
    assert widened(plain_net())[1] == widened(plain_net().half().bfloat16())[1] == ()


def test_every_wrapper_of_data_parallel_is_removed() -> None:
    model = plain_net()
    assert find_weights(nn.DataParallel(nn.DataParallel(model)))[0] is model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda net: net,
    "parallel": nn.DataParallel,
    "two": lambda net: nn.ModuleDict({"a": nn.ModuleDict({"b": net})}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_versions_of_modules_come_with_their_weights(wrapper: str) -> None:
    stored, model = Rescaled(), Rescaled()
    content = WRAPPERS[wrapper](stored).state_dict()
    state, _ = find_weights({"epoch": 1, "model": content})
    assert isinstance(state, dict)
    load_weights(model, state, "m.pt", "net.py:make")
    assert torch.equal(model.conv.weight, stored.conv.weight)


def test_weights_without_versions_are_those_of_the_first() -> None:
    stored, model = Rescaled(), Rescaled()
    load_weights(model, dict(stored.state_dict()), "m.pt", "net.py:make")
    assert torch.equal(model.conv.weight, stored.conv.weight / 2)
