"""The scripts of tools/bench run on small sizes, and what they write with --json can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "attention": ("--local", "16", "--ranks", "2"),
    "delta": ("--local", "16", "--ranks", "2", "--head-size", "8", "--rounds", "1"),
    "plan": ("--seq", "16384", "--rounds", "1"),
    "rows": ("--seq", "8192", "--hidden", "16", "--rounds", "1"),
    "merge": ("--seq", "4096", "--hidden", "16", "--rounds", "1"),
    "vision": ("balance", "--batches", "1"),
    "balance": ("loads", "--steps", "2"),
}


def run(name, tmp_path, *paths):
    """The JSON of a script; modules are looked for in `paths` first."""
    out = tmp_path / "run.json"
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / f"bench_{name}.py"), *SMALL[name]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*command, "--json", str(out)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", SMALL)
def test_a_script_runs(name, tmp_path):
    """A machine, and tables of a title, a note and lines of a name and numbers; in races ours is first, at 1."""
    found = run(name, tmp_path)
    assert "Paddle" in found["machine"]
    assert found["tables"]
    for table in found["tables"]:
        assert set(table) == {"title", "note", "lines"}
        assert all({"name"} < set(line) for line in table["lines"])
        if "times_ours" in table["lines"][0]:
            assert table["lines"][0]["times_ours"] == 1
            assert table["lines"][-1]["name"].startswith("floor")
            assert all(line["milliseconds"] > 0 for line in table["lines"])


def test_rows_without_paddleformers_leaves_its_layer_out(tmp_path):
    """The other ways are timed; a line says what is missing and how to install it."""
    (tmp_path / "paddleformers.py").write_text("raise ImportError('none here')")
    tables = run("rows", tmp_path, str(tmp_path))["tables"]
    assert all("PaddleFormers' layer" not in [line["name"] for line in table["lines"]] for table in tables)
    (note,) = (table["note"] for table in tables if "PaddleFormers' layer is left out" in table["note"])
    assert 'pip install "paddleformers==1.2.0" "pyarrow<26"' in note
