"""The house: which wing may import which, that nobody reaches past a face, and how large a room may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "convrewrite"

WINGS = (
    "ground", "folders", "targets", "stored", "modules", "meanings", "structures", "fitting", "onnx_files", "runtime",
    "quantising", "exports", "settings", "layers", "graph", "loading", "onnx_graph", "rules", "calibration", "rewriting",
    "tuning", "planning", "reporting", "results", "pipeline", "cli",
)  # fmt: skip

LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 50, 8
LARGEST_FACE = 20


WRITES = re.compile(
    r"(.*\.)?(write_text|write_bytes|mkdir|mkdtemp|unlink|save_file|save_model|open\(.*'[wax]b?'\))"
    r"|(torch|torch\.export|onnx)\.save|shutil\.(copy\w*|rmtree)|os\.(rename|link|unlink)|.*(path|weights)\.rename"
)
"""What makes, moves or removes files: calls as they are written, with their arguments where it is an ``open``."""

WRITERS = {
    "cli.commands", "cli.entry", "exports.kinds.executorch", "exports.kinds.half", "exports.kinds.open_vino",
    "exports.kinds.torch_export", "folders.placing", "folders.scratch", "onnx_files.placing", "onnx_graph.external",
    "onnx_graph.observing", "onnx_graph.opening", "onnx_graph.surgery", "pipeline.forms", "pipeline.profiling",
    "pipeline.sweeping", "quantising.choosing", "results.analysis", "results.folder", "results.further", "results.weights",
    "rewriting.store", "runtime.onnx_export", "runtime.profiling", "runtime.timing_cache", "stored.result_cache",
    "targets.profiles", "tuning.checkpoint",
}  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if module_name(path)}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def wing_of(module: str) -> str:
    head = module.partition(".")[0]
    return head if head in WINGS else "ground"


def imports(name: str) -> list[tuple[str, str]]:
    """Every (module, name) of this package that a module imports: at its top, in functions, and for type checking."""
    found = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "convrewrite":
            assert node.level == 0 and node.module is not None
            found += [(node.module.removeprefix("convrewrite").lstrip("."), alias.name) for alias in node.names]
    return found


def module_of(source: str, imported: str) -> str:
    """The module that an import names: ``from convrewrite.graph import sites`` names one as ``from convrewrite.graph.sites``."""
    inner = f"{source}.{imported}".lstrip(".")
    return inner if inner in SOURCES else source


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down_only_and_through_faces(name: str) -> None:
    for source, imported in imports(name):
        other = module_of(source, imported)
        if name == "__main__" or wing_of(other) == wing_of(name):
            continue
        assert WINGS.index(wing_of(other)) < WINGS.index(wing_of(name)), f"{name} imports {other}, which lies above it"
        assert wing_of(other) == "ground" or other == wing_of(other), f"{name} reaches past the face of {other}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_examples_and_benchmarks_import_through_faces(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        named = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        ours = [name.removeprefix("convrewrite.") for name in named if name.startswith("convrewrite.")]
        assert [name for name in ours if wing_of(name) not in ("ground", name)] == [], path.name


@pytest.mark.parametrize("wing", WINGS)
def test_every_wing_has_a_paragraph(wing: str) -> None:
    begins = f"**{wing}/**" if (PACKAGE / wing).is_dir() else f"**{wing}**"
    paragraphs = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n\n")
    assert len([text for text in paragraphs if text.startswith(begins)]) == 1


def test_there_is_no_circle_within_a_wing() -> None:
    edges = {name: {module_of(*pair) for pair in imports(name)} - {name} for name in SOURCES}
    inside = {
        name: {other for other in found if wing_of(other) == wing_of(name) and other != wing_of(name)}
        for name, found in edges.items()
        if name not in WINGS
    }
    while leaves := [name for name, found in inside.items() if not found & inside.keys()]:
        for name in leaves:
            del inside[name]
    assert inside == {}


@pytest.mark.parametrize("wing", WINGS[1:])
def test_a_face_is_small_and_hands_out_no_name_of_a_module(wing: str) -> None:
    handed = [imported for _, imported in imports(wing)]
    rooms = {module.rpartition(".")[2] for module in SOURCES if module.startswith(f"{wing}.")}
    assert len(handed) <= LARGEST_FACE or wing == "layers"
    assert not set(handed) & rooms


def test_only_the_wings_that_say_so_import_onnx() -> None:
    outside = ("onnx", "onnxruntime", "onnxscript", "onnx_ir")
    for name, tree in TREES.items():
        named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert wing_of(name) in ("targets", "onnx_files", "runtime", "quantising", "exports", "onnx_graph") or not {
            text.partition(".")[0] for text in named
        } & set(outside), name


@pytest.mark.parametrize(
    ("called", "where"),
    [
        (r"torch\.load", {"stored.unpickling", "loading.checkpoints"}),
        (r"subprocess\.\w+|os\.fork|multiprocessing\.\w+", {"onnx_files.probing"}),
        (
            r"torch\.(manual_seed|set_rng_state|set_num_threads|set_default_dtype)|random\.seed|os\.dup2|sys\.set\w+"
            r"|warnings\.(catch_warnings|simplefilter|filterwarnings)|os\.environ\.pop",
            {"process"},
        ),
        (r"sys\.path\.\w+", {"__main__", "loading.user_code"}),
        (r"signal\.signal", {"interrupts"}),
        (r"resource\.setrlimit", {"machine"}),
        (r"replace_modules", {"graph.finding", "graph.lifts", "rewriting.surgery"}),
    ],
)  # fmt: skip
def test_what_one_place_does_no_other_does(called: str, where: set[str]) -> None:
    """The invariants of ARCHITECTURE.md, as far as calls show them."""
    found = {
        name for name, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and re.fullmatch(called, ast.unparse(node.func))
    }  # fmt: skip
    assert found == where


def test_files_are_written_where_it_is_said_and_nowhere_else() -> None:
    found = {
        name for name, tree in TREES.items() for node in ast.walk(tree)
        if isinstance(node, ast.Call) and WRITES.fullmatch(as_written(node))
    }  # fmt: skip
    assert found == WRITERS


def as_written(call: ast.Call) -> str:
    function = ast.unparse(call.func)
    return ast.unparse(call) if re.fullmatch(r"(.*\.)?open", function) else function


def test_nothing_connects_to_a_network() -> None:
    outside = {"socket", "http", "urllib", "requests", "httpx", "ftplib", "asyncio"}
    for name, tree in TREES.items():
        named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        named += [str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not {text.partition(".")[0] for text in named} & outside, name


def test_families_know_neither_each_other_nor_fx_nor_rules() -> None:
    families = [name for name in SOURCES if name.startswith("structures.families.")]
    assert len(families) >= 5
    for name in families:
        assert {module_of(*pair) for pair in imports(name)} <= {"conv", "structures.structure", "structures.algebra"}


def test_only_the_command_line_prints_and_exits() -> None:
    for name, tree in TREES.items():
        called = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert (
            wing_of(name) == "cli" or name == "__main__" or not {"print", "input", "exit", "sys.exit"} & set(called)
        ), name


def test_what_the_library_says_it_logs_below_the_level_of_warnings() -> None:
    """A program that uses the library, and asks for no logs, sees none; each room has the logger of its own name."""
    said = {}
    for name, tree in TREES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        said[name] = {
            ast.unparse(node.func) for node in calls if ast.unparse(node.func).startswith(("LOG.", "logging.g"))
        }
        made = [ast.unparse(node) for node in calls if ast.unparse(node.func) == "logging.getLogger"]
        assert set(made) <= {"logging.getLogger(__name__)"} or name in ("cli.voice", "process"), name
        assert said[name] <= {"LOG.info", "LOG.debug", "logging.getLogger"}, name
    assert sum("LOG.info" in found for found in said.values()) >= 8


def test_no_room_is_too_large() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}
    functions = [
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    long = {f"{name}.{node.name}" for name, node in functions if _length(node) > LONGEST_FUNCTION}
    # Layers take what torch.nn.Conv2d takes, in its order, and a few of their own.
    wide = {
        f"{name}.{node.name}"
        for name, node in functions
        if _parameters(node) > MOST_PARAMETERS and wing_of(name) != "layers"
    }
    assert (long, wide) == (set(), set())


def _length(function: ast.FunctionDef) -> int:
    """Lines of code: the docstring is not counted."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno + 1


def _parameters(function: ast.FunctionDef) -> int:
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


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
