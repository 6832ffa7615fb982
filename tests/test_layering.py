"""Imports go strictly downward; who may import onnx, who may print, and how long a module may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "convrewrite"

LEVELS = [
    ["escaping"],
    ["errors", "interrupts", "version"],
    ["arguments", "array_files", "machine", "pickle_bounds", "text_files", "unforeseen"],
    ["archives", "pickle_calls", "probing", "scratch", "sessions"],
    [
        "conv",
        "image_folder",
        "inputs",
        "layout",
        "modules",
        "names",
        "onnx_files",
        "onnx_placing",
        "outputs",
        "placing",
        "process",
        "spilling",
        "stopwatch",
        "stored_numbers",
    ],
    ["state", "stored_state"],
    ["tracing"],
    ["counting"],
    ["copying"],
    ["unpickling"],
    ["checkpoints"],
    ["calibration_sources", "layers.geometry", "moments", "rule_schema", "sized_tracing", "state_dicts", "volumetric"],
    ["origins", "output_names"],
    ["output_statistics"],
    ["meanings"],
    ["fidelity", "provenance"],
    ["functional_calls", "layers.branches", "layers.dynamic", "structure"],
    [
        "fixed_kernels",
        "following",
        "layers.dynamic_chain",
        "observing",
        "timing_cache",
        "structures.asymmetric",
        "structures.channel",
    ],
    ["structures.cp", "structures.grouped", "structures.separable", "structures.tucker"],
    ["knapsack", "targets"],
    ["calibration", "fitting", "latency", "rules", "sites", "structures"],
    ["layers.fitted", "layers.single", "layers.transposed"],
    ["layers.chains"],
    ["layers.asymmetric", "layers.grouped", "layers.separable"],
    ["layers"],
    ["applying", "exporting", "proposing", "synthetic", "verifying"],
    ["lifts"],
    ["lifting"],
    ["batch_axis", "replaceable"],
    ["programs"],
    ["loading"],
    ["timing"],
    ["example_inputs", "planning", "preparing", "pricing", "streams", "weighting"],
    ["propagation", "work"],
    ["gating", "measuring", "relations", "replaying", "workpiece"],
    ["rewriting", "scoring"],
    ["sensitivities"],
    ["allocation"],
    ["evidence", "keeping", "rehearsing", "swapping"],
    ["choosing"],
    ["reporting.model"],
    ["reporting.figures"],
    [
        "reporting.html",
        "reporting.markdown",
        "reporting.plans",
        "reporting.text",
        "reporting.verdict",
        "reporting.verifications",
    ],
    ["reporting"],
    ["reporting.building", "storing"],
    ["running"],
    ["pipeline"],
    ["cli_interrupts", "cli_options"],
    ["cli_rules"],
    ["cli"],
    ["__main__"],
]
"""A module imports from earlier lines only; ``__init__`` imports lazily and stands above them all."""

ONNX = {"exporting", "latency", "onnx_files", "sessions"}
LONGEST = 420


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imported(tree: ast.AST) -> set[str]:
    """Every module a file imports: at its top, inside functions, and for type checking."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("convrewrite.") in SOURCES}
            found |= modules if modules == names else modules | {node.module}
    return found


def neighbours(name: str) -> set[str]:
    """The modules of this package that a module imports. A package whose module is imported does not count."""
    own = {module.removeprefix("convrewrite.") for module in imported(TREES[name]) if module.startswith("convrewrite.")}
    return own & set(SOURCES)


def top_level(name: str) -> set[str]:
    return {module.partition(".")[0] for module in imported(TREES[name])}


def test_every_module_has_a_level() -> None:
    listed = [name for level in LEVELS for name in level]
    assert sorted(listed) == sorted(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_strictly_downward(name: str) -> None:
    level = {module: number for number, modules in enumerate(LEVELS) for module in modules}
    upward = {other for other in neighbours(name) if level[other] >= level[name]}
    assert upward == set()


def test_onnx_is_imported_in_four_modules_at_most() -> None:
    found = {name for name in SOURCES if top_level(name) & {"onnx", "onnxruntime", "onnxscript"}}
    assert found <= ONNX
    assert "exporting" in found


def test_structures_know_neither_each_other_nor_fx_nor_rules() -> None:
    structures = [name for name in SOURCES if name.startswith("structures.")]
    assert len(structures) >= 5
    for name in structures:
        assert neighbours(name) <= {"conv", "structure"}
        assert "fx" not in {part for module in imported(TREES[name]) for part in module.split(".")}


def test_only_the_command_line_prints_and_exits() -> None:
    for name, tree in TREES.items():
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        printing = [func for func in calls if isinstance(func, ast.Name) and func.id in ("print", "input", "exit")]
        leaving = [func for func in calls if isinstance(func, ast.Attribute) and ast.unparse(func) == "sys.exit"]
        assert name == "cli" or not (printing or leaving), name


def test_no_module_is_too_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_bare_except_and_no_utils() -> None:
    bare = [
        name for name, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]  # fmt: skip
    assert bare == []
    assert not {"utils", "helpers", "common", "core"} & {part for name in SOURCES for part in name.split(".")}


@pytest.mark.parametrize(
    "program",
    [
        "import convrewrite",
        "import convrewrite; convrewrite.ConvRewriteError",
        "from convrewrite.cli import main; assert main(['--help']) == 0",
        "from convrewrite.cli import main; assert main(['optimize', '--help']) == 0",
        "from convrewrite.cli import main; assert main(['optimize']) == 2",
    ],
)
def test_torch_is_imported_only_when_it_is_needed(program: str) -> None:
    check = "import sys; heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    ran = subprocess.run([sys.executable, "-c", f"{program}; {check}"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
