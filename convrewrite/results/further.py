"""Files of a result besides those that every result has: int8, and other forms, all made of its model as it is."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from convrewrite.exports import file_names, kinds_of_exports
from convrewrite.folders import Scratch, put, resolved, write_errors
from convrewrite.reporting import Report
from convrewrite.results.digests import PLAN, require_described
from convrewrite.results.folder import INT8, ONNX, WEIGHTS, Result, copy_into, files_held, onnx_files

FOLDER = "kept"
"""The folder in the temporary files of a run where such files lie until the result is saved."""


def files_of(result: Result | Path) -> tuple[list[Path], list[Path]]:
    """The ONNX file of a result, or of a folder with one, with its weights beside it; and its further files. In a folder a pipe
    or a device counts as none: a copy of it would never end."""
    if isinstance(result, Result):
        onnx, further = files_held(result)
    else:
        onnx = result / ONNX
        further = [result / name for name in sorted({INT8, *file_names()}) if _is_content(result / name)]
    there = onnx is not None and _is_content(onnx)
    return [file for file in onnx_files(onnx) if _is_content(file)] if there else [], further


def _is_content(path: Path) -> bool:
    return path.is_file() or path.is_dir()


def kept(files: Sequence[Path], place: Path) -> list[Path]:
    """Copies of such files in a folder below ``place``. Raises UsageError where there is no room for them."""
    found = [place / FOLDER / file.name for file in files]
    with write_errors():
        (place / FOLDER).mkdir()
        copy_into(place / FOLDER, files)
    return found


def left_out(files: Sequence[Path]) -> list[str]:
    """A note that such files no longer match the model, with the commands that make them again; nothing where there are no such
    files."""
    names = {file.name for file in files}
    forms = [name for name, export in kinds_of_exports().items() if not names.isdisjoint(export.files)]
    commands = [f"convrewrite export OUT {' '.join(f'--to {name}' for name in forms)} --calib PATH"] if forms else []
    commands += ["convrewrite quantise OUT --calib PATH"] if INT8 in names else []
    if not commands:
        return []
    made = " and ".join(f"`{command}`" for command in commands)
    verb = "are" if len(names) > 1 else "is"
    return [
        f"{', '.join(sorted(names))} of the result before {verb} left out, as the model is another now; make anew by {made}"
    ]


def add_int8(folder: Path, report: Report, made: Path) -> None:
    """Put a copy of an int8 file into a result's folder. Raises UsageError where that fails, ModelLoadError where another run has
    replaced the result that ``report`` describes.

    A scratch folder lies in it for this moment alone: meanwhile no run that comes to its end could replace the folder.
    """
    with write_errors(folder, "another folder"):
        place = resolved(folder) / INT8  # a link of that name may lead anywhere, and is replaced itself
        with Scratch(place.parent) as scratch:
            shutil.copyfile(made, scratch.path / INT8)
            require_described(folder, report, (PLAN, WEIGHTS, ONNX))
            put(scratch.path / INT8, place, scratch)
