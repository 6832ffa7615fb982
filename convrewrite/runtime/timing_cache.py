"""Timings that outlive a run: a cache on disk, whose keys name all that a time depends on."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from convrewrite.conv import ConvSpec, Size
from convrewrite.folders import scratch_of_cache, user_cache
from convrewrite.machine import processor
from convrewrite.targets import Target

FORMAT = 2
"""Number of the format, which goes up whenever timings come to mean something else, so that old files no longer count."""


class TimingCache:
    """Measured seconds on disk, one small file each, in the user's cache folder (or ``CONVREWRITE_CACHE``).

    Files are replaced atomically, so several runs may share the folder. A file that cannot be read, or that holds
    something else, counts as missing; a folder that cannot be written leaves the cache without effect. It never raises.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Use this folder, otherwise ``CONVREWRITE_CACHE``, otherwise the user's cache folder."""
        self.folder = folder if folder is not None else user_cache() / "timings"

    def get(self, key: str) -> float | None:
        """The number stored under this key, if there is one."""
        try:
            entry = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("key") != key:
            return None
        value = entry.get("value")
        usable = isinstance(value, float) and 0.0 < value < float("inf")
        return value if usable else None

    def put(self, values: Mapping[str, float]) -> None:
        """Store positive numbers by their keys."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with scratch_of_cache(self.folder) as scratch:
                made = scratch.path / "timing.json"
                for key, value in values.items():
                    made.write_text(json.dumps({"key": key, "value": value}), encoding="utf-8")
                    with suppress(OSError):
                        os.replace(made, self._file(key))

    def _file(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def runtime_of(target: Target) -> str:
    """The runtime whose times these are, with its version; where it has an option, which may be a device, with the graphics cards
    that are here, as the name of a device does not say which card it is."""
    found = f"{target.name} {target.version()}"
    if ":" not in target.name or not torch.cuda.is_available():
        return found
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{found} ({', '.join(cards)})"


def timing_key(graphs: Sequence[Sequence[Sequence[ConvSpec]]], input_size: Size, threads: int, runtime: str) -> str:
    """All that a measured time depends on: the processor, the runtime and its threads, and the geometry."""
    name, flags = processor()
    facts = {
        "format": FORMAT,
        "processor": name,
        "avx512": "avx512f" in flags,
        "runtime": runtime,
        "threads": threads,
        "batch": 1,
        "input_size": input_size,
        "graphs": [[[asdict(spec) for spec in chain] for chain in graph] for graph in graphs],
    }
    return json.dumps(facts, sort_keys=True)
