"""Results that outlive a run: a cache on disk, so that an interrupted run goes on and a second one repeats nothing.

An entry is one safetensors file. Its name is a hash of its key, which names all that the entry depends on; its metadata holds
that key, what is no tensor as JSON, and a checksum of all. Reading one runs no code and takes no more memory than the file is
long. Its content still counts as input: the caller compares every number and shape with what it must be.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from convrewrite.errors import UsageError
from convrewrite.folders import scratch_of_cache, user_cache
from convrewrite.machine import is_ours
from convrewrite.stored.digests import tensors_digest

LOG = logging.getLogger(__name__)

LIMIT_VARIABLE = "CONVREWRITE_CACHE_GB"

LIMIT = 4.0
"""GB that all entries may take together, unless ``CONVREWRITE_CACHE_GB`` says otherwise: a hundred plans of a ResNet-18."""

FILLED = 0.9
"""Of the limit, what is left once the oldest were removed."""

LONGEST = 1 << 30
"""Most bytes of one entry: twice the kernels of the largest site of VGG-16, in float64, are 38 MB."""

FORMAT = "convrewrite.result/1"
"""Key of the metadata; its number goes up whenever entries come to mean something else."""

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """What was kept: ``facts``, any JSON, and tensors by name. The only thing checked is that it is whole."""

    facts: Any
    tensors: Mapping[str, Tensor]


class ResultCache:
    """Entries on disk, in the user's cache folder (or ``CONVREWRITE_CACHE``); the oldest are removed beyond the limit.

    Files are put in place in one step, so several runs may share the folder. A file that cannot be read, is broken, belongs to
    another user or holds something else counts as missing; in a folder that cannot be written, nothing is kept.
    """

    def __init__(self, folder: Path | None = None, limit: float | None = None) -> None:
        """``limit`` in GB, as in :data:`LIMIT`. Raises UsageError where the environment states one that is no number."""
        self.folder = folder if folder is not None else user_cache() / "results"
        self._limit = int((_stated_limit() if limit is None else limit) * (1 << 30))
        self._left: int | None = None

    @property
    def keeps(self) -> bool:
        """Whether there is room for anything at all."""
        return self._limit > 0

    def get(self, key: str) -> Entry | None:
        """What was kept under this key, if it is there and whole. It counts as new from now on."""
        path = self._file(key)
        try:
            if not _is_own_file(path):
                return None
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key or metadata.get("format") != FORMAT:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            if metadata.get("sum") != _sum(key, metadata.get("facts", ""), tensors):
                return None
            facts = json.loads(metadata["facts"], parse_constant=_refused)
        except Exception:  # the library has errors of its own, and nothing that a file holds may end a run
            return None
        with suppress(OSError):  # a folder that can only be read has entries all the same
            os.utime(path)
        return Entry(facts, tensors)

    def put(self, key: str, facts: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep this under the key. Where the disk refuses it, nothing is kept and nothing raised."""
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            text = json.dumps(facts, allow_nan=False)
        except ValueError:  # numbers that overflowed are not worth keeping
            return
        size = len(text) + sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
        if size > min(LONGEST, self._limit):
            return
        with suppress(Exception):  # the library reports a full disk by an error of its own
            self.folder.mkdir(parents=True, exist_ok=True)
            metadata = {"format": FORMAT, "key": key, "facts": text, "sum": _sum(key, text, plain)}
            with scratch_of_cache(self.folder) as scratch:
                made = scratch.path / f"result{SUFFIX}"
                save_file(plain, str(made), metadata)
                made.chmod(0o600)  # a usual umask lets the group write, and then it would not be trusted
                written = made.stat().st_size
                os.replace(made, self._file(key))
            self._make_room(written)

    def _make_room(self, size: int) -> None:
        """Count an entry of so many bytes; where there may be no room for it, remove the oldest until all keep to the limit. All
        entries are looked at for that, which takes long where they are many, so it leaves room for some more."""
        if self._left is not None and size <= self._left:
            self._left -= size
            return
        with os.scandir(self.folder) as found:
            files = [(entry.stat(follow_symlinks=False), entry.path) for entry in found if entry.name.endswith(SUFFIX)]
        used = sum(about.st_size for about, _ in files)
        aim = self._limit if used <= self._limit else int(FILLED * self._limit)
        for about, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
            if used <= aim:
                break
            with suppress(OSError):
                os.unlink(path)
            used -= about.st_size
        self._left = self._limit - used

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{SUFFIX}"


@dataclass(frozen=True, slots=True)
class RunCache:
    """The entries of one run: ``context`` names what all of them depend on. ``cache`` None: nothing is kept."""

    cache: ResultCache | None = None
    context: str = ""

    def get(self, kind: str, asked: Any) -> Entry | None:
        """What was kept of this kind for what was asked."""
        found = None if self.cache is None else self.cache.get(self._key(kind, asked))
        LOG.debug("%s: %s", kind, "an earlier run has it" if found else "no earlier run has it")
        return found

    def put(self, kind: str, asked: Any, facts: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep it."""
        if self.cache is not None:
            self.cache.put(self._key(kind, asked), facts, tensors)

    def _key(self, kind: str, asked: Any) -> str:
        return json.dumps({"kind": kind, "context": self.context, "asked": asked}, sort_keys=True)


NOTHING_KEPT = RunCache()
"""The cache of a run that finds nothing and keeps nothing."""


def _sum(key: str, facts: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{FORMAT}\n{key}\n{facts}\n{tensors_digest(tensors)}".encode()).hexdigest()


def _is_own_file(path: Path) -> bool:
    """Whether it is an ordinary file, of a size that an entry has, which nobody but this user can have written."""
    about = os.lstat(path)
    closed = not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(about.st_mode) and about.st_size <= LONGEST and is_ours(about) and closed


def _refused(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _stated_limit() -> float:
    text = os.environ.get(LIMIT_VARIABLE) or str(LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < 1e6:
        raise UsageError(f"{LIMIT_VARIABLE}: expected GB, as 4, or 0 to keep nothing, found {text[:40]!r}")
    return limit
