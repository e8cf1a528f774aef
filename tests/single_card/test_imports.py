"""Imports run one way, between folders and between files: read from the source, at any depth of indentation."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
# Each module at the root, or folder, may import itself and those of earlier lines, and of its own line to its left.
ORDER = [
    *("lazy", "settings", "autograd", "log", "layout"),
    "backends",
    *("plan", "rows", "interleave", "export"),
    "comm",
    *("carried", "tower_work", "report", "sequence", "testing", "audit"),
    *("verify", "vision", "attention"),
    *("fleet", "formers"),
    "cli",
]
FRAMEWORKS = {"paddlefleet": "fleet", "paddleformers": "formers"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
LAZY_DOORS = {"__init__.py", "comm/__init__.py", "testing/__init__.py", "formers/__init__.py"}  # by name, when asked


def imported(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imported_files(path):
    """The files of the package that a file imports from."""
    for name in imported(path):
        if name.split(".")[0] != "paddle_vl_sp":
            continue
        parts = name.split(".")[1:]  # a.b.c names a file, a folder, or something of the file or folder a.b
        while parts:
            file = Path(*parts)
            found = [each for each in (file.with_suffix(".py"), file / "__init__.py") if (PACKAGE / each).is_file()]
            if found:
                break
            parts.pop()
        yield found[0] if parts else Path("__init__.py")


def home(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way_between_folders(path):
    """The order above, without exception but for the front door."""
    if home(path) in ("__init__", "__main__"):
        return
    for file in imported_files(path):
        if file != Path("__init__.py"):
            assert ORDER.index(home(file)) <= ORDER.index(home(path)), f"{path} imports {file}"


def test_no_files_import_each_other_in_a_circle():
    """graphlib raises a CycleError that names the files."""
    graph = {path: set(imported_files(path)) for path in MODULES if str(path) not in LAZY_DOORS}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_fleet_and_formers_know_a_model(path):
    """No other file imports PaddleFleet or PaddleFormers."""
    for module in imported(path):
        only = FRAMEWORKS.get(module.split(".")[0])
        assert only in (None, home(path)), f"{path} imports {module}"


def test_layout_knows_no_paddle():
    """No import, at any depth."""
    assert not [module for module in imported("layout.py") if module.split(".")[0] == "paddle"]


def test_few_files_at_the_root():
    """A newcomer sees the rooms."""
    assert len([path for path in MODULES if len(path.parts) == 1]) <= 17
