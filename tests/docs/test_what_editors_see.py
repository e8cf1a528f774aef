"""Names that are imported when they are first used are there for dir() and for type checkers."""

import importlib
import re
import subprocess
import sys

import pytest
from docs_blocks import ROOT
from test_docstrings import PACKAGES

NAMES = ["paddle_vl_sp" + f".{package}" * bool(package) for package in PACKAGES]


@pytest.mark.parametrize("name", NAMES)
def test_dir_has_every_public_name(name):
    """Before any of them was used: in a module that is imported again."""
    if name.endswith("formers"):
        pytest.importorskip("paddleformers")
    module = importlib.import_module(name)
    assert set(module.__all__) <= set(dir(module))
    assert all(hasattr(module, each) for each in module.__all__)


def test_a_type_checker_knows_every_public_name(tmp_path):
    """mypy --strict reveals a type of the package, never Any; a name that is not there is an error."""
    pytest.importorskip("mypy")
    lines = [f"import {name}" for name in NAMES]
    for name in NAMES:
        lines += [f"reveal_type({name}.{each})" for each in importlib.import_module(name).__all__]
    snippet = tmp_path / "snippet.py"
    snippet.write_text("\n".join([*lines, "paddle_vl_sp.testing.no_such_name", ""]))
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(snippet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    revealed = re.findall(r'snippet.py:(\d+): note: Revealed type is "(.*)"', done.stdout)
    unknown = [lines[int(number) - 1] for number, what in revealed if what == "Any"]
    assert unknown == []
    assert len(revealed) == len(lines) - len(NAMES)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, errors
    assert 'no attribute "no_such_name"' in errors[0]
