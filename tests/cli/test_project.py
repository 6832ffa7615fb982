"""A project's defaults: what a file may say, what it may not, and that the command line wins."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commands import INPUT, call, small_network

from convrewrite.cli.commands import app
from convrewrite.cli.grouped import _all
from convrewrite.cli.project import MAY_NAME_CODE, MAY_SEND, ONE_RUN, RUNS_CODE, options_of, read_project
from convrewrite.reporting import Report

ROOT: Any = typer.main.get_command(app)
COMMANDS = dict(_all(ROOT, ()))
OPTIONS = {name: options_of(command) for name, command in COMMANDS.items()}


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, which is a project's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(folder: Path, text: str, command: str, **given: object) -> list[str]:
    """The words for a command that has nothing but ``given``."""
    (folder / "convrewrite.toml").write_text(text)
    found = read_project(folder, OPTIONS)
    assert found is not None
    return [word for entry in found.words(command, OPTIONS[command], given).values() for word in entry]


def test_a_file_says_what_could_be_typed(there: Path) -> None:
    text = """
    seed = 3
    rule = ["separable", "grouped"]
    memory = 2
    exclude = "stem.*"
    [optimize]
    seed = 4
    fast = true
    onnx = false
    any-speed = false
    keep = "error=0.02"
    [rules.list]
    verbose = 2
    """
    expected = [
        "--seed=4",
        "--rule=separable",
        "--rule=grouped",
        "--memory=2",
        "--exclude=stem.*",
        "--fast",
        "--no-onnx",
    ]
    assert words(there, text, "optimize") == [*expected, "--keep=error=0.02"]
    assert words(there, text, "analyze") == ["--rule=separable", "--rule=grouped"]
    assert words(there, text, "rules list") == ["--verbose", "--verbose"]


def test_a_command_and_an_option_of_one_name_are_told_apart(there: Path) -> None:
    assert words(there, 'memory = 2\n[export]\nto = ["half"]\n', "export") == ["--memory=2", "--to=half"]
    assert words(there, 'export = ["openvino"]', "optimize") == ["--export=openvino"]
    assert words(there, 'export = ["openvino"]', "export") == []
    assert words(there, '[optimize]\nexport = "openvino"\n[export]\nto = "half"', "optimize") == ["--export=openvino"]


def test_the_command_line_wins(there: Path) -> None:
    text = 'seed = 3\nrule = ["separable"]\nfast = true\n[recover]\nminutes = 2.5\n'
    assert words(there, text, "plan", rule=["grouped"], seed="1") == ["--fast"]
    assert words(there, text, "recover", epochs="3") == ["--seed=3"]
    assert words(there, text, "recover") == ["--seed=3", "--minutes=2.5"]
    assert words(there, f"epochs = 4.0\n{text}", "recover") == ["--seed=3", "--minutes=2.5"], "a table goes first"
    assert words(there, "quiet = true\n", "recover") == ["--quiet"], "of two words the long one"
    assert words(there, "minutes = 1.0\n[optimize]\nseed = 3\n", "recover") == ["--minutes=1.0"]
    assert words(there, "verbose = 1", "report", quiet=True) == []


def test_what_says_how_inputs_are_read_waits_for_inputs(there: Path) -> None:
    mean = 'mean = "0,0,0"\n'
    assert words(there, mean, "optimize") == []
    assert words(there, mean, "optimize", calib="weights") == []
    assert words(there, mean, "optimize", calib="images") == ["--mean=0,0,0"]
    assert words(there, mean + 'calib = "images"', "optimize") == ["--mean=0,0,0", "--calib=images"]
    assert words(there, mean, "recover", data="images") == ["--mean=0,0,0"]
    file = 'opset = 20\ntimings = "t.json"\nhalf = true\nruntime = "torch"\n'
    assert words(there, file, "optimize") == ["--opset=20", "--timings=t.json", "--half", "--runtime=torch"]
    assert words(there, file, "optimize", onnx=True) == ["--opset=20", "--timings=t.json", "--half", "--runtime=torch"]
    assert words(there, file, "optimize", onnx=False) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = 3", "convrewrite.toml: sead: expected an option that is known there, without its dashes, nearest is 'seed'"),
        ("[optimise]", "convrewrite.toml: [optimise]: expected a command, nearest is 'optimize'; see convrewrite --help"),
        ("optimize = 3", "convrewrite.toml: optimize: expected the table of that command, as [optimize], found 3"),
        ("rules = true", "expected the table of that command, as [rules], found True"),
        ("[rules]\nlisst = {}", "convrewrite.toml: rules.lisst: expected the table of a command, nearest is 'list'"),
        ("[optimize]\nthread = 1", "convrewrite.toml: optimize.thread: expected an option that is known there"),
        ("[compare]\nseed = 1", "without its dashes (json, quiet, verbose)"),
        ("[optimize]\nno-onnx = true", "nearest is onnx = false"),
        ("seed = 1.5", "convrewrite.toml: seed: expected a whole number, found 1.5"),
        ("seed = true", "expected a whole number, found True"),
        ('memory = "4"', "convrewrite.toml: memory: expected a number, found '4'"),
        ('fast = "yes"', "convrewrite.toml: fast: expected true or false, found 'yes'"),
        ("keep = 0.98", "convrewrite.toml: keep: expected text, written as on the command line, found 0.98"),
        ("rule = [1]", "convrewrite.toml: rule: expected text, written as on the command line, or a list of such"),
        ("rule = [['a']]", "or a list of such, found [['a']]"),
        ("verbose = 3", "convrewrite.toml: verbose: expected 0, 1 or 2, found 3"),
        ("seed = 1\nseed = 2", "convrewrite.toml: not valid TOML"),
        ("seed = ", "or call convrewrite --no-config"),
        ("seed = " + "9" * 5000, "not valid TOML"),
        ("a = " + "[" * 5000, "nested too deeply"),
        ('rule = "a\\u0000b"', "without NUL"),
        ("seed = -1", "convrewrite.toml: --seed: expected a whole number from 0 to"),
        ('budget = "half"', "convrewrite.toml: --budget: expected NAME=PART as macs=0.5, found 'half'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(there: Path, text: str, message: str) -> None:
    (there / "convrewrite.toml").write_text(text)
    ran = call("optimize", "net.pt")
    assert ran.code == 2
    assert message in ran.message
    assert call("optimize", "--help").code == 0


@pytest.mark.parametrize("key", [*RUNS_CODE, *ONE_RUN])
@pytest.mark.parametrize(
    "table", ["", "[optimize]\n", "[recover]\n", "[sweep]\n"], ids=["common", "optimize", "recover", "sweep"]
)
def test_a_file_neither_runs_code_nor_says_where_to_write(there: Path, key: str, table: str) -> None:
    (there / "convrewrite.toml").write_text(f'{table}{key} = "evil.py:run"')
    ran = call("rules", "list")
    assert ran.code == 2
    assert f"{key}: expected on the command line alone" in ran.message
    assert ran.out == ""


@pytest.mark.parametrize(
    "text",
    ['input = "evil.py:run"', 'calib = "evil.py:run"', "input = ['1x3x8x8', 'a:b']", '[recover]\ndata = "a.b:c"'],
)
def test_a_value_that_may_be_code_is_refused(there: Path, text: str) -> None:
    (there / "evil.py").write_text("raise SystemExit('ran')")
    (there / "convrewrite.toml").write_text(text)
    ran = call("optimize", "net.pt", "-o", "out")
    assert ran.code == 2
    assert "which may name code to run" in ran.message


@pytest.mark.parametrize(
    "value", ["tcp://1.2.3.4:8786", "tls://a:1", "ucx://a", "inproc://a", "local\\n", "locally", "LOCAL"]
)
@pytest.mark.parametrize("table", ["", "[sweep]\n"], ids=["common", "sweep"])
def test_a_file_names_no_machine_to_send_to(there: Path, table: str, value: str) -> None:
    (there / "convrewrite.toml").write_text(f'{table}cluster = "{value}"')
    ran = call("sweep", "net.pt", "-o", "out")
    assert ran.code == 2
    assert "cluster: expected local or local:N, found" in ran.message
    assert "to which the model and its inputs would be sent; give it on the command line" in ran.message


@pytest.mark.parametrize("value", ["local", "local:2"])
def test_a_file_may_ask_for_workers_here(there: Path, value: str) -> None:
    assert words(there, f'[sweep]\ncluster = "{value}"\n', "sweep") == [f"--cluster={value}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_may_run_code_is_known_as_one(name: str) -> None:
    """Whoever adds one that takes FILE.py:NAME, or a file to execute, has to say so in cli/project.py; so for one that says where
    something is written or sent."""
    for parameter in COMMANDS[name].params:
        text = parameter.help or ""
        if parameter.param_type_name != "option":
            continue
        key = max(parameter.opts, key=len)[2:]
        if any(word in text for word in ("FILE.py", "pkg.mod", "Execute", "The original")):
            assert key in (*RUNS_CODE, *MAY_NAME_CODE)
        if any(word in text for word in ("Folder", "folder for", "File for", "HTML file", "browser")):
            assert key in ONE_RUN
        if any(word in text for word in ("address", "://", "host")):
            assert key in MAY_SEND


def test_options_are_known_with_their_types() -> None:
    optimize = OPTIONS["optimize"]
    assert (optimize["seed"].kind, optimize["memory"].kind, optimize["fast"].kind) == (int, float, bool)
    assert (optimize["rule"].kind, optimize["rule"].several, optimize["refine"].no) == (str, True, "--no-refine")
    assert OPTIONS["recover"]["labels"].kind is Path and OPTIONS["recover"]["minutes"].kind is float
    assert all({"quiet", "verbose"} <= options.keys() and options["verbose"].counted for options in OPTIONS.values())


def test_a_file_of_its_own_comes_before_pyproject(there: Path) -> None:
    shared = there / "pyproject.toml"
    shared.write_text("[project]\nname = 'x'\n")
    assert read_project(there, OPTIONS) is None
    shared.write_text("[tool.convrewrite]\nsead = 1\n")
    assert "pyproject.toml [tool.convrewrite]: sead: " in call("rules", "list").message
    assert call("--no-config", "rules", "list").code == 0
    shared.write_text("[tool]\nconvrewrite = 1\n")
    assert "expected a table, found 1" in call("rules", "list").message
    (there / "convrewrite.toml").write_text("seed = 2")
    found = read_project(there, OPTIONS)
    assert found is not None and (found.name, found.common) == ("convrewrite.toml", {"seed": ["--seed=2"]})


def test_a_file_that_is_none(there: Path) -> None:
    (there / "convrewrite.toml").mkdir()
    assert "convrewrite.toml: cannot be read, it is a folder" in call("rules", "list").message
    (there / "convrewrite.toml").rmdir()
    (there / "convrewrite.toml").write_bytes(b"\xff")
    assert "encoded in UTF-8" in call("rules", "list").message
    (there / "convrewrite.toml").write_bytes(b"#" * (1 << 20) + b"#")
    assert "at most 1048576 bytes" in call("rules", "list").message


def test_a_run_is_told_with_the_defaults_it_had(there: Path) -> None:
    torch.save(small_network(), there / "net.pt")
    (there / "convrewrite.toml").write_text('seed = 7\nonnx = false\n[optimize]\ncalib = "weights"\n')
    ran = call("optimize", "net.pt", *INPUT, "-o", "out", "-v")
    assert ran.code == 0, ran.err
    assert "convrewrite.toml: --seed=7 --no-onnx --calib=weights\n" in ran.err
    report = Report.model_validate_json((there / "out" / "report.json").read_text())
    assert report.seed == 7
    [command] = report.commands
    assert command == "convrewrite optimize --seed=7 --no-onnx --calib=weights net.pt --input 1x3x16x16 -o out -v"
    assert "--seed=7" not in call("optimize", "net.pt", *INPUT, "-o", "out", "--seed", 1).err
    assert Report.model_validate_json((there / "out" / "report.json").read_text()).seed == 1
