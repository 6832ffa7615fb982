"""What a rewritten ONNX file says of itself in its metadata: of which model it is an approximation, and what its outputs mean."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convrewrite.errors import UsageError
from convrewrite.json_texts import each_key_once
from convrewrite.meanings import Meaning, asked_meanings
from convrewrite.onnx_files.contents import files_beside

if TYPE_CHECKING:
    import onnx

PREFIX = "convrewrite."
AND_WEIGHTS = "+"
VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}")
WRITTEN = "as the file's metadata has it"
FORMS = {"int8": "int8", "half": "half precision"}
"""Forms in which a file made of a rewritten one has its numbers, and how sentences call them."""

QUANTISED = ("onnx.infer", "onnxruntime.quant")
"""The entry that onnxruntime's quantiser leaves in the metadata of a file, whoever ran it."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Fingerprints of the original's and of the rewritten weights, the version of this tool, the outputs' meanings, and where the
    original was an ONNX file the digest of that, as :meth:`digest_of_source` gives it. ``form``: one of FORMS, where the file
    only approximates the rewritten weights."""

    original: str
    result: str
    tool_version: str
    outputs: Mapping[str, Meaning] = field(default_factory=dict)
    file: str = ""
    form: str = ""

    @property
    def precision(self) -> str:
        """In what the file has its numbers."""
        return FORMS.get(self.form, "full precision")

    def metadata(self) -> dict[str, str]:
        """The entries of ``metadata_props``."""
        outputs = {name: [meaning.kind, meaning.weight] for name, meaning in self.outputs.items()}
        entries = {
            "rewritten": "true",
            "original": self.original,
            "result": self.result,
            "version": self.tool_version,
            "outputs": json.dumps(outputs),
        }
        axes = {name: meaning.axis for name, meaning in self.outputs.items() if meaning.axis != 1}
        entries |= {"axes": json.dumps(axes)} if axes else {}
        file, _, weights = self.file.partition(AND_WEIGHTS)
        entries |= {name: text for name, text in (("file", file), ("weights", weights)) if text}
        return {PREFIX + name: value for name, value in entries.items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Provenance | None":
        """What a file's metadata says; None where it is no rewritten file."""
        if metadata.get(PREFIX + "rewritten") != "true":
            return None
        original, result, version, outputs, file, weights = (
            metadata.get(PREFIX + name, "") for name in ("original", "result", "version", "outputs", "file", "weights")
        )
        file = AND_WEIGHTS.join(filter(None, (file, weights)))
        version = version if VERSION.fullmatch(version) else "of unknown version"
        meanings = _meanings(outputs, metadata.get(PREFIX + "axes", ""))
        return cls(original, result, version, meanings, file, _form(metadata))

    @staticmethod
    def digest_of_source(path: Path, beside: Iterable[Path]) -> str:
        """The SHA-256 of an ONNX file and, behind AND_WEIGHTS, that of the files ``beside`` it with weights, if any."""
        weights = _digest_of_all(beside)
        return f"{digest_of(path)}{AND_WEIGHTS}{weights}" if weights else digest_of(path)

    def is_made_of(self, path: Path) -> bool:
        """Whether this is the file that the result was made from, as far as the result says."""
        file, _, weights = self.file.partition(AND_WEIGHTS)
        return digest_of(path) == file and (not weights or _digest_of_all(files_beside(path)) == weights)

    def leaves_open(self, path: Path) -> bool:
        """Whether that was decided without the weights: results of earlier versions do not say what lay beside the file."""
        return AND_WEIGHTS not in self.file and bool(files_beside(path))

    @staticmethod
    def restate(model: "onnx.ModelProto", metadata: Mapping[str, str]) -> None:
        """Put ``metadata`` in the place of entries of its keys, and of all that a rewritten file, if the model came from one,
        said of itself. Numbers that a quantiser left in the model are no form of the new weights."""
        quantised = any((entry.key, entry.value) == QUANTISED for entry in model.metadata_props)
        said = {**metadata, PREFIX + "form": ""} if quantised and metadata else metadata
        for entry in [one for one in model.metadata_props if one.key in said or one.key.startswith(PREFIX)]:
            model.metadata_props.remove(entry)
        for key, value in said.items():
            model.metadata_props.add(key=key, value=value)


def mark_form(model: "onnx.ModelProto", form: str) -> None:
    """Say in what form a file has the numbers of the rewritten one that it was made of; one of FORMS."""
    known = {entry.key: entry for entry in model.metadata_props}
    if PREFIX + "rewritten" in known:
        entry = known.get(PREFIX + "form")
        entry = model.metadata_props.add(key=PREFIX + "form") if entry is None else entry
        entry.value = form


def _form(metadata: Mapping[str, str]) -> str:
    form = metadata.get(PREFIX + "form", "int8" if metadata.get(QUANTISED[0]) == QUANTISED[1] else "")
    return form if form in FORMS else ""


def digest_of(path: Path) -> str:
    """The SHA-256 of an ONNX file; weights that lie in other files are not looked at."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_all(files: Iterable[Path]) -> str:
    """One SHA-256 for several files, in the order of their names; empty where there are none."""
    digests = [digest_of(file) for file in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def _meanings(text: str, axes: str) -> dict[str, Meaning]:
    """What can be read of the outputs' meanings: the file may have been changed since."""
    found: dict[str, Meaning] = {}
    known = _entries(axes)
    for name, entry in _entries(text).items():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            continue
        try:
            said = asked_meanings({name: (entry[0], entry[1])})[name]
        except UsageError:
            continue
        axis = known.get(name)
        found[name] = Meaning(said.kind, WRITTEN, said.weight, axis if type(axis) is int else 1)
    return found


def _entries(text: str) -> dict[str, Any]:
    try:
        entries: Any = each_key_once(text or "{}")
    except (ValueError, RecursionError):  # so deep a nesting is no entry of ours, nor is one that stands twice
        return {}
    return entries if isinstance(entries, dict) else {}
