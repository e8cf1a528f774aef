"""The launcher: results in rank order, errors with their rank, a hang ended in time with the line it stood at."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import paddle
import paddle.distributed as dist
import pytest

from paddle_vl_sp.testing import RanksFailed, run_ranks
from paddle_vl_sp.testing.launch import _failed_making_groups, _Report, _sigterm_at_the_end
from paddle_vl_sp.testing.shown import ShownOutput


def sum_of_ranks(scale):
    x = paddle.to_tensor([float(dist.get_rank())]) * scale
    dist.all_reduce(x)
    sys.stdout.write(f"sum {x.item()}\nno line end")
    return dist.get_rank(), x.item(), os.environ["PADDLE_RANK_IN_NODE"], os.environ["PADDLE_LOCAL_SIZE"]


def dist_rank():
    return dist.get_rank()


def fail_on_one():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 says no, with numbers 3 and 4")
    dist.all_reduce(paddle.ones([1]))


def hang_on_one():
    if dist.get_rank() == 1:
        time.sleep(1000)  # the line that the report must show


def die_silently():
    if dist.get_rank() == 0:
        os._exit(7)


def hang_everywhere():
    time.sleep(1000)


class Interrupted(Exception):
    """No OSError, of which `subprocess` swallows some."""


@pytest.mark.parametrize(
    ("has_started", "place", "is_tried_again"),
    [(False, "barrier", True), (True, "barrier", False), (True, "new_group", True), (False, "all_reduce", False)],
)
def test_only_a_failure_to_make_groups_is_tried_again(has_started, place, is_tried_again):
    """The barrier before fn belongs to it, one within fn does not; a rank that ended says nothing."""
    story = f'  File "paddle/group.py", line 354, in {place}\n    task.wait()\n'
    ended = _Report(0, True, True, None, f" in {place}\n" if place == "new_group" else "")
    assert _failed_making_groups([ended, _Report(1, has_started, False, None, story)]) is is_tried_again
    assert not _failed_making_groups([ended])


@pytest.mark.parametrize("nranks", [2, 4])
def test_results_come_in_rank_order(nranks, capsys):
    """Exact, through a real collective; shown are all lines, each once, with its rank; and what a trainer reads."""
    total = 10.0 * sum(range(nranks))
    results = run_ranks(sum_of_ranks, nranks, 10.0, show=True)
    assert results == [(rank, total, str(rank), str(nranks)) for rank in range(nranks)]
    shown = capsys.readouterr().out.splitlines()
    for rank in range(nranks):
        assert [line for line in shown if f"rank {rank}" in line] == [
            f"[rank {rank}] sum {total}",
            f"[rank {rank}] no line end",
        ]


def test_lines_are_shown_whole(capsys, tmp_path):
    """From the offset on, whole lines as they come, the rest at the end."""
    file = tmp_path / "0.output"
    file.write_text("before\none\ntw")
    with ShownOutput([(file, 7)]) as shown:
        shown.update()
        assert capsys.readouterr().out == "[rank 0] one\n"
        with file.open("a") as more:
            more.write("o\nthree")
        shown.update()
        assert capsys.readouterr().out == "[rank 0] two\n"
    assert capsys.readouterr().out == "[rank 0] three\n"


def test_a_rank_that_ends_at_once_leaves_none_behind(monkeypatch):
    """The others join through the first rank: it stays until they have, and no launch is needed a third time."""
    monkeypatch.setattr("paddle_vl_sp.testing.launch.GROUP_ATTEMPTS", 2)
    assert run_ranks(dist_rank, 4) == [0, 1, 2, 3]


def test_an_error_is_told_with_its_rank_and_ends_the_others():
    """The words of the error, and where the other rank stood."""
    with pytest.raises(RanksFailed, match=r"(?s)rank 0: .*all_reduce.*rank 1: .*no, with numbers 3 and 4"):
        run_ranks(fail_on_one, 2)


def test_a_function_that_other_processes_cannot_import_is_refused_at_once():
    """Refused before a process is started."""
    with pytest.raises(ValueError, match=r"can import, got .*lambda.*put it into a module"):
        run_ranks(lambda: None, 2)
    with pytest.raises(ValueError, match="nranks must be at least 1, got 0"):
        run_ranks(die_silently, 0)


def test_a_hang_is_ended_and_its_line_is_told():
    """Ended after the time that was given, with the function in which it stood."""
    with pytest.raises(RanksFailed, match=r"(?s)rank 0: ended.*rank 1: did not end within 2 s.*in hang_on_one"):
        run_ranks(hang_on_one, 2, timeout=2)


def test_a_silent_death_is_told():
    """By its exit code."""
    with pytest.raises(RanksFailed, match="rank 0: ended with code 7"):
        run_ranks(die_silently, 2)


def test_whoever_is_interrupted_leaves_no_ranks_behind(monkeypatch):
    """As by a time limit of the test runner."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[-1])

    def interrupt(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        with pytest.raises(Interrupted):
            run_ranks(hang_everywhere, 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(started) >= 2  # more where the first were started again
    assert all(process.poll() is not None for process in started)


HANGING = """
import os, subprocess, sys, time
from pathlib import Path
from paddle_vl_sp.testing import run_ranks

def note_and_hang(folder):
    worker = subprocess.Popen(["sleep", "1000"])
    for pid in (worker.pid, os.getpid()):
        (Path(folder) / f"{pid}").touch()
    time.sleep(1000)
"""
LAUNCHER = "import hanging, sys; hanging.run_ranks(hanging.note_and_hang, 1, sys.argv[1])"  # imports no Paddle


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_a_worker(pid):
    return is_running(pid) and b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()


def wait_until(happened, seconds):
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()


def test_a_launcher_takes_all_along_however_it_ends(tmp_path):
    """Ended by each signal, with no rank, and no process of a rank, running; only SIGKILL leaves a temporary folder."""
    (tmp_path / "hanging.py").write_text(HANGING)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    launchers, started = {}, []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        pids, temporary = tmp_path / f"pids {number}", tmp_path / f"temporary {number}"
        pids.mkdir()
        temporary.mkdir()
        command = [sys.executable, "-c", LAUNCHER, str(pids)]
        env = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)}
        # a shell's background job ignores Ctrl-C, and so would all that it starts
        hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        launchers[number] = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, preexec_fn=hears)
    try:
        assert wait_until(lambda: len(list(tmp_path.glob("pids */*"))) == 2 * len(launchers), 120)
        for number, launcher in launchers.items():
            launcher.send_signal(number)
            assert launcher.wait(20) == -number
            ranks = [int(path.name) for path in (tmp_path / f"pids {number}").iterdir()]
            started += ranks
            if number == signal.SIGKILL:
                ranks = [rank for rank in ranks if not is_a_worker(rank)]  # they end only if they look for their parent
            assert wait_until(lambda ranks=ranks: not any(map(is_running, ranks)), 5), number
            left = list((tmp_path / f"temporary {number}").glob("vlsp-ranks-*"))
            assert bool(left) == (number == signal.SIGKILL)
    finally:
        for launcher in launchers.values():
            launcher.kill()
        for rank in filter(is_running, started):
            os.kill(rank, signal.SIGKILL)


def test_a_handler_of_the_callers_stays():
    """Identity, inside and after; and the default is back after a block without one."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        own = signal.getsignal(signal.SIGTERM)
        with _sigterm_at_the_end():
            assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with _sigterm_at_the_end() as received:
            os.kill(os.getpid(), signal.SIGTERM)
            assert received.pop() == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
