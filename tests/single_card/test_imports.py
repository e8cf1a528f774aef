"""Imports run one way: read from the source, at any depth of indentation."""

import ast
from pathlib import Path

import pytest

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
# Each module or sub-package may import itself and those before it.
ORDER = [
    *("choices", "log", "once", "layout", "reference", "native", "by_rule", "ops", "plan", "joint", "rows", "export"),
    *("traffic", "collectives", "uneven", "consensus", "run_report", "float16", "gather", "comm", "replicas", "local"),
    *("vision", "attention", "emulate", "cpu_tensor_parallel", "testing", "fleet", "formers", "cli"),
]
FRAMEWORKS = {"paddlefleet": "fleet", "paddleformers": "formers"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def home(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path):
    """Every import of every file is of the same part of the package or an earlier one."""
    if path.name in ("__init__.py", "__main__.py") and len(path.parts) == 1:
        return  # the lazy front door
    for module in imported(path):
        if module.startswith("paddle_vl_sp."):
            imports = module.split(".")[1]
            assert ORDER.index(imports) <= ORDER.index(home(path)), f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_fleet_and_formers_know_a_model(path):
    """No other file imports PaddleFleet or PaddleFormers."""
    for module in imported(path):
        only = FRAMEWORKS.get(module.split(".")[0])
        assert only in (None, home(path)), f"{path} imports {module}"


def test_layout_knows_no_paddle():
    """No import, at any depth."""
    assert not [module for module in imported("layout.py") if module.split(".")[0] == "paddle"]
