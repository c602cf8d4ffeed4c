"""The shape of the code: who may import whom, and how large a file or a function may be."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "actors", "cluster", "algorithms", "data", "experience")
MAY_IMPORT = {
    "launch": {"actors", "cluster", "algorithms", "data", "experience"},
    "actors": {"cluster", "algorithms", "data", "experience"},
    "cluster": {"experience"},
    "algorithms": set(),
    "data": {"experience"},
    "experience": set(),
}
#: Heavy libraries and the only places that may import them.
OWNERS = {
    "ray": ("cluster/",),
    "deepspeed": ("actors/deepspeed_engine.py",),
    "vllm": ("actors/vllm_engine/",),
    "peft": ("actors/tuning.py",),
    "bitsandbytes": ("actors/tuning.py",),
}
TORCH_FREE = (
    "cluster/config.py",
    "actors/config.py",
    "actors/rewards/config.py",
    "actors/rewards/combination_config.py",
    "algorithms/config.py",
    "data/config.py",
    "launch/config.py",
)
SHOWN = ("examples", "benchmarks")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def sized_files() -> list[Path]:
    """The packages, and what shows how they are used and how fast they are."""
    return sorted([*source_files(), *(path for top in SHOWN for path in (ROOT / top).rglob("*.py"))])


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, the ones inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or "", node.lineno


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", source_files(), ids=relative)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module, line in imports(ast.parse(path.read_text())):
        top = module.split(".")[0]
        if top in PACKAGES and top != package:
            assert top in MAY_IMPORT[package], f"{relative(path)}:{line}: {package} may not import {module}"
        if top in OWNERS:
            assert relative(path).startswith(OWNERS[top]), f"{relative(path)}:{line}: only {OWNERS[top]} import {top}"
        if relative(path) in TORCH_FREE:
            assert top not in ("torch", "ray", "transformers"), f"{relative(path)}:{line}: configuration imports {top}"


def import_graph(root: Path, files: Iterable[Path]) -> dict[str, set[str]]:
    """Which modules of ``files`` each one names in its imports; ``from package import module`` names the module."""
    names = {
        path.relative_to(root).as_posix().removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for path in files
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        whole = {module for module, _ in imports(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                whole |= {f"{node.module}.{alias.name}" for alias in node.names}
        graph[name] = {module for module in whole if module in names and module != name}
    return graph


def import_cycle(graph: Mapping[str, set[str]]) -> str:
    """A cycle as ``a -> b -> a``; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> str:
        if name in trail:
            return " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, (*trail, name)):
                    return found
            done.add(name)
        return ""

    return next((found for name in sorted(graph) if (found := visit(name, ()))), "")


def test_no_import_cycles() -> None:
    cycle = import_cycle(import_graph(ROOT, source_files()))
    assert not cycle, f"import cycle: {cycle}"


@pytest.mark.parametrize("line", ["import pack.b", "from pack.b import x", "from pack import d, b as c"])
def test_an_import_cycle_is_seen_however_it_is_written(line: str, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    texts = {"a": f"def f():\n    {line}\n", "b": "import os\nfrom pack.c import y\n", "c": "import pack.a\n"}
    for name, text in {"__init__": "", **texts}.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    files = list(tmp_path.rglob("*.py"))
    assert import_cycle(import_graph(tmp_path, files)) == "pack.a -> pack.b -> pack.c -> pack.a"
    (tmp_path / "pack" / "c.py").write_text("from pack import nothing\n")
    assert import_cycle(import_graph(tmp_path, files)) == ""


@pytest.mark.parametrize("path", sized_files(), ids=relative)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES, f"{relative(path)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{relative(path)}:{node.lineno}: {node.name} has {length} lines"


def test_no_catch_all_names() -> None:
    names = {part.removesuffix(".py") for path in source_files() for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", source_files(), ids=relative)
def test_no_swallowed_exceptions(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
            silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
            assert not (broad and silent), f"{relative(path)}:{node.lineno}: swallows every exception"


def test_tests_shadow_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))
