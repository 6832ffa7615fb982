"""What the installation says of itself: the version, in a moment, and that the package is typed."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from commands import call

import convrewrite

PACKAGE = Path(convrewrite.__file__).parent


def test_the_version_is_that_of_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert convrewrite.__version__ == version("convrewrite")
    ran = call("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"convrewrite {version('convrewrite')}\n", "")
    monkeypatch.setattr("importlib.metadata.version", lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)))
    assert convrewrite.__version__ == "0+unknown"


@pytest.mark.parametrize(
    "program", ["import convrewrite; convrewrite.__version__", "from convrewrite.cli import main; main(['--version'])"]
)
def test_the_version_takes_no_torch(program: str) -> None:
    check = "import sys; heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    ran = subprocess.run([sys.executable, "-c", f"{program}; {check}"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_package_runs_as_a_module() -> None:
    for arguments, code in ((["--version"], 0), (["rules", "show", "no-such-rule"], 2)):
        ran = subprocess.run(
            [sys.executable, "-m", "convrewrite", *arguments], capture_output=True, text=True, check=False
        )
        assert ran.returncode == code, ran.stderr
        assert "Traceback" not in ran.stderr
        assert re.match(r"convrewrite(: | \d)", ran.stdout or ran.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["rules", "list"], ["--help"], ["--version"]])
def test_output_that_finds_no_room(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "convrewrite", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ran.returncode, ran.stderr) == (
        2,
        "convrewrite: standard output: cannot be written (No space left on device); send it elsewhere, or make room\n",
    )


INTERRUPTED = """
import sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
from convrewrite.cli import run
run()
"""


def test_an_interrupt_while_the_command_line_is_imported_is_told_as_any_other() -> None:
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (130, "convrewrite: interrupted; nothing was written\n")


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_text() == ""
    assert 'packages = ["convrewrite"]' in (PACKAGE.parent / "pyproject.toml").read_text()
