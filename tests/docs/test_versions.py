"""docs/versions.md is made of its table, and the tool that fills it says what it could not run."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from docs_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import version_matrix

RESULT = re.compile(
    r"passes|\d+ of \d+ fail, \S+ first|not run: .+|\d+ of \d+ clauses hold.*|nothing to replace|pytest fails: .+"
)


@pytest.fixture
def table(monkeypatch, tmp_path):
    monkeypatch.setattr(version_matrix, "TABLE", tmp_path / "versions.csv")
    return version_matrix.read_table


def says(monkeypatch, output, code=0):
    done = subprocess.CompletedProcess([], code, output, "")
    monkeypatch.setattr(version_matrix, "step", lambda *_, **__: done)


def test_the_page_is_made_of_the_table():
    """To the letter; every Python has rows, every row a known kind of result, and its tests are there."""
    rows = version_matrix.read_table()
    assert PAGES["docs/versions.md"] == version_matrix.page(rows), "python tools/version_matrix.py --page"
    assert {row["python"] for row in rows if not row["paddleformers"]} == {*version_matrix.PYTHONS}
    assert all(RESULT.fullmatch(row["result"]) for row in rows)
    named = [name for name in (*version_matrix.CORE, *version_matrix.MODELS) if name.startswith("tests/")]
    assert all((ROOT / name).is_file() for name in named)


def test_a_python_that_is_not_there_is_said(monkeypatch, table):
    """In a row for each release that was asked for; nothing is installed."""
    monkeypatch.setattr(version_matrix, "step", None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PYENV_ROOT", "")
    monkeypatch.setenv("HOME", "/nowhere")
    version_matrix.run_on("3.12", "3.3.1", ["", "1.2.0"])
    assert [(row["paddleformers"], row["result"]) for row in table()] == [
        ("", "not run: no interpreter"),
        ("1.2.0", "not run: no interpreter"),
    ]


def test_a_newer_row_takes_the_place_of_the_older_one(table):
    """Rows are in the order of their versions, as numbers."""
    for python, result in (("3.12", "passes"), ("3.9", "passes"), ("3.10", "passes"), ("3.12", "not run: why")):
        version_matrix.record(python=python, paddle="3.3.1", paddleformers="", result=result)
    assert [(row["python"], row["result"]) for row in table()] == [
        ("3.9", "passes"),
        ("3.10", "passes"),
        ("3.12", "not run: why"),
    ]


def test_what_was_not_reached_stands_in_the_table(monkeypatch, table):
    """All PaddleFormers on 3.11, the newest elsewhere; --missing runs what is not there, and nothing else."""
    wanted = version_matrix.combinations(["3.10", "3.11"], ["3.3.1"], ["1.2.0", "1.1.1"])
    assert wanted == {("3.11", "3.3.1"): ["", "1.2.0", "1.1.1"], ("3.10", "3.3.1"): ["", "1.2.0"]}
    version_matrix.record(python="3.10", paddle="3.3.1", paddleformers="", result="passes")
    version_matrix.record(python="3.11", paddle="3.3.1", paddleformers="", result="not run: no interpreter")
    asked = []
    monkeypatch.setattr(version_matrix, "run_on", lambda *given: asked.append(given))
    version_matrix.run_all(wanted, only_missing=True)
    assert asked == [("3.11", "3.3.1", ["", "1.2.0", "1.1.1"]), ("3.10", "3.3.1", ["1.2.0"])]
    assert [row["result"] for row in table() if row["paddleformers"] == "1.1.1"] == ["not run: not yet"]


def test_releases_that_were_not_run_share_a_line(table):
    """Newest first, by environment and reason; what was run has a row."""
    for formers, result in (("0.4.1", "not run: not yet"), ("0.10.0", "not run: not yet"), ("1.2.0", "passes")):
        version_matrix.record(python="3.11", paddle="3.3.1", paddleformers=formers, result=result)
    text = version_matrix.page(table())
    assert text.endswith("\n\n* Python 3.11, Paddle 3.3.1, not run: not yet: 0.10.0, 0.4.1\n")
    assert re.findall(r"^\| (\d\S*) \| 3.11", text, re.MULTILINE) == ["1.2.0"]


def test_what_pip_and_pytest_say_is_read(monkeypatch, tmp_path):
    """Exact: releases newest first, counts, and the first test that fails."""
    says(monkeypatch, "paddlepaddle (3.10.0)\nAvailable versions: 3.10.0, 3.3.1, 3.2.2\n  INSTALLED: 3.3.1\n")
    assert version_matrix.releases("paddlepaddle") == ["3.10.0", "3.3.1", "3.2.2"]
    lines = (
        "E   ValueError: got 3 (/tmp/x/y.py)",
        "FAILED tests/a.py::test_b[1] - ...",
        "1 failed, 40 passed, 2 skipped in 3s",
    )
    says(monkeypatch, "\n".join(lines), 1)
    failed = {"result": "1 of 41 fail, tests/a.py::test_b[1] first: ValueError: got 3", "passed": "40", "skipped": "2"}
    assert version_matrix.tests("python", tmp_path, []) == failed
    says(monkeypatch, "40 passed, 2 skipped in 3s\n")
    assert version_matrix.tests("python", tmp_path, []) == {"result": "passes", "passed": "40", "skipped": "2"}


def test_what_doctor_says_is_summed_up():
    """Verdicts by family; of the clauses how many hold, and whose do not."""
    subjects = {
        "GLM-OCR": "known; 1 method",
        "Qwen3-VL": "refused: it is gone",
        "contract, GLM-OCR": "it adds",
        "contract, Qwen3-VL": "it cuts: no",
    }
    checks = [{"subject": name, "message": text, "state": "PASS"} for name, text in subjects.items()]
    assert version_matrix.families(checks) == "GLM-OCR known, Qwen3-VL refused"
    assert version_matrix.clauses(checks) == "2 of 2 clauses hold"
    checks[-1]["state"] = "FAIL"
    assert version_matrix.clauses(checks) == "1 of 2 clauses hold, not those of Qwen3-VL"
    checks.append({"subject": "upstream, Qwen2.5-VL", "message": "cannot be imported", "state": "FAIL"})
    assert version_matrix.clauses(checks) == "1 of 2 clauses hold, not those of Qwen3-VL; it lacks Qwen2.5-VL"
    assert version_matrix.clauses([]) == "nothing to replace"


def test_where_tests_cannot_be_imported_the_clauses_are_said(monkeypatch, tmp_path):
    """Of the release that requirements.txt names; another one's are not tried."""
    checks = [{"subject": "contract, GLM-OCR", "message": "it adds", "state": "PASS"}]
    says(monkeypatch, json.dumps({"checks": checks}))
    tried = []
    monkeypatch.setattr(version_matrix, "install", lambda *_: None)
    monkeypatch.setattr(version_matrix, "tests", lambda *_: tried.append(_) or {"result": "fails", "passed": "0"})
    assert version_matrix.try_formers("python", tmp_path, "0.1") == {"result": "1 of 1 clauses hold", "families": ""}
    assert not tried
    pinned = re.search("paddleformers==(.*)", (ROOT / "requirements.txt").read_text())[1]
    assert version_matrix.try_formers("python", tmp_path, pinned)["result"] == "1 of 1 clauses hold; fails"
