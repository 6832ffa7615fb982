"""What documents name is there: files, folders, modules and public names."""

import ast
import builtins
import pkgutil
import re
from pathlib import Path

import candidates_table
import onnx_table
import pytest
import session
from scripts import Scripts

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "convrewrite"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md")]
NAMED = [
    *DOCUMENTS,
    ROOT / "pyproject.toml",
    ROOT / "Makefile",
    *ROOT.glob("examples/**/*.py"),
    *ROOT.glob("benchmarks/*.py"),
]
FOLDERS = ("benchmarks/", "convrewrite/", "docs/", "examples/", "rules/", "tests/")
GIVEN = {
    "convrewrite", "torch", "model", "example", "example_input", "images", "many_images", "loader", "batches",
    "my_pass", "another_pass", "graph_module",
}  # fmt: skip
"""Names in snippets that stand for what a reader has."""

BENCHMARKS = [path for path in ROOT.glob("benchmarks/*.py") if "__main__" in path.read_text(encoding="utf-8")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", NAMED, ids=name_of)
def test_named_files_are_there(document: Path) -> None:
    words = re.findall(r"[\w.-]+/[\w./-]*\w", document.read_text(encoding="utf-8"))
    paths = [word for word in words if word.startswith(FOLDERS)]
    ours = [path for path in paths if not path.startswith("convrewrite/_rules")]  # where the wheel has them
    assert [path for path in ours if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name_of)
def test_files_in_backticks_are_there(document: Path) -> None:
    named = set(re.findall(r"`([a-z_/]+\.py)`", document.read_text(encoding="utf-8")))
    files = [f"/{name_of(path)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []


@pytest.mark.parametrize("document", [path for path in NAMED if path.name != "CHANGELOG.md"], ids=name_of)
def test_named_modules_are_there(document: Path) -> None:
    """All but those of the change log, which tells of earlier names; a project's file has the name of one."""
    for name in set(re.findall(r"\bconvrewrite(?:\.\w+)+", document.read_text(encoding="utf-8"))) - {
        "convrewrite.toml"
    }:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=name_of)
def test_snippets_use_no_name_that_nobody_defined(document: Path) -> None:
    known = GIVEN | set(dir(builtins))
    for snippet in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        nodes = list(ast.walk(ast.parse(snippet)))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        known |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        known |= {
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        known |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
        assert {name.id for name in names} <= known


def test_the_table_of_onnx_files_is_what_the_benchmark_wrote() -> None:
    text = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    assert onnx_table.summary() in text
    assert onnx_table.table() in text


def test_the_tables_of_candidates_are_what_the_benchmark_wrote() -> None:
    text = (ROOT / "docs" / "frontier.md").read_text(encoding="utf-8")
    assert candidates_table.alone() in text
    assert candidates_table.frontier() in text


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 160
    wing = PACKAGE
    for paragraph in text.split("\n\n"):
        begins = re.match(r"\*\*(\w+)/\*\*", paragraph)
        wing = PACKAGE / begins[1] if begins else PACKAGE
        for path in re.findall(r"`([\w./]+(?:\.py|/))`", paragraph):
            assert any((folder / path).exists() for folder in (wing, PACKAGE, ROOT)), f"{path} in: {paragraph[:80]}"


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_the_readme_leads_to_what_a_contributor_reads(name: str) -> None:
    assert f"({name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=name_of)
def test_benchmarks_start(scripts: Scripts, benchmark: Path) -> None:
    ran = scripts.run(benchmark, "--help", folder=ROOT)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("usage:")


def test_the_session_is_one_of_a_terminal_of_80_columns() -> None:
    text = (ROOT / "docs" / "session.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(session.COMMANDS)
    for block, command in zip(blocks, session.COMMANDS, strict=True):
        assert block.startswith("\n".join(session.typed(command)) + "\n")
        assert max(map(len, block.splitlines())) <= session.COLUMNS and "Traceback" not in block
