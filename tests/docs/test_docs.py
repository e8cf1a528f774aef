"""The code blocks of the pages: they run, on one process, on ranks or as tests; what cannot run names what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import docs_blocks
import pytest
from docs_blocks import NOTES, PAGES, ROOT, blocks_of, python, python_blocks
from docs_ranks import blocks_on_ranks

from paddle_vl_sp.testing import run_ranks

LANGUAGES = {"python", "bash", "yaml", "json", ""}

each_page = pytest.mark.parametrize("page", PAGES)


def blocks_that(how):
    return pytest.mark.parametrize("block", [str(block) for block in python_blocks() if block.how == how])


def hold(told, block):
    if told[block].startswith("skip: "):
        pytest.skip(told[block])
    assert told[block] == ""


@pytest.fixture(scope="module")
def told_by_one_process():
    done = python(docs_blocks.__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def told_by_ranks():
    """The first complaint of any rank, and how far each rank's gradients of the own loop are from one process'."""
    of_ranks = run_ranks(blocks_on_ranks, 2)
    told = {block: next(filter(None, (told[block] for told, _ in of_ranks)), "") for block in of_ranks[0][0]}
    return told, [errors for _, errors in of_ranks]


@pytest.fixture(scope="module")
def told_by_pytest(tmp_path_factory):
    """Every block is a file of tests; one pytest runs them all."""
    folder = tmp_path_factory.mktemp("pages")
    files = {}
    for block in (block for block in python_blocks() if block.how == "pytest"):
        file = folder / f"test_{Path(block.page).stem}_{block.number}.py"
        file.write_text(block.source)
        files[str(block)] = file
    done = python("-m", "pytest", "-vv", "-p", "no:cacheprovider", "--rootdir", folder, folder)
    outcomes = {block: _outcomes(done.stdout, file.name) for block, file in files.items()}
    told = {frozenset({"PASSED"}): "", frozenset({"SKIPPED"}): "skip: by its own importorskip"}
    return {block: told.get(frozenset(found), done.stdout) for block, found in outcomes.items()}


def _outcomes(told, file):
    """What became of the file's tests; nothing where it has none."""
    return set(re.findall(rf"{re.escape(file)}::\S+ (\w+)", told))


@blocks_that("run")
def test_a_block_runs(told_by_one_process, block):
    hold(told_by_one_process, block)


@blocks_that("ranks")
def test_a_block_runs_on_ranks(told_by_ranks, block):
    hold(told_by_ranks[0], block)


def test_the_own_loop_has_the_gradients_of_one_process(told_by_ranks):
    """fp32 sums in another order: 1e-6 of each parameter's largest value.

    Without complete_grad, or summed twice, the tower fails it.
    """
    for error in told_by_ranks[1]:
        assert error["whole"] < 1e-6
        assert error["context parallel"] < 1e-6
        assert error["without complete_grad"] > 0.5
        assert error["a tower summed twice"] > 0.5


@blocks_that("pytest")
def test_a_block_of_tests_passes(told_by_pytest, block):
    hold(told_by_pytest, block)


@blocks_that("compile")
def test_a_block_that_cannot_run_names_what_exists(told_by_one_process, block):
    hold(told_by_one_process, block)


@each_page
def test_every_block_is_of_a_known_language_and_every_note_is_understood(page):
    for block in blocks_of(ROOT / page):
        assert block.language in LANGUAGES, block
        assert all(NOTES.fullmatch(note) for note in block.notes), (block, block.notes)


@each_page
def test_yaml_and_json_parse(page):
    for block in blocks_of(ROOT / page):
        if block.language == "yaml":
            assert pytest.importorskip("yaml").safe_load(block.source), block
        if block.language == "json":
            json.loads(block.source)
