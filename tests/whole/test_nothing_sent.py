"""Libraries that would report to their makers do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def written_by(program: str, folder: Path, **more: str) -> list[str]:
    """The names of what a program leaves in the user's cache folder."""
    cache = folder / "cache"
    cache.mkdir()
    known = {name: text for name, text in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = known | {"XDG_CACHE_HOME": str(cache), "HOME": str(folder)} | more
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, check=True, timeout=120)
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the cache folder is another one elsewhere")
def test_onnxruntime_keeps_no_record_of_what_ran_to_send_it(tmp_path: Path) -> None:
    assert "Microsoft" not in written_by("import convrewrite.onnx_files, onnxruntime", tmp_path)


@pytest.mark.parametrize(("said", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_who_says_otherwise_is_heard(said: dict[str, str], expected: str, tmp_path: Path) -> None:
    program = f"import os, convrewrite; assert os.environ['ORT_DISABLE_TELEMETRY'] == {expected!r}"
    assert written_by(program, tmp_path, **said) == []
