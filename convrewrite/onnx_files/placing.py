"""Puts an ONNX file in its place, together with the second one that holds its weights where there is one.

Two files cannot be replaced in one step. So the weights get a new name every time, and are in the folder before the ONNX file
that names them replaces the earlier one: at every moment the ONNX file there finds the weights it was written with.
"""

import os
import re
import secrets
from pathlib import Path

from convrewrite.interrupts import held
from convrewrite.machine import permit_alike
from convrewrite.onnx_files.contents import files_beside

WEIGHTS = re.compile(r"(?P<model>.+)\.[0-9a-f]{8}\.data")
"""Names of files of weights; ``model`` is the ONNX file that they were written with."""


def new_name_of_weights(draft: Path) -> str:
    """A name that no other file of weights has."""
    return f"{draft.name}.{secrets.token_hex(4)}.data"


def size_of(path: Path) -> int:
    """Bytes of an ONNX file and of the files in which it says that weights lie, whoever wrote and named them."""
    return sum(file.stat().st_size for file in {path, *files_beside(path), *_weights_of(path)})


def place(draft: Path, path: Path) -> None:
    """Put ``draft``, which is alone in its folder with its weights, in the place ``path``; weights of earlier files are removed.

    Both lie on one file system, and have one name. Who may read the file stays as it was. Where it raises OSError, the earlier
    file is still there, whole.
    """
    new = _weights_of(draft)
    for file in (draft, *new):
        permit_alike(file, path)
    with held():
        for file in new:
            os.replace(file, path.parent / file.name)
        try:
            os.replace(draft, path)
        except BaseException:
            for file in new:
                (path.parent / file.name).unlink()
            raise
        names = {file.name for file in new}
        for file in _weights_of(path):
            if file.name not in names:
                file.unlink(missing_ok=True)


def is_weights_of(name: str, model: str) -> bool:
    """Whether a file of this name holds weights that were written with an ONNX file called ``model``."""
    found = WEIGHTS.fullmatch(name)
    return found is not None and found["model"] == model


def _weights_of(path: Path) -> list[Path]:
    return [file for file in path.parent.iterdir() if is_weights_of(file.name, path.name)]
