"""Imports run one way: read from the source, at any depth of indentation."""

import ast
from pathlib import Path

import pytest

import paddle_vl_sp

PACKAGE = Path(paddle_vl_sp.__file__).parent
# Each may import those named; what is not named here may import everything that is.
ALLOWED = {
    "layout": set(),
    "reference": {"layout"},
    "native": {"layout", "reference"},
    "ops": {"layout", "reference", "native"},
    "plan": {"layout", "ops"},
    "joint": {"plan", "ops"},
    "rows": {"plan", "ops"},
}
FRAMEWORKS = {"paddlefleet": "fleet", "paddleformers": "formers"}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("name", ALLOWED)
def test_the_core_imports_downward_only(name):
    ours = {module.split(".")[1] for module in imported(f"{name}.py") if module.startswith("paddle_vl_sp.")}
    assert ours <= ALLOWED[name]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_fleet_and_formers_know_a_model(path):
    for module in imported(path):
        home = FRAMEWORKS.get(module.split(".")[0])
        assert home is None or path.parts[0] == home, f"{path} imports {module}"


def test_layout_knows_no_paddle():
    assert not [module for module in imported("layout.py") if module.startswith("paddle")]
