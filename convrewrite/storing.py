"""The folder a run leaves: written aside and renamed, and read again.

``weights.safetensors`` holds the whole state of the rewritten model, so that its plan, these weights and any instance of
the original architecture give the model back without running code from a file.
"""

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from convrewrite.applying import empty_option, replace_site
from convrewrite.conv import Kind
from convrewrite.copying import copy_model
from convrewrite.errors import ModelLoadError, PlanError, UsageError
from convrewrite.lifts import apply_lifts
from convrewrite.observing import SITE_TYPES, spec_of
from convrewrite.planning import Plan, PlannedSite
from convrewrite.reporting import render_markdown
from convrewrite.reporting.html import render_html
from convrewrite.reporting.model import Report
from convrewrite.sites import Site
from convrewrite.structure import Structure
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
        warnings.warn(f"the model cannot be pickled ({error}); model.pt holds its state dict", stacklevel=2)
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
    plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"), str(folder / PLAN))
    plan.require_model(original_model, weights=False)
    known = discover() | {structure.name: structure for structure in structures}
    model = apply_lifts(original_model, plan.lifted) if plan.lifted else copy_model(original_model)
    for planned in plan.sites:
        if planned.option is not None:
            _put_empty(model, planned, known)
    try:
        load_model(model, folder / WEIGHTS)
    except Exception as error:
        raise ModelLoadError(f"{folder / WEIGHTS}: does not fit the plan beside it: {error}") from error
    return model


def _put_empty(model: nn.Module, planned: PlannedSite, known: dict[str, Structure]) -> None:
    assert planned.option is not None
    if planned.option.structure not in known:
        raise PlanError(f"{planned.name}: structure {planned.option.structure!r} is not known; install or pass it")
    conv = dict(model.named_modules()).get(planned.name)
    if not isinstance(conv, SITE_TYPES):
        found = "nothing of this name" if conv is None else type(conv).__name__
        raise PlanError(f"{planned.name}: expected a convolution where the plan rewrites one, found {found}")
    site = Site(planned.name, Kind(planned.kind), spec_of(conv), (), planned.batch_norm)
    option = planned.option.option()
    stages = known[option.structure].stages(site.spec.per_group, option.parameters)
    replace_site(model, site, empty_option(site.folded_spec, stages, option, conv.weight))
