"""Code that the user named: importing it, and raising its failures as errors of this package."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from convrewrite.errors import ModelLoadError, UsageError
from convrewrite.escaping import summary
from convrewrite.loading.checkpoints import listed

ZOOS = ("torchvision", "timm")

IMPORTED = "__convrewrite_imported__"
"""Attribute of a module that was imported here: the digest of its file."""


def import_object(target: str) -> Any:
    """What ``FILE.py:NAME`` or ``pkg.mod:NAME`` names; raises ModelLoadError, listing the names that do exist."""
    where, name = split_target(target)
    module = named_module(where)
    require_name(module, target)
    return getattr(module, name)


def require_name(module: ModuleType, target: str) -> None:
    """Raise ModelLoadError, listing the names that do exist, unless the module has what a target names."""
    where, name = split_target(target)
    if not hasattr(module, name):
        existing = sorted(n for n, v in vars(module).items() if not n.startswith("_") and not isinstance(v, ModuleType))
        found = listed(existing) if existing else "nothing"
        raise ModelLoadError(f"{target}: expected {name} in {where}, found only {found}; name one that is there")


def is_target(text: str) -> bool:
    """Whether a text has the form ``FILE.py:NAME`` or ``pkg.mod:NAME``."""
    where, _, name = text.rpartition(":")
    return bool(where) and name.isidentifier()


def is_program(text: str) -> bool:
    """Whether a text that has this form names no file of a model by it."""
    return is_target(text) and not os.path.exists(text)


def split_target(target: str) -> tuple[str, str]:
    """Where an object is, and its name. Raises UsageError for another form."""
    where, _, name = target.rpartition(":")
    if not is_target(target):
        raise UsageError(f"{target}: expected FILE.py:NAME or pkg.mod:NAME")
    return where, name


def named_module(where: str) -> ModuleType:
    """The module that a file or a dotted name stands for. Raises ModelLoadError."""
    with user_code(where, where):
        if where.endswith(".py"):
            return _import_file(Path(where).resolve())
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not (where + ".").startswith(error.name + "."):
                raise
            package = where.partition(".")[0]
            advice = f"pip install {package}" if package in ZOOS else "check the name"
            raise ModelLoadError(f"{where}: cannot be imported, {error.name} is not installed; {advice}") from error


def _import_file(path: Path) -> ModuleType:
    """Import a file, under its stem if that is free, so that pickles find what they name by that stem. A file that was imported
    before is imported again only if it was changed since, as in a notebook."""
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file; expected FILE.py:NAME")
    name = path.stem
    if name in sys.stdlib_module_names or not _is_free(name, path):
        name = f"{name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if name in sys.modules and getattr(sys.modules[name], IMPORTED, digest) == digest:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    setattr(module, IMPORTED, digest)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_free(name: str, path: Path) -> bool:
    """Whether no other file is imported under this name."""
    if name not in sys.modules:
        return True
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and Path(file).resolve() == path


@contextmanager
def user_code(where: str, what: str) -> Iterator[None]:
    """Run code that the user named, with the modules beside it importable, and raise its failures as ModelLoadError."""
    is_file = where.endswith(".py")
    entry = str(Path(where).resolve().parent if is_file else Path.cwd())
    # A file's own folder comes first, as for a script; the working folder comes last, lest it hide what is installed.
    added = is_file or (entry not in sys.path and where.partition(".")[0] not in ZOOS)
    if added:
        importlib.invalidate_caches()
        sys.path.insert(0 if is_file else len(sys.path), entry)
    try:
        yield
    except ModelLoadError:
        raise
    except (Exception, SystemExit) as error:  # user code can fail in any way, and scripts without a guard exit
        raise ModelLoadError(
            f"{what}: expected code that imports and runs without arguments, found {summary(error)}; "
            "correct it, or name a callable that takes no arguments"
        ) from error
    finally:
        if added:
            with suppress(ValueError):
                sys.path.remove(entry)
