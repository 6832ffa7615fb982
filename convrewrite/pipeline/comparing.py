"""Any two models side by side, each a module or an ONNX file: what of them can be compared, and how they are related."""

from pathlib import Path

from torch import nn

from convrewrite import runtime
from convrewrite.errors import UsageError
from convrewrite.inputs import ExampleInput, Inputs, moved
from convrewrite.meanings import WantedOutputs
from convrewrite.modules import copy_model, put_on
from convrewrite.onnx_files import OnnxModel, Runner, inputs_of
from convrewrite.onnx_graph import comparable
from convrewrite.pipeline.relations import Relation, relation_of
from convrewrite.pipeline.workplace import HOME
from convrewrite.places import place_of_model
from convrewrite.runtime import Verification
from convrewrite.settings import Settings
from convrewrite.values import PROBE_SECONDS


def verify(
    a: Runner | str | Path,
    b: Runner | str | Path,
    inputs: ExampleInput,
    *,
    outputs: WantedOutputs | None = None,
    representative: bool = True,
    timeout: float = PROBE_SECONDS,
    names: tuple[str, str] | None = None,
) -> Verification:
    """Compare any two models, each a module or the path of an ONNX file; ``a`` counts as the original.

    If both are files that choose detections, for example by NonMaxSuppression, what they choose from is compared. ``timeout``:
    seconds that a file may take to open, and again to run once, in a process of its own. ``names``: what notes call the two; by
    default their paths or the types of modules. The rest is as in :func:`convrewrite.runtime.verify`, including what it raises;
    also raises ModelLoadError for files that cannot be opened, or do not end.
    """
    for model in (a, b):
        if isinstance(model, type) or not (callable(model) or isinstance(model, str | Path)):
            what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
            raise UsageError(f"verify: expected two modules or paths of ONNX files, found {what} as one of them")
    asked = Settings(outputs=outputs, timeout=timeout)  # which checks them
    first, second = (_opened(model, asked.timeout) for model in (a, b))
    batch = moved(inputs_of((first, second), inputs), HOME)
    called = names or (_name(first), _name(second))
    found, _ = verify_related(first, second, batch, called, outputs=asked.outputs, representative=representative)
    return found


def verify_related(
    first: Runner, second: Runner, inputs: Inputs, names: tuple[str, str], *,
    outputs: WantedOutputs | None, representative: bool,
) -> tuple[Verification, Relation]:  # fmt: skip
    """:func:`verify` of two models that are opened, on the processor; also how they are related."""
    relation = relation_of(first, second, names)
    first, second, compared = _comparable(first, second, inputs)
    found = runtime.verify(first, second, inputs, outputs=outputs, representative=representative)
    return Verification(found.parity, found.fidelity, tuple(filter(None, (compared, relation.note)))), relation


def _opened(model: Runner | str | Path, timeout: float) -> Runner:
    """The model, ready to run on the processor: a module that lies elsewhere is copied there."""
    if isinstance(model, str | Path):
        return OnnxModel(Path(model), probe=timeout)
    if isinstance(model, nn.Module) and place_of_model(model) != HOME:
        return put_on(HOME, copy_model(model))
    return model


def _name(runner: Runner) -> str:
    return runner.where if isinstance(runner, OnnxModel) else type(runner).__name__


def _comparable(first: Runner, second: Runner, inputs: Inputs) -> tuple[Runner, Runner, str | None]:
    """Two models in a form that can be compared, and a note on it: for two ONNX files that choose detections, what they choose
    from."""
    if not (isinstance(first, OnnxModel) and isinstance(second, OnnxModel)):
        return first, second, None
    if not all(Path(runner.where).is_file() for runner in (first, second)):
        return first, second, None  # the graph of a model that was opened from memory is not known any more
    for runner in (first, second):
        runner.in_parts(inputs)  # in a process of its own first, as it may not end
    found = comparable((first, second), inputs)
    return (first, second, None) if found is None else found
