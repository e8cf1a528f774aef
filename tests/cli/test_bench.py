"""bench: the scripts of the tree are run, stored, compared; the comparison finds what became slower."""

import copy
import json
import os
import subprocess
import sys

import pytest

from paddle_vl_sp.cli import bench, main, suite


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A quick run of the real script."""
    path = tmp_path_factory.mktemp("bench") / "run.json"
    assert main(["bench", "plan", "--quick", "--store", str(path)]) == 0
    return path


@pytest.fixture
def rerun(stored, monkeypatch):
    """Instead of a second run: the stored one, which a test may change."""
    found = json.loads(stored.read_text())
    monkeypatch.setattr(bench, "_run_all", lambda _: copy.deepcopy(found))
    return found


def test_a_run_has_machine_ratios_and_floors(stored):
    """Every line with its numbers; ours first, at 1."""
    found = json.loads(stored.read_text())
    assert "Paddle" in found["machine"]
    (table,) = found["scripts"][0]["tables"]
    assert table["lines"][0]["times_ours"] == 1
    assert table["lines"][-1]["name"].startswith("floor")
    assert all(line["milliseconds"] > 0 for line in table["lines"])


def test_the_same_run_is_not_slower(stored, rerun, capsys):
    """Ratios of 1; words and JSON."""
    assert main(["bench", "plan", "--compare", str(stored)]) == 0
    words = capsys.readouterr().out
    assert "1.00 x" in words
    assert "SLOWER" not in words
    assert main(["bench", "plan", "--compare", str(stored), "--json"]) == 0
    assert {line["floor_ratio"] for line in json.loads(capsys.readouterr().out)["compared"]} == {1.0}


def test_what_became_slower_is_found(stored, rerun, capsys):
    """Twice the stored ratio to the floor: exit code 1, the line is marked; --slower moves the limit."""
    rerun["scripts"][0]["tables"][0]["lines"][0]["times_floor"] *= 2
    assert main(["bench", "plan", "--compare", str(stored)]) == 1
    assert "2.00 x SLOWER" in capsys.readouterr().out
    assert main(["bench", "plan", "--compare", str(stored), "--slower", "3"]) == 0


def test_runs_of_other_sizes_are_not_compared(stored, rerun, capsys):
    """Said in words."""
    rerun["scripts"][0]["tables"][0]["title"] = "another size"
    assert main(["bench", "plan", "--compare", str(stored)]) == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_without_the_source_tree_it_says_so(tmp_path, capsys):
    """Exit code 1 and where to get it."""
    assert main(["bench", "plan", "--source", str(tmp_path)]) == 1
    assert "the benchmarks come with the source tree" in capsys.readouterr().err


def test_a_script_that_fails_is_a_problem(tmp_path, capsys, monkeypatch):
    """Exit code 1, with what it said."""
    (tmp_path / "tools" / "bench").mkdir(parents=True)
    (tmp_path / "tools" / "bench" / "bench_plan.py").write_text("raise SystemExit('other indices')")
    assert main(["bench", "plan", "--source", str(tmp_path)]) == 1
    assert "bench_plan.py failed with code 1:\nother indices" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows", "vision"])
def test_the_other_scripts_have_json_too(name, monkeypatch):
    """Tables with a title, a note and lines of a name and numbers. The smallest sizes."""
    smallest = {"rows": ("--seq", "8192", "--hidden", "16", "--rounds", "1"), "vision": ("balance", "--batches", "1")}
    script, _ = suite.SUITE[name]
    monkeypatch.setitem(suite.SUITE, name, (script, smallest[name]))
    (chosen,) = suite.scripts([name], True, None)
    found = chosen.run()
    for table in found["tables"]:
        assert {"title", "note", "lines"} == set(table)
        assert all({"name"} < set(line) for line in table["lines"])


def test_what_has_finished_is_stored_though_another_script_fails(tmp_path, capsys):
    """Exit code 1, the failure in the answer and in the file, and numbers of the scripts before and after it."""
    folder, store = tmp_path / "tools" / "bench", tmp_path / "run.json"
    folder.mkdir(parents=True)
    for name, value in (("plan", 1), ("vision", 2)):
        found = {"machine": "a machine", "tables": [{"title": name, "note": "", "lines": [{"name": "x", "n": value}]}]}
        code = f"import sys, pathlib\npathlib.Path(sys.argv[-1]).write_text({json.dumps(json.dumps(found))})"
        (folder / f"bench_{name}.py").write_text(code)
    (folder / "bench_rows.py").write_text("raise SystemExit('no such thing')")
    arguments = ["bench", "plan", "rows", "vision", "--source", str(tmp_path), "--store", str(store)]
    assert main(arguments) == 1
    assert "bench_rows.py failed with code 1:\nno such thing" in capsys.readouterr().out
    found = json.loads(store.read_text())
    assert [script["name"] for script in found["scripts"]] == ["plan", "vision"]
    assert [failed["name"] for failed in found["failed"]] == ["rows"]


def test_rows_without_paddleformers_leaves_its_layer_out(tmp_path):
    """The other ways are timed; a line says what is missing and the mend."""
    (tmp_path / "paddleformers.py").write_text("raise ImportError('none here')")
    script, path = suite.scripts(["rows"], True, None)[0].path, tmp_path / "run.json"
    smallest = ("--seq", "8192", "--hidden", "16", "--rounds", "1", "--json", str(path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *smallest],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tables = json.loads(path.read_text())["tables"]
    assert all("PaddleFormers' layer" not in [line["name"] for line in table["lines"]] for table in tables)
    (note,) = (table["note"] for table in tables if "PaddleFormers' layer is left out" in table["note"])
    assert 'pip install "paddleformers==1.2.0" "pyarrow<26"' in note


def test_waits_are_called_waits(stored, rerun, capsys):
    """Not syncs, which is the name in JSON."""
    assert main(["bench", "plan"]) == 0
    words = capsys.readouterr().out
    assert "waits for the device" in words
    assert "sync" not in words


def test_a_file_that_cannot_be_stored_is_refused(tmp_path, capsys):
    """Before minutes are spent: here it is a folder."""
    assert main(["bench", "plan", "--store", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_folder_to_store_in_must_be_there(capsys):
    """Before minutes are spent."""
    assert main(["bench", "plan", "--store", "no-such/run.json"]) == 2
    assert "there is no folder no-such" in capsys.readouterr().err
