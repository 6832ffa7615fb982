"""How two models that are compared are related, and what is expected of them for that."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import images, small_network
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from convrewrite import runtime, verify
from convrewrite.errors import UsageError
from convrewrite.meanings import Meaning
from convrewrite.onnx_files import OnnxModel, Provenance, digest_of, mark_form
from convrewrite.pipeline import comparing
from convrewrite.pipeline.relations import relation_of
from convrewrite.planning import Fingerprint
from convrewrite.runtime.comparison import _along_its_axis

NAMES = ("a", "b")
MODULE = nn.Linear(2, 2)
OWN = str(Fingerprint.of(MODULE))
SAID = r"^b is a rewritten model \(convrewrite 9\.9\)"


def serialized(original: str = "", result: str = "", form: str = "", quantised: bool = False, file: str = "") -> bytes:
    """A file that says that it was rewritten, or without arguments nothing."""
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    made = helper.make_model(
        helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", entries[:1], entries[1:]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    if original or result:
        helper.set_model_props(made, Provenance(original, result, "9.9", file=file).metadata())
    if quantised:
        made.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
    if form:
        mark_form(made, form)
    return bytes(made.SerializeToString())


def file(original: str = "", result: str = "", form: str = "", quantised: bool = False) -> OnnxModel:
    """The same, opened."""
    return OnnxModel(serialized(original, result, form, quantised))


PLAIN, RESULT, INT8, HALF = file(), file("o", OWN), file("o", OWN, "int8"), file("o", OWN, "half")


@pytest.mark.parametrize(("pair", "expected", "note"), [
    ((MODULE, PLAIN), "parity", None),
    ((PLAIN, PLAIN), "fidelity", None),
    ((MODULE, nn.Linear(2, 2)), "fidelity", None),
    ((MODULE, RESULT), "parity", f"{SAID}, and a holds the same weights$"),
    ((MODULE, file(OWN, "r")), "fidelity", f"{SAID}, made from a: it approximates it, fidelity is what counts$"),
    ((MODULE, INT8), "fidelity", f"{SAID} in int8, and a holds its weights as they were: it approximates these"),
    ((MODULE, HALF), "fidelity", f"{SAID} in half precision, and a holds its weights as they were"),
    ((MODULE, file("o", OWN, quantised=True)), "fidelity", f"{SAID} in int8, and a holds"),
    ((PLAIN, RESULT), "fidelity", f"{SAID}: it approximates its original, fidelity is what counts$"),
    ((RESULT, file("o", OWN)), "parity", "^a and b are the same rewritten model$"),
    ((RESULT, INT8), "fidelity", "^a and b are the same rewritten model, in full precision and in int8: fidelity is"),
    ((INT8, INT8), "fidelity", "^a and b are the same rewritten model, in int8 and in int8: fidelity is what counts$"),
    ((RESULT, file("o", "r")), "fidelity", "^a and b are rewritten from the same model$"),
])  # fmt: skip
def test_what_is_expected(pair: tuple[object, object], expected: str, note: str | None) -> None:
    relation = relation_of(*pair, NAMES)
    assert (relation.expected, relation.stranger) == (expected, None)
    assert relation.note is None if note is None else re.search(note, str(relation.note))


def test_models_that_were_rewritten_from_others_are_strangers() -> None:
    for pair, name in (((MODULE, file("o", "r")), "b"), ((file("o", "r"), MODULE), "a")):
        relation = relation_of(*pair, NAMES)
        assert relation.expected == "fidelity" and str(relation.stranger).startswith(
            f"{name}: was rewritten from another"
        )
    two = relation_of(RESULT, file("p", "r"), NAMES)
    assert str(two.stranger).startswith("b: was rewritten from another model than a")


def test_a_result_of_a_result_is_known_by_the_file_or_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "first.onnx"
    path.write_bytes(serialized("o", "r"))
    for second in (OnnxModel(serialized("s", "t", file=digest_of(path))), file("r", "t")):
        for pair, said in (((OnnxModel(path), second), "b is"), ((second, OnnxModel(path)), "a is")):
            relation = relation_of(*pair, NAMES)
            assert relation.stranger is None and relation.expected == "fidelity"
            assert str(relation.note).startswith(said) and "made from" in str(relation.note)
    assert relation_of(OnnxModel(path), OnnxModel(serialized("s", "t", file="0" * 64)), NAMES).stranger is not None


def test_weights_beside_a_file_tell_it_from_another(tmp_path: Path) -> None:
    path, weights = tmp_path / "net.onnx", tmp_path / "net.data"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    add, one = helper.make_node("Add", ["x", "w"], ["y"]), numpy_helper.from_array(np.ones(1, np.float32), "w")
    made = helper.make_model(
        helper.make_graph([add], "g", [x], [y], [one]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.save(made, str(path), save_as_external_data=True, location=weights.name, size_threshold=0)
    newer = OnnxModel(serialized("o", "r", file=Provenance.digest_of_source(path, [weights])))
    older = OnnxModel(serialized("o", "r", file=digest_of(path)))
    assert str(relation_of(OnnxModel(path), newer, NAMES).note).endswith("fidelity is what counts")
    weights.write_bytes(weights.read_bytes()[::-1])
    assert "b: was rewritten from another model than a" in str(relation_of(OnnxModel(path), newer, NAMES).stranger)
    relation = relation_of(OnnxModel(path), older, NAMES)
    assert relation.stranger is None and "made from a" in str(relation.note)
    assert "the weights beside a were not compared" in str(relation.note)


def test_a_form_is_said_once_and_only_of_rewritten_files() -> None:
    made = onnx.ModelProto()
    mark_form(made, "int8")
    assert not made.metadata_props
    helper.set_model_props(made, Provenance("o", "r", "9.9").metadata())
    mark_form(made, "half")
    mark_form(made, "int8")
    found = {entry.key: entry.value for entry in made.metadata_props}
    assert len(made.metadata_props) == len(found)
    assert Provenance.of(found) == Provenance("o", "r", "9.9", form="int8")
    assert Provenance.of(found | {"convrewrite.form": "pure gold"}) == Provenance("o", "r", "9.9")


@pytest.mark.parametrize("source", [{"convrewrite.form": "half"}, {"onnx.infer": "onnxruntime.quant"}])
def test_a_result_has_not_the_form_of_the_file_that_it_is_made_of(source: dict[str, str]) -> None:
    made = onnx.ModelProto()
    helper.set_model_props(made, {"convrewrite.rewritten": "true", **source})
    Provenance.restate(made, Provenance("o", "r", "9.9").metadata())
    assert Provenance.of({entry.key: entry.value for entry in made.metadata_props}) == Provenance("o", "r", "9.9")


def test_what_verify_is_asked_reaches_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def related(_first: object, _second: object, names: tuple[str, str]) -> None:
        asked.append(names)

    def compared(*_given: object, outputs: dict[str, object], representative: bool) -> None:
        asked.extend((list(outputs), representative))
        raise UsageError("not here")

    monkeypatch.setattr(comparing, "relation_of", related)
    monkeypatch.setattr(runtime, "verify", compared)
    said = {"outputs": {"output": "values"}, "representative": False, "names": ("one", "other")}
    with pytest.raises(UsageError, match="not here"):
        verify(small_network(), small_network(), images(1), **said)  # type: ignore[arg-type]
    assert asked == [("one", "other"), ["output"], False]


def test_two_files_are_compared_along_the_axis_of_classes_that_one_of_them_says() -> None:
    """A file does not tell what gave an output: of a classifier of tokens the classes are along the last axis."""
    metadata = Provenance("o", "r", "9.9", {"y": Meaning("logits", "", axis=-1)}).metadata()
    written = Provenance.of(metadata)
    assert written is not None and written.outputs["y"].axis == -1
    told, tokens = Meaning("logits", "looks"), torch.zeros(2, 4, 3)
    assert _along_its_axis(told, written.outputs["y"], tokens).axis == -1
    for text in ('{"y": "2"}', '{"y": true}', "[", '{"y": 7}', '{"y": 0}'):
        strange = Provenance.of(metadata | {"convrewrite.axes": text})
        assert strange is not None and _along_its_axis(told, strange.outputs["y"], tokens) == told
