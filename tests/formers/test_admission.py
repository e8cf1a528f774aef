"""Which code of PaddleFormers may be replaced that is not the known one: what means the same, and nothing else."""

import csv
import dataclasses
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import paddleformers
import pytest
from fleet_mutants import FLEET_MUTANTS
from mutants import MUTANTS as FORMERS_MUTANTS
from mutants import OTHER, SAME, Mutant, in_place, rename
from training import importable, module_of

from paddle_vl_sp.formers import admission
from paddle_vl_sp.formers.admission import Verdict, judge, try_clauses, verdict_on
from paddle_vl_sp.formers.families import FAMILIES, qwen2_5_vl

FAMILY = qwen2_5_vl.FAMILY
MODULE = module_of(FAMILY)
ROOT = Path(__file__).parents[2]
RENAMED = Mutant(FAMILY, "Qwen2_5_VLModel.forward", SAME, "other names", (rename("image_embeds", "image_rows"),))
PASSED = ("", 2, ())
MUTANTS = [*FORMERS_MUTANTS, *FLEET_MUTANTS]


def about(mutant):
    """The family with the clauses that name the method, or else all; docs/admission.csv is made with all of them."""
    named = tuple(clause for clause in mutant.family.contract if clause.says.startswith(f"{mutant.method} "))
    return dataclasses.replace(mutant.family, contract=named or mutant.family.contract)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_an_edit_is_judged_by_what_it_means(mutant):
    """Another meaning of what ours replace breaks a clause; the same meaning, or another one elsewhere, breaks none."""
    with importable(mutant.family), in_place(mutant, module_of(mutant.family)):
        module = module_of(mutant.family)
        broken = [f"{says}: {why}" for says, why in try_clauses(about(mutant), module, is_shared=False) if why]
    assert bool(broken) == (mutant.kind == OTHER), broken


def test_the_table_is_of_these_edits():
    """docs/admission.csv has each of them once, with all clauses tried: what is other is refused, and nothing else."""
    with (ROOT / "docs" / "admission.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["edit"]) for row in rows] == [(mutant.method, mutant.name) for mutant in MUTANTS]
    assert all((row["the edited code is"] == OTHER) == (row["verdict"] == "refused") for row in rows)
    assert Counter(row["verdict"] for row in rows)["refused"] >= 50


def test_every_family_has_a_contract_that_the_known_code_keeps():
    """Each clause that can be tried here, those of sharing the tower's work as well."""
    for family in (family for families in FAMILIES.values() for family in families):
        assert family.contract or not family.replaced
        if family.name == "PaddleOCR-VL":
            continue  # wants triton
        with importable(family):
            assert [why for _, why in try_clauses(family, module_of(family), is_shared=True) if why] == []


@pytest.fixture
def renamed(monkeypatch, tmp_path):
    """Qwen2.5-VL's forward with other names, as if its file had them; a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with in_place(RENAMED, MODULE):
        function = MODULE.Qwen2_5_VLModel.forward
        monkeypatch.setattr(function, "__code__", function.__code__.replace(co_filename=MODULE.__file__))
        monkeypatch.setattr("paddle_vl_sp.formers.known.fingerprint", lambda _: "0123456789abcdef")
        yield


@pytest.fixture
def tried(monkeypatch):
    """How often another process would have tried; what it answers is PASSED."""
    calls = []
    answer = lambda family, key, is_shared: (calls.append(family.name), Verdict(key, *PASSED[1:]))[1]  # noqa: E731
    monkeypatch.setattr(admission, "_tried_elsewhere", answer)
    return calls


@pytest.mark.usefixtures("renamed")
def test_a_verdict_is_kept_by_the_code_it_is_of(monkeypatch, tried):
    """One trial for many ranks; another one for other code; none of it where it is switched off."""
    assert not judge(FAMILY, MODULE).refused
    assert "not the known code, but all that is needed of it holds (2 trials)" in judge(FAMILY, MODULE).admitted
    assert len(tried) == 1
    judge(FAMILY, MODULE, is_shared=True)  # more is asked of it
    assert len(tried) == 2
    kept = list(admission.cache_folder().glob("*.json"))
    assert len(kept) == 2
    for file in kept:
        file.write_text('{"key": 1')  # written by a process that died
    judge(FAMILY, MODULE)
    assert len(tried) == 3
    monkeypatch.setenv("PADDLE_VL_SP_PROBE", "always")
    judge(FAMILY, MODULE)
    assert len(tried) == 4
    monkeypatch.setenv("PADDLE_VL_SP_PROBE", "never")
    assert "has fingerprint" in judge(FAMILY, MODULE).refused[0]
    assert len(tried) == 4


@pytest.mark.usefixtures("renamed")
def test_ranks_of_one_machine_wait_for_the_first(monkeypatch):
    """Four at once, one trial."""
    calls, started = [], threading.Barrier(4)

    def slow(family, key, is_shared):
        calls.append(key)
        threading.Event().wait(0.2)
        return Verdict(key, 2, ())

    monkeypatch.setattr(admission, "_tried_elsewhere", slow)
    found = []

    def rank():
        started.wait()
        found.append(verdict_on(FAMILY, MODULE, is_shared=False))

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(found)) == (1, 4)


@pytest.mark.usefixtures("renamed")
def test_without_a_folder_to_write_to(monkeypatch, tmp_path, tried):
    """Each process tries; nothing fails."""
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert not judge(FAMILY, MODULE).refused
    assert not judge(FAMILY, MODULE).refused
    assert len(tried) == 2


@pytest.mark.usefixtures("renamed")
def test_code_that_another_process_does_not_find_is_refused():
    """Only this process has the edit: the trial says so, and nothing is kept."""
    refused = judge(FAMILY, MODULE).refused
    assert refused[-1] == "it cannot be tried: a process of its own finds other code"
    assert not list(admission.cache_folder().glob("*.json"))


@pytest.mark.usefixtures("renamed")
def test_a_trial_that_hangs_ends_the_run(monkeypatch):
    """Also with strict=False: a rank that leaves alone what others replace would hang them."""
    monkeypatch.setattr(admission, "TIMEOUT", 0.01)
    with pytest.raises(RuntimeError, match=r"trying it took more than 0.01 seconds: run .*doctor.*PADDLE_VL_SP_PROBE"):
        judge(FAMILY, MODULE)


SCRIPT = """
import logging, sys
from paddle_vl_sp.formers import UpstreamChanged, apply_to_paddleformers
from paddle_vl_sp.settings import PROBE
import os
for families in ("qwen2_5_vl", "glm_ocr"):
    for setting in ("cached", "cached", "never"):
        os.environ[PROBE] = setting
        try:
            with apply_to_paddleformers(families=families) as report:
                print("RESULT", families, setting, report.lines[0].state, report.lines[0].why)
        except UpstreamChanged as error:
            print("RESULT", families, setting, "refused", str(error).replace(chr(10), " "))
with apply_to_paddleformers(families="glm_ocr", strict=False) as report:
    print("RESULT", "glm_ocr", "strict=False", report.lines[0].state)
"""


def test_an_edited_paddleformers(tmp_path):
    """On disk: other names are admitted, once tried; half the features are refused, with the clause that they break."""
    edits = {
        "qwen2_5_vl": lambda source: source.replace("image_embeds", "image_rows"),
        "glm_ocr": lambda source: source.replace("image_mask, image_embeds)", "image_mask, image_embeds * 0.5)"),
    }
    other_paddleformers(tmp_path / "site", edits)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=200)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(lines) == 7, done.stderr[-2000:]
    first, again, never, *others = lines
    assert first.startswith("qwen2_5_vl cached replaced Inserts the features by one plan")
    assert "admitted: not the known code, but all that is needed of it holds (2 trials)" in first
    assert again == first
    assert never.startswith("qwen2_5_vl never refused PaddleFormers 1.2.0 is not as known")
    for line in others[:2]:
        assert line.startswith("glm_ocr cached refused")
        assert "tiny_glm_ocr: loss and gradients are ours: images: 97 of 97 values differ" in line
    assert others[3] == "glm_ocr strict=False left alone"
    assert done.stderr.count("trying it, once") == 2


def other_paddleformers(folder, edits):
    """The installed one under links, with edited modeling.py of these models."""
    installed = Path(paddleformers.__file__).parent
    models = folder / "paddleformers" / "transformers"
    models.mkdir(parents=True)
    _link_all(installed, models.parent, but=["transformers"])
    _link_all(installed / "transformers", models, but=edits)
    for model, edit in edits.items():
        (models / model).mkdir()
        _link_all(installed / "transformers" / model, models / model, but=["modeling.py"])
        source = (installed / "transformers" / model / "modeling.py").read_text(encoding="utf-8")
        assert edit(source) != source
        (models / model / "modeling.py").write_text(edit(source), encoding="utf-8")


def _link_all(source, target, but):
    for entry in source.iterdir():
        if entry.name not in {*but, "__pycache__"}:
            (target / entry.name).symlink_to(entry)
