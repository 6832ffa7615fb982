"""What lies in a result's folder, read again: its plan, its report, and the rewritten model, without running code from a file."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from convrewrite.conv import ConvSpec, Kind, classify
from convrewrite.errors import ModelLoadError, PlanError, UsageError
from convrewrite.escaping import one_line
from convrewrite.folders import given_path, read_text
from convrewrite.graph import BATCH_NORMS, SITE_TYPES, Site, apply_lifts, spec_of
from convrewrite.modules import copy_model
from convrewrite.names import require_names
from convrewrite.onnx_graph import is_graph, take_numbers
from convrewrite.planning import Plan, PlannedSite, planned_structure
from convrewrite.records import first_fault
from convrewrite.reporting import Report
from convrewrite.results.digests import PLAN, REPORT, require_reported
from convrewrite.results.folder import ONNX, WEIGHTS
from convrewrite.results.weights import read_weights, warn_of
from convrewrite.rewriting import empty_option, replace_site
from convrewrite.state import unmade_part
from convrewrite.structures import Option, Structure, discover
from convrewrite.values import shown


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises PlanError for a file that is missing or holds something else."""
    if os.path.isfile(path / PLAN):  # unlike the method of a path, it takes any name
        raise PlanError(f"{path}: expected a plan, found the folder of a result; name the plan in it, {path / PLAN}")
    if path.name == REPORT and os.path.isfile(path.parent / PLAN):
        raise PlanError(f"{path}: expected a plan, found a report; name the plan beside it, {path.parent / PLAN}")
    return Plan.from_json(read_text(path, PlanError, "a plan that `convrewrite plan` wrote"), str(path))


def read_report(folder: Path) -> Report:
    """The report of the result in a folder. Raises ModelLoadError for one that is missing or is something else."""
    if os.path.isfile(folder):
        raise ModelLoadError(
            f"{folder}: expected the folder of a result, found a file; name the folder that `convrewrite optimize` wrote"
        )
    path = folder / REPORT
    text = read_text(path, ModelLoadError, "a report that `convrewrite optimize` wrote")
    try:
        return Report.read(text)
    except ValueError as error:
        raise ModelLoadError(f"{path}: {first_fault(error)}; expected a report written by this tool") from error


def load(folder: str | Path, original_model: nn.Module, structures: Sequence[Structure] = ()) -> nn.Module:
    """The rewritten model from a result folder and an instance of the original architecture, with any weights.

    Raises PlanError when the folder's plan belongs to another architecture, ModelLoadError when files are missing, broken, or
    not those that its report describes, and for an instance without memory. ``original_model`` is not touched; state that no
    weights.safetensors can hold is taken from it, with a warning.
    """
    folder = given_path(folder)
    if not isinstance(original_model, nn.Module):
        found = type(original_model).__name__
        raise UsageError(f"expected an instance of the original model, found {found}; make one, with any weights")
    _require_structures(structures)
    _require_memory(original_model)
    graph = is_graph(original_model)
    if os.path.isfile(folder / ONNX) and (folder / PLAN).is_file() and not (folder / WEIGHTS).exists() and not graph:
        raise ModelLoadError(
            f"{folder}: expected the result of a module, found that of an ONNX model, which has no weights of modules; use "
            f"{folder / ONNX}, or carry {PLAN} out again with convrewrite.apply"
        )
    for name in (PLAN, ONNX if graph else WEIGHTS):
        if not os.path.isfile(folder / name):
            raise ModelLoadError(f"{folder / name}: missing; expected a folder written by `convrewrite optimize -o`")
    require_reported(folder, (PLAN, ONNX if graph else WEIGHTS))
    plan = read_plan(folder / PLAN)
    require_names(original_model, type(original_model).__name__)
    plan.require_model(original_model, weights=False)
    known = discover() | {structure.name: structure for structure in structures}
    model = apply_lifts(original_model, plan.lifted) if plan.lifted else copy_model(original_model)
    for site, option, structure in _planned(plan, model, known):
        stages = structure.stages(site.spec.per_group, option.parameters)
        weight = model.get_submodule(site.name).weight
        assert isinstance(weight, Tensor)
        replace_site(model, site, empty_option(site.folded_spec, stages, option, weight))
    if graph:
        take_numbers(model, folder / ONNX)
        return model
    try:
        left = read_weights(model, folder / WEIGHTS)
    except Exception as error:
        raise ModelLoadError(f"{folder / WEIGHTS}: does not fit the plan beside it: {one_line(error)}") from error
    warn_of(left)
    return model


def _require_structures(structures: object) -> None:
    """Raise UsageError for anything else, as a caller in Python may give anything."""
    if not isinstance(structures, Sequence) or not all(hasattr(one, "stages") for one in structures):
        raise UsageError(
            f"structures: expected structures, as convrewrite.structures.discover() gives them, found {shown(structures)}"
        )


def _require_memory(model: nn.Module) -> None:
    unmade = unmade_part(model)
    if unmade:
        raise ModelLoadError(
            f"{type(model).__name__}: expected an instance whose layers have their sizes, found {unmade}, a lazy module that "
            "gets them in its first run; run the model once before, or take out a part that never runs"
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ModelLoadError(
                f"{type(model).__name__}: expected an instance with memory for its weights, found {name} on the meta "
                "device; make it on the processor, or call model.to_empty(device='cpu') before"
            )


def _planned(plan: Plan, model: nn.Module, known: Mapping[str, Structure]) -> list[tuple[Site, Option, Structure]]:
    """The sites that a plan rewrites in this model; raises PlanError where it names what the model or a structure does not
    have."""
    modules, norms = dict(model.named_modules()), Counter(site.batch_norm for site in plan.sites if site.option)
    found: list[tuple[Site, Option, Structure]] = []
    for planned in plan.sites:
        conv = modules.get(planned.name)
        if planned.option is None and not isinstance(conv, SITE_TYPES):
            continue  # a functional convolution that stayed one
        if not isinstance(conv, SITE_TYPES):
            what = "nothing of this name" if conv is None else type(conv).__name__
            raise PlanError(f"{planned.name}: expected a convolution where the plan rewrites one, found {what}")
        spec = spec_of(conv)
        if spec.describe() != planned.geometry or planned.kind not in (classify(spec), Kind.SEPARABLE):
            raise PlanError(
                f"{planned.name}: the plan says {planned.kind} {planned.geometry}, the model has {classify(spec)} "
                f"{spec.describe()}; give the original model the plan was made from"
            )
        if planned.option is None:
            continue
        if planned.batch_norm is not None:
            _require_batch_norm(planned, spec, modules.get(planned.batch_norm), norms[planned.batch_norm])
        site = Site(planned.name, planned.kind, spec, (), planned.batch_norm)
        structure = planned_structure(planned.name, planned.option, site.folded_spec, known)
        found.append((site, planned.option.option(), structure))
    return found


def _require_batch_norm(planned: PlannedSite, spec: ConvSpec, norm: nn.Module | None, times: int) -> None:
    """Raise PlanError unless this can be the BatchNorm that was folded into the site, and into no other one."""
    fits = type(norm) is BATCH_NORMS.get(spec.dims) and getattr(norm, "num_features", 0) == spec.out_channels
    if not fits or times > 1:
        found = (
            "nothing of this name" if norm is None else "one that another site has too" if fits else type(norm).__name__
        )
        raise PlanError(
            f"{planned.name}: expected a BatchNorm of {spec.out_channels} channels called {planned.batch_norm!r}, found "
            f"{found}; give the original model the plan was made from"
        )
