"""Many cases in one launch: each is told by its name, also the one that hangs or ends its process.

LAUNCHES = {2: CASES, 4: CASES}  # number of ranks: cases, a list of functions or a dict with their names

@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    hold(__name__, nranks, case)
"""

import faulthandler
import functools
import importlib
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from paddle_vl_sp.testing import RanksFailed, run_ranks
from paddle_vl_sp.testing.launch import _write_whole

LIMIT = 100.0  # seconds of one case; a rank that needs more is ended, with the line where it stood
WHOLE_LIMIT = 240.0  # seconds of one launch
PATIENCE = 3.0  # seconds that a rank whose case failed waits for the others to end it
FRESH_STARTS = 5  # launches for what comes after cases that failed; then all that is left runs in one


def pairs(launches):
    """(nranks, name) of every case, for pytest's parametrize."""
    return [(nranks, name) for nranks, cases in launches.items() for name in by_name(cases)]


def by_name(cases):
    return cases if isinstance(cases, dict) else {case.__name__: case for case in cases}


def hold(module, nranks, name, limit=LIMIT):
    """Fails with what each rank says about one case of the module's LAUNCHES."""
    story = stories(module, nranks, limit)[name]
    if story:
        pytest.fail(story, pytrace=False)


@functools.cache
def stories(module, nranks, limit=LIMIT):
    """{name: what went wrong on any rank, or ""}. What comes after a case that failed runs in another launch."""
    left, found, starts = list(by_name(importlib.import_module(module).LAUNCHES[nranks])), {}, 0
    while left:
        ended, error = _launch(module, nranks, left, limit, stops=starts < FRESH_STARTS)
        found |= ended
        left, starts = left[len(ended) :], starts + 1
        if error and not left:
            raise RanksFailed(error)
        if error:
            found[left[0]] = f"in {left[0]}: {error}"
            left = left[1:]
    return found


def _launch(module, nranks, names, limit, stops):
    """The cases that all ranks ended, in order, and what stopped the launch before the next one had ended, or ""."""
    with tempfile.TemporaryDirectory(prefix="vlsp-cases-") as folder:
        error = ""
        try:
            run_ranks(_run, nranks, module, nranks, names, folder, limit, stops, timeout=WHOLE_LIMIT)
        except RanksFailed as failed:
            error = str(failed)
        ended = {}
        for number, name in enumerate(names):
            files = _files(folder, number, nranks)
            if not _exist(files):
                break
            told = [(rank, file.read_text()) for rank, file in enumerate(files)]
            ended[name] = "\n".join(f"rank {rank}: {story}" for rank, story in told if story)
        return ended, error


def _run(module, nranks, names, folder, limit, stops):
    """On every rank; each case leaves a file with what went wrong. Ranks end a case together, and stop together."""
    import paddle.distributed as dist

    cases = by_name(importlib.import_module(module).LAUNCHES[nranks])
    for number, name in enumerate(names):
        files = _files(folder, number, nranks)
        faulthandler.dump_traceback_later(limit, exit=True)
        story = _story(cases[name])
        faulthandler.cancel_dump_traceback_later()
        _write_whole(files[dist.get_rank()], story.encode())
        deadline = time.monotonic() + (PATIENCE if story else WHOLE_LIMIT)
        while not _exist(files) and time.monotonic() < deadline:
            time.sleep(0.002)
        if not _exist(files):
            files[dist.get_rank()].unlink()
            raise AssertionError(f"failed here, and other ranks wait in it:\n{story}")
        if stops and any(file.stat().st_size for file in files):
            return  # the group may not be fit for another case


def _story(case):
    try:
        case()
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return ""


def _exist(files):
    return all(file.exists() for file in files)


def _files(folder, number, nranks):
    return [Path(folder, f"{number}-{rank}") for rank in range(nranks)]


def same_error_everywhere(call, group, *parts):
    """Every rank must raise a ValueError with these parts; the words must be the same on all."""
    from paddle_vl_sp.comm.agree import check_same, fingerprint

    with pytest.raises(ValueError, match="(?s)" + ".*".join(parts)) as caught:
        call()
    check_same(fingerprint(str(caught.value)), f"words, and not {caught.value}", group)
