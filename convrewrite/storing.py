"""The folder a run leaves: written aside and renamed, and read again.

``weights.safetensors`` holds the whole state of the rewritten model, so that its plan, these weights and any instance of
the original architecture give the model back without running code from a file.
"""

import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from convrewrite.applying import copy_model, empty_option, replace_site
from convrewrite.conv import ConvSpec, Kind, classify
from convrewrite.errors import ModelLoadError, PlanError, UsageError
from convrewrite.escaping import printable
from convrewrite.lifts import apply_lifts
from convrewrite.names import require_names
from convrewrite.observing import SITE_TYPES, spec_of
from convrewrite.planning import Plan, PlannedSite, planned_structure
from convrewrite.reporting import render_markdown
from convrewrite.reporting.html import render_html
from convrewrite.reporting.model import Report
from convrewrite.sites import BATCH_NORMS, Site
from convrewrite.structure import Option, Structure
from convrewrite.structures import discover

PLAN, WEIGHTS = "plan.json", "weights.safetensors"
FILES = ("model.pt", "model.onnx", PLAN, WEIGHTS, "report.json", "report.md", "report.html")


def check_writable(folder: Path) -> None:
    """Raise UsageError unless results can be put into ``folder``: called before any long work."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder for the results, found a file; name another with -o")
    strangers = sorted(p.name for p in folder.iterdir() if p.name not in FILES) if folder.is_dir() else []
    if strangers:
        raise UsageError(
            f"{folder}: holds {', '.join(strangers[:3])}, which would be lost; name a new folder, or an earlier result"
        )
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror}); name another folder with -o") from error


def check_file(path: Path) -> None:
    """Raise UsageError unless a plan can be written to ``path``: called before any long work."""
    if path.is_dir():
        raise UsageError(f"{path}: expected a file for the plan, found a folder; name one in it, as {path / PLAN}")
    parent = next(p for p in path.absolute().parents if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); name another file with -o") from error


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan aside and rename it. Raises UsageError when that fails."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(plan.to_json(), encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); name another file with -o") from error


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises PlanError for a file that is missing or holds something else."""
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path}: cannot be read as a plan ({error}); expected a file that `convrewrite plan` wrote"
        ) from error


def save(folder: Path, model: nn.Module, plan: Plan, report: Report, onnx: Path | None) -> Path:
    """Write everything into a folder beside ``folder`` and rename it; an earlier result there is replaced."""
    check_writable(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
    try:
        aside.chmod(0o755)
        _save_module(model, aside / "model.pt")
        save_model(model, str(aside / WEIGHTS))
        (aside / WEIGHTS).chmod(0o644)  # safetensors writes a file that only its owner can read
        if onnx is not None:
            for file in onnx.parent.glob(f"{onnx.name}*"):
                shutil.copy(file, aside / file.name)
        (aside / PLAN).write_text(plan.to_json(), encoding="utf-8")
        (aside / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (aside / "report.md").write_text(render_markdown(report), encoding="utf-8")
        (aside / "report.html").write_text(render_html(report), encoding="utf-8")
        _swap(aside, folder)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error}); name another folder with -o") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _save_module(model: nn.Module, path: Path) -> None:
    """The whole module; a class that cannot be pickled leaves its state dict, which needs its factory to be loaded."""
    try:
        torch.save(model, path)
    except Exception as error:  # a user's class may refuse in any way
        text = printable(f"the model cannot be pickled ({error}); model.pt holds its state dict")
        warnings.warn(text, stacklevel=2)
        torch.save(model.state_dict(), path)


def _swap(aside: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(aside, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-old-"))
    os.rename(folder, old / folder.name)
    os.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: str | Path, original_model: nn.Module, structures: tuple[Structure, ...] = ()) -> nn.Module:
    """The rewritten model from a result folder and an instance of the original architecture, with any weights.

    Raises PlanError when the folder's plan belongs to another architecture, ModelLoadError when files are missing or
    broken. ``original_model`` is not touched.
    """
    folder = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelLoadError(f"{folder / name}: missing; expected a folder written by `convrewrite optimize -o`")
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
    try:
        load_model(model, folder / WEIGHTS)
    except Exception as error:
        raise ModelLoadError(
            f"{folder / WEIGHTS}: does not fit the plan beside it: {' '.join(str(error).split())}"
        ) from error
    return model


def _planned(plan: Plan, model: nn.Module, known: Mapping[str, Structure]) -> list[tuple[Site, Option, Structure]]:
    """The sites that a plan rewrites in this model; raises PlanError where it says what the model or a structure has not."""
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
