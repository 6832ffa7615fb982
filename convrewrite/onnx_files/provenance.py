"""What a rewritten ONNX file says of itself in its metadata: of which model it is an approximation, and what its outputs mean."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convrewrite.errors import UsageError
from convrewrite.json_texts import each_key_once
from convrewrite.meanings import Meaning, asked_meanings

PREFIX = "convrewrite."
VERSION = re.compile(r"[0-9A-Za-z.+-]{1,40}")
WRITTEN = "as the file's metadata has it"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Fingerprints of the original's and of the rewritten weights, the version of this tool, the outputs' meanings, and where the
    original was an ONNX file the SHA-256 of that, as :func:`digest_of` gives it."""

    original: str
    result: str
    tool_version: str
    outputs: Mapping[str, Meaning] = field(default_factory=dict)
    file: str = ""

    def metadata(self) -> dict[str, str]:
        """The entries of ``metadata_props``."""
        outputs = {name: [meaning.kind, meaning.weight] for name, meaning in self.outputs.items()}
        entries = {
            "rewritten": "true",
            "original": self.original,
            "result": self.result,
            "version": self.tool_version,
            "outputs": json.dumps(outputs),
        } | ({"file": self.file} if self.file else {})
        return {PREFIX + name: value for name, value in entries.items()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "Provenance | None":
        """What a file's metadata says; None where it is no rewritten file."""
        if metadata.get(PREFIX + "rewritten") != "true":
            return None
        original, result, version, outputs, file = (
            metadata.get(PREFIX + name, "") for name in ("original", "result", "version", "outputs", "file")
        )
        return cls(
            original, result, version if VERSION.fullmatch(version) else "of unknown version", _meanings(outputs), file
        )


def digest_of(path: Path) -> str:
    """The SHA-256 of an ONNX file; weights that lie in other files are not looked at."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meanings(text: str) -> dict[str, Meaning]:
    """What can be read of the outputs' meanings: the file may have been changed since."""
    try:
        entries: Any = each_key_once(text or "{}")
    except (ValueError, RecursionError):  # so deep a nesting is no entry of ours, nor is one that stands twice
        return {}
    found: dict[str, Meaning] = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            continue
        try:
            said = asked_meanings({name: (entry[0], entry[1])})[name]
        except UsageError:
            continue
        found[name] = Meaning(said.kind, WRITTEN, said.weight)
    return found
