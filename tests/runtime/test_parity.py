import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from convrewrite.errors import VerificationError
from convrewrite.meanings.fidelity import effect_of
from convrewrite.meanings.kinds import Meaning
from convrewrite.onnx_files.model import OnnxModel
from convrewrite.runtime.comparison import measure_fidelity, verify
from convrewrite.runtime.onnx_export import export
from convrewrite.runtime.parity import (
    OutputParity,
    Parity,
    RunningParity,
    _parity_batches,
    check_parity,
    output_parity,
    require_parity,
    tolerance_for,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(net(), (images(2),), tmp_path_factory.mktemp("onnx") / "net.onnx").path


def graph(op: str, kind: int, dims: list[int | str], **attributes: Any) -> bytes:
    """An ONNX model of one operator from ``input`` to ``output``."""
    node = helper.make_node(op, ["input"], ["output"], **attributes)
    entry, result = (helper.make_tensor_value_info(name, kind, dims) for name in ("input", "output"))
    model = helper.make_graph([node], "one", [entry], [result])
    data: bytes = helper.make_model(
        model, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()
    return data


def test_parity_of_a_right_export_holds_at_two_batch_sizes(exported: Path) -> None:
    model = net().train()
    parity = check_parity(model, exported, (images(3),))
    assert parity.passed
    assert parity.inputs_checked == 2
    assert [output.name for output in parity.outputs] == ["output"]
    assert 0 < parity.outputs[0].relative_error < parity.outputs[0].tolerance
    require_parity(parity)
    assert all(module.training for module in model.modules())
    assert check_parity(model, exported, (images(1),)).inputs_checked == 2


def test_one_corrupted_weight_breaks_parity(exported: Path) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("0.weight")[3, 1, 2, 0] += 0.5
    parity = check_parity(model, exported, (images(3),))
    assert not parity.passed
    with pytest.raises(VerificationError, match=r"output 'output'.*within 4\.9e-04"):
        require_parity(parity)


def test_what_is_no_number_breaks_parity(exported: Path) -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("6.bias")[2] = math.inf
    parity = check_parity(model, exported, (images(3),))
    assert not parity.passed
    assert parity.outputs[0].relative_error == math.inf
    with pytest.raises(VerificationError, match="inf"):
        require_parity(parity)


def test_nan_on_both_sides_is_told_and_equal_infinities_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "identity.onnx"
    path.write_bytes(graph("Identity", TensorProto.FLOAT, ["batch", 2]))
    assert check_parity(nn.Identity(), path, (torch.tensor([[math.inf, 1.0], [2.0, -math.inf]]),)).passed
    for numbers in ([[math.nan, 1.0], [2.0, 3.0]], [[1.0, math.nan], [2.0, 3.0]]):
        with pytest.raises(VerificationError, match="found NaN in what the model itself gives"):
            check_parity(nn.Identity(), path, (torch.tensor(numbers),))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.int64, TensorProto.INT64), (torch.bool, TensorProto.BOOL)], ids=["int64", "bool"]
)
def test_integers_and_booleans_are_compared_by_their_equal_entries(
    dtype: torch.dtype, kind: int, tmp_path: Path
) -> None:
    class Changed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1], ~x[:, 1:]], 1) if x.dtype == torch.bool else x + (x > 999)

    path = tmp_path / "identity.onnx"
    path.write_bytes(graph("Identity", kind, ["batch", 2]))
    inputs = (torch.tensor([[10000, 1], [10001, 0]]).to(dtype),)
    same, changed = check_parity(nn.Identity(), path, inputs), check_parity(Changed(), path, inputs)
    assert (same.passed, same.outputs[0].max_abs_difference, same.outputs[0].equal_share) == (True, 0.0, 1.0)
    assert (changed.passed, changed.outputs[0].max_abs_difference, changed.outputs[0].equal_share) == (False, 1.0, 0.5)
    assert changed.outputs[0].relative_error == 0.5


def test_a_tie_that_rounding_decides_is_no_fault_and_more_are(tmp_path: Path) -> None:
    class Flipped(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = count

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, : self.count] + 1, x[:, self.count :]], 1)

    path = tmp_path / "identity.onnx"
    path.write_bytes(graph("Identity", TensorProto.INT64, ["batch", 2000]))
    inputs = (torch.arange(4000).reshape(2, 2000),)
    assert [check_parity(Flipped(count), path, inputs).passed for count in (0, 1, 2, 3)] == [True, True, True, False]


def test_the_worst_output_is_named() -> None:
    outputs = tuple(OutputParity(f"output.{i}", e, e, 1e-3, e <= 1e-3) for i, e in enumerate((1e-9, 0.2, 0.7, 0.1)))
    with pytest.raises(VerificationError, match=r"output\.2.*0\.7"):
        require_parity(Parity(outputs, 1))


def test_a_fixed_batch_is_checked_on_as_many_examples_as_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "relu.onnx"
    path.write_bytes(graph("Relu", TensorProto.FLOAT, [2, 3]))
    assert OnnxModel(path).batch == 2
    parity = check_parity(nn.ReLU(), path, (torch.randn(5, 3),))
    assert (parity.passed, parity.inputs_checked) == (True, 2), "two at a time, twice"
    with pytest.raises(VerificationError, match=r"expected shape \(2, 3\), found \(1, 3\)"):
        check_parity(nn.ReLU(), path, (torch.randn(1, 3),))


def test_parity_of_other_outputs_is_an_error(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    path = tmp_path / "relu.onnx"
    path.write_bytes(graph("Relu", TensorProto.FLOAT, ["batch", 2]))
    with pytest.raises(VerificationError, match=r"expected outputs output\.0, output\.1; found output"):
        check_parity(Two(), path, (torch.randn(2, 2),))
    path.write_bytes(graph("Flatten", TensorProto.FLOAT, ["batch", 2], axis=0))
    with pytest.raises(VerificationError, match=r"expected shape \(2, 2\), found \(1, 4\)"):
        check_parity(nn.Identity(), path, (torch.randn(2, 2),))


def test_the_runtime_checks_its_inputs(exported: Path, tmp_path: Path) -> None:
    runtime = OnnxModel(exported.read_bytes())
    assert runtime.batch is None
    with pytest.raises(VerificationError, match="expected 1 inputs"):
        runtime(images(1), images(1))
    with pytest.raises(VerificationError, match=r"'input': expected shape \(batch, 3, 8, 8\), found \(1, 3, 8, 9\)"):
        runtime(torch.zeros(1, 3, 8, 9))
    with pytest.raises(VerificationError, match=r"expected shape .* found \(3, 8, 8\)"):
        runtime(torch.zeros(3, 8, 8))
    with pytest.raises(VerificationError, match=r"expected tensor\(float\), found torch\.float64"):
        runtime(images(1).double())
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(VerificationError, match=r"broken\.onnx: onnxruntime cannot open it"):
        OnnxModel(tmp_path / "broken.onnx")


def test_identical_models_have_exact_fidelity() -> None:
    fidelity = measure_fidelity(net().train(), net(), [(images(5),), (images(3),)])
    output = fidelity.outputs[0]
    assert (output.name, output.relative_error, output.top1_agreement, output.kl) == ("output", 0.0, 1.0, 0.0)
    assert fidelity.examples == 8


def test_fidelity_over_batches_is_that_of_all_examples_at_once() -> None:
    original, rewritten = net().eval(), copy.deepcopy(net()).eval()
    with torch.no_grad():
        rewritten.get_parameter("3.weight").mul_(-1)
    everything = torch.cat([images(5), images(3)])
    fidelity = measure_fidelity(original, rewritten, iter([(images(5),), (images(3),)])).outputs[0]
    with torch.no_grad():
        a, b = original(everything).double(), rewritten(everything).double()
    tolerance = 64 * torch.finfo(torch.float32).eps
    kl = nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean")
    assert fidelity.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=tolerance)
    assert fidelity.kl == pytest.approx(float(kl), rel=tolerance)
    assert fidelity.top1_agreement == float((a.argmax(1) == b.argmax(1)).double().mean())


def test_fidelity_of_onnx_against_torch_matches_outputs_by_name(exported: Path) -> None:
    output = measure_fidelity(net(), OnnxModel(exported), [(images(4),)]).outputs[0]
    assert output.relative_error < tolerance_for(torch.float32)
    assert output.top1_agreement == 1.0


def test_outputs_are_compared_by_name_and_scores_only_where_there_are_classes() -> None:
    def original(x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.mean((2, 3)), "map": x, "one": x.mean((1, 2, 3))[:, None], "ids": x.mean((2, 3)).argsort(1)}

    def turned(x: Tensor) -> dict[str, Tensor]:
        return dict(reversed(original(x).items()))

    outputs = measure_fidelity(original, turned, [(images(4),)]).outputs
    assert [output.name for output in outputs] == ["output.logits", "output.map", "output.one", "output.ids"]
    assert [output.relative_error for output in outputs] == [0.0] * 4
    assert [output.kl for output in outputs] == [0.0, None, None, None]
    assert [output.top1_agreement for output in outputs] == [1.0, None, None, None]


def test_verify_pairs_outputs_by_name_and_by_position_only_where_names_differ() -> None:
    def model(x: Tensor) -> dict[str, Tensor]:
        return {"heat": x, "depth": 2 * x.mean(1)}

    def turned(x: Tensor) -> dict[str, Tensor]:
        return dict(reversed(model(x).items()))

    def renamed(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x).values())

    assert verify(model, turned, images(2)).parity.passed
    assert verify(model, renamed, images(2)).parity.passed


def test_examples_are_counted_by_the_first_input_that_has_axes() -> None:
    def scaled_by(factor: Tensor, x: Tensor) -> Tensor:
        return x * factor

    inputs = (torch.tensor(2.0), images(3))
    assert verify(scaled_by, scaled_by, inputs).fidelity.examples == 3
    assert measure_fidelity(scaled_by, scaled_by, [inputs, inputs]).examples == 6


def test_indices_and_masks_have_the_share_of_equal_entries() -> None:
    def original(x: Tensor) -> dict[str, Any]:
        return {
            "ids": torch.tensor([[5, 900], [7, 8]]),
            "mask": x.mean((2, 3)) > 0,
            "loss": 0.5,
            "none": None,
            "name": "a",
        }

    def rewritten(x: Tensor) -> dict[str, Any]:
        return original(x) | {"ids": torch.tensor([[5, 1], [7, 8]])}

    fidelity = measure_fidelity(original, rewritten, [(images(2),), (images(2),)])
    ids, mask = fidelity.outputs
    assert (ids.equal_share, ids.relative_error, ids.top1_agreement, ids.kl) == (0.75, 0.25, None, None)
    assert (mask.equal_share, mask.relative_error) == (1.0, 0.0)
    assert fidelity.left_out == ("output.loss (float)", "output.name (str)")


def test_equal_infinities_are_equal() -> None:
    def masked(x: Tensor) -> Tensor:
        return x.masked_fill(x < 0, -math.inf)

    same = measure_fidelity(masked, masked, [(images(2),)]).outputs[0]
    half = measure_fidelity(masked, lambda x: masked(x) * 1.5, [(images(2),)]).outputs[0]
    other = measure_fidelity(masked, lambda x: x, [(images(2),)]).outputs[0]
    assert (same.relative_error, other.relative_error) == (0.0, math.inf)
    assert half.relative_error == pytest.approx(0.5, rel=1e-6)


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.flatten(1) * factor


def test_nan_and_zero_outputs_never_look_good() -> None:
    broken = measure_fidelity(scaled(1.0), scaled(math.nan), [(images(2),)]).outputs[0]
    assert (broken.relative_error, broken.kl) == (math.inf, math.inf)
    from_zero = measure_fidelity(scaled(0.0), scaled(1.0), [(images(2),)]).outputs[0]
    assert from_zero.relative_error == math.inf
    assert measure_fidelity(scaled(0.0), scaled(0.0), [(images(2),)]).outputs[0].relative_error == 0.0


def test_a_model_that_gives_nan_itself_is_told_and_not_its_file() -> None:
    running = RunningParity("onnxruntime", {"left": Meaning("ignore", "")})
    nan = torch.tensor([1.0, math.nan])
    running.add({"y": nan[:1], "left": nan}, {"y": nan[:1], "left": nan})
    with pytest.raises(VerificationError, match=r"'y': expected numbers .* found NaN in what the model itself gives"):
        running.add({"y": nan, "left": nan}, {"y": nan, "left": nan})
    running.add({"y": nan[:1], "left": nan}, {"y": nan[1:], "left": nan})
    assert not running.result().passed


def test_masked_classes_leave_kl_finite() -> None:
    def masked(x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), torch.full((x.shape[0], 1), -math.inf)], 1)

    output = measure_fidelity(masked, masked, [(images(2),)]).outputs[0]
    assert (output.kl, output.top1_agreement) == (0.0, 1.0)


def test_fidelity_refuses_other_shapes_other_names_and_no_batches() -> None:
    with pytest.raises(VerificationError, match=r"expected shape \(2, 192\), found \(2, 3\)"):
        measure_fidelity(scaled(1.0), lambda x: x.mean((2, 3)), [(images(2),)])
    with pytest.raises(VerificationError, match=r"expected outputs output; found output\.0"):
        measure_fidelity(scaled(1.0), lambda x: (x,), [(images(2),)])
    with pytest.raises(VerificationError, match="at least one batch"):
        measure_fidelity(scaled(1.0), scaled(1.0), [])


def test_a_model_that_works_in_place_does_not_spoil_the_other_ones_inputs() -> None:
    inputs = images(2)
    before = inputs.clone()
    output = measure_fidelity(nn.ReLU(inplace=True), nn.LeakyReLU(0.5), [(inputs,)]).outputs[0]
    assert output.relative_error > 0.1
    assert torch.equal(inputs, before)


def test_tolerances_tighten_with_precision() -> None:
    tolerances = [tolerance_for(dtype) for dtype in (torch.float64, torch.float32, torch.float16)]
    assert tolerances == sorted(tolerances)
    assert tolerance_for(torch.int64) == tolerance_for(torch.bool) == 1e-3
    assert tolerance_for(torch.bfloat16) == tolerance_for(torch.float16)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).double()


def test_outputs_that_are_only_converted_to_double_precision_are_no_more_precise(tmp_path: Path) -> None:
    path = export(Doubled(), (images(2),), tmp_path / "net.onnx").path
    output = check_parity(Doubled(), path, (images(2),)).outputs[0]
    assert output.passed
    assert output.tolerance == tolerance_for(torch.float32)
    assert verify(Doubled(), OnnxModel(path), images(2)).parity.passed
    assert tolerance_for(torch.float64, [images(2), images(2).double()]) == tolerance_for(torch.float64)


def test_outputs_whose_size_depends_on_their_numbers_are_refused() -> None:
    points = lambda x: x[x > 0]  # noqa: E731
    x = torch.tensor([[1.0, 2.0, -1.0]])
    why = r"expected shape \(2,\), found \(1,\).* give the part of the model that comes before"
    with pytest.raises(VerificationError, match=why):
        effect_of([({"output": points(x)}, {"output": points(-x)})], {"output": Meaning("values", "")})
    with pytest.raises(VerificationError, match=why):
        measure_fidelity(points, lambda y: points(-y), [(x,)])


def of_numbers(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor([numbers], dtype=dtype)


def test_a_difference_is_a_part_of_the_largest_element() -> None:
    found = output_parity("y", of_numbers(-8.0, 2.0, math.inf, 0.0), of_numbers(-8.0, 2.5, math.inf, 0.25))
    assert (found.max_abs_difference, found.relative_error, found.passed) == (0.5, 0.0625, False)
    least = output_parity("y", of_numbers(0.0), of_numbers(0.025), Meaning("multilabel", ""))
    assert (least.max_abs_difference, least.relative_error) == (pytest.approx(0.025), pytest.approx(0.5))
    limit = 2.0**-11
    assert [output_parity("y", of_numbers(1.0), of_numbers(1 + part * limit)).passed for part in (1, 1.5)] == [
        True,
        False,
    ]
    nothing = output_parity("y", torch.zeros(0), torch.zeros(0))
    assert (nothing.max_abs_difference, nothing.relative_error, nothing.passed) == (0.0, 0.0, True)


def test_of_a_single_example_whose_only_number_is_almost_zero_rounding_is_no_fault() -> None:
    few, one = (of_numbers(3.0, 0.001), of_numbers(3.0, 0.001001)), (of_numbers(0.001), of_numbers(0.001001))
    for batches in ([few, one], [one, few]):
        running = RunningParity("onnxruntime")
        for expected, found in batches:
            running.add({"y": expected}, {"y": found})
        (output,) = running.result().outputs
        assert output.passed and running.result().inputs_checked == 2
        assert output.max_abs_difference == pytest.approx(1e-6, rel=1e-3)
        assert output.relative_error == pytest.approx(1e-6 / 3, rel=1e-3)
    running.add({"y": few[0]}, {"y": few[0] * 1.01})
    (output,) = running.result().outputs
    assert (output.passed, output.relative_error) == (False, pytest.approx(0.01, rel=1e-3))


def test_outputs_between_0_and_1_have_a_least_scale_and_a_form_has_its_own_tolerance() -> None:
    given = {"p": of_numbers(0.0001), "y": of_numbers(0.0001), "n": torch.tensor([[1, 2]])}
    found = {"p": of_numbers(0.0002), "y": of_numbers(0.0002), "n": torch.tensor([[1, 3]])}
    running = RunningParity("half", {"p": Meaning("multilabel", "")}, tolerance=2.5)
    running.add(given, found)
    p, y, n = running.result().outputs
    assert (p.relative_error, y.relative_error) == (
        pytest.approx(0.0001 / 0.05, rel=1e-4),
        pytest.approx(1.0, rel=1e-4),
    )
    assert [(output.tolerance, output.passed) for output in (p, y, n)] == [(2.5, True), (2.5, True), (1e-3, False)]
    running.add({**given, "n": torch.tensor([[1, 2]])}, {**found, "n": torch.tensor([[1, 2]])})
    assert running.result().outputs[2].equal_share == 0.5, "of whole numbers the worst batch counts"
    assert {output.runtime for output in running.result().outputs} == {"half"}


def test_a_single_example_is_given_twice_as_well() -> None:
    assert [len(batch[0]) for batch in _parity_batches((images(1),), None)] == [1, 2]
    assert [len(batch[0]) for batch in _parity_batches((images(2),), None)] == [2, 1]
    assert [len(batch[0]) for batch in _parity_batches((images(5),), 2)] == [2, 2]


@pytest.mark.parametrize("arrays", [3, "ab", b"ab", {"a": 1}], ids=str)
def test_what_a_runtime_gives_is_a_list(arrays: Any) -> None:
    running = RunningParity("there")
    with pytest.raises(VerificationError, match="there: expected a list of 2 outputs, found "):
        running.add_arrays({"a": of_numbers(1.0), "b": of_numbers(1.0)}, arrays)
    with pytest.raises(VerificationError, match="there: expected 2 outputs, found 1; mend the runtime"):
        running.add_arrays({"a": of_numbers(1.0), "b": of_numbers(1.0)}, [[1.0]])
    with pytest.raises(VerificationError, match="output 'a': expected an array of numbers, found object"):
        running.add_arrays({"a": of_numbers(1.0)}, [object()])
    assert running.add_arrays({"a": of_numbers(1.0)}, [[[1.0]]])["a"].tolist() == [[1.0]]
    twice = running.add_arrays({"a": of_numbers(1.0)}, [[[1.0]], [[1.0]]], ("a", "a"))
    assert list(twice) == ["a"], "a graph may list an output twice"
    with pytest.raises(VerificationError, match="there: expected 1 outputs, found 0"):
        running.add_arrays({"a": of_numbers(1.0)}, [])
