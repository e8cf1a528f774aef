"""Any rank of any group as a value (`FakeGroup`), and real ranks with real collectives on the CPU (`run_ranks`)."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.testing.shown import ShownOutput

START_LIMIT = 180.0  # seconds for all ranks to import Paddle and to form a group
GRACE = 5.0  # seconds for the other ranks to end by themselves once one has failed
GROUP_MAKERS = ("init_parallel_env", "new_group", "_new_process_group_impl")
GROUP_ATTEMPTS = 4
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class FakeGroup:
    """A process group without processes, as one of its `nranks` ranks sees it; nothing can be sent in it.

    rank   within the group
    ranks  the global ranks of its members; 0 to nranks - 1 if not given

    >>> group = FakeGroup(1, 2, ranks=[6, 7])
    >>> group.rank, group.world_size, group.get_group_rank(7)
    (1, 2, 1)
    """

    def __init__(self, rank: int, nranks: int, ranks: Sequence[int] | None = None) -> None:
        self.ranks = list(range(nranks)) if ranks is None else list(ranks)
        if len(self.ranks) != nranks or not 0 <= rank < nranks:
            raise ValueError(f"rank {rank} of {nranks} does not fit the members {self.ranks}")
        self.rank = rank
        self.nranks = nranks
        self.id = 0

    @property
    def world_size(self) -> int:
        return self.nranks

    def get_group_rank(self, rank: int) -> int:
        return self.ranks.index(rank) if rank in self.ranks else -1

    def is_member(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"FakeGroup(rank={self.rank}, nranks={self.nranks}, ranks={self.ranks})"


class RanksFailed(AssertionError):
    """Ranks failed or did not end in time; the message has the error of each, or the line that it was at."""


def run_ranks(fn: Callable[..., Any], nranks: int, *args: Any, timeout: float = 60, show: bool = False) -> list[Any]:
    """Calls fn(*args) in `nranks` new processes joined by Paddle's gloo backend; returns what each returned, by rank.

    fn must be importable (a function of a module), and args and results picklable. Each process uses the CPU, with
    paddle.distributed initialised and all ranks in the default group. `timeout` is for fn, without the start. If a rank
    fails or the time is up, all are ended and RanksFailed says, rank by rank, the error or the line that it was at. A
    run that failed while process groups were made is started again, since gloo sometimes refuses connections on one
    machine; nothing else is tried twice. With `show`, what a rank prints is printed here while it runs, each line
    with its rank.

    A launch takes seconds: let one launch run many cases. The ranks end with this process, however it ends. ::

        run_ranks(train, 2, settings, timeout=300, show=True)  # [rank 0] step 1: loss 6.2
    """
    if fn.__module__ == "__main__" or "<" in fn.__qualname__:
        raise ValueError(
            f"run_ranks needs a function that other processes can import, got {fn.__module__}.{fn.__qualname__}: "
            "put it into a module, at its top level"
        )
    if nranks < 1:
        raise ValueError(f"nranks must be at least 1, got {nranks}")
    with _sigterm_at_the_end() as told_to_end:
        for attempt in range(1, GROUP_ATTEMPTS + 1):
            with tempfile.TemporaryDirectory(prefix="vlsp-ranks-") as folder:
                reports = _Launch(Path(folder), fn, nranks, args, told_to_end).run(timeout, show)
            if all(report.ended for report in reports):
                return [report.result for report in reports]
            if told_to_end or attempt == GROUP_ATTEMPTS or not _failed_making_groups(reports):
                break
    raise RanksFailed(f"{fn.__module__}.{fn.__qualname__} on {nranks} ranks\n" + "\n".join(map(str, reports)))


@contextlib.contextmanager
def _sigterm_at_the_end() -> Iterator[list[int]]:
    """Holds a SIGTERM back to the end of the block, which looks for it in the list; a handler of the caller's stays."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield received
        return
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class _Report:
    rank: int
    has_started: bool
    ended: bool
    result: Any
    story: str  # the error, or the stack when the time was up

    def __str__(self) -> str:
        return f"--- rank {self.rank}: {'ended' if self.ended else self.story.rstrip()}"


def _failed_making_groups(reports: list[_Report]) -> bool:
    """While groups were made, or in the barrier before fn: gloo lost a connection, and the others may have gone on."""
    failed = [report for report in reports if not report.ended]
    return any(
        f" in {maker}\n" in report.story
        for report in failed
        for maker in (GROUP_MAKERS if report.has_started else (*GROUP_MAKERS, "barrier"))
    )


class _Launch:
    """The processes of one run. They report in files of one folder: started, result, error, stack, output."""

    def __init__(
        self, folder: Path, fn: Callable[..., Any], nranks: int, args: tuple[Any, ...], told_to_end: Sequence[int]
    ) -> None:
        self.folder = folder
        self.told_to_end = told_to_end
        self.nranks = nranks
        task = {"path": [*sys.path, os.getcwd()], "module": fn.__module__, "name": fn.__qualname__, "args": args}
        (folder / "task").write_bytes(pickle.dumps(task))
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self, timeout: float, show: bool) -> list[_Report]:
        endpoints = [f"127.0.0.1:{port}" for port in _free_ports(self.nranks)]
        try:
            for rank in range(self.nranks):
                self.processes.append(self._start(rank, endpoints))
            why = self._wait(timeout, show)
            if why:
                self._dump_stacks()
        finally:  # also where the caller is interrupted, while they start too
            for process in self.processes:
                _end(process)
        return [self._report(rank, why) for rank in range(self.nranks)]

    def _start(self, rank: int, endpoints: list[str]) -> subprocess.Popen[bytes]:
        env = os.environ | {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": str(self.nranks),
            "PADDLE_RANK_IN_NODE": str(rank),  # PaddleFormers' trainer reads this one and the next
            "PADDLE_LOCAL_SIZE": str(self.nranks),
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
            "PADDLE_DISTRI_BACKEND": "gloo",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "GLOG_minloglevel": "3",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1",
        }
        command = [
            sys.executable,
            "-c",
            "from paddle_vl_sp.testing.launch import _child; _child()",
            str(self.folder),
            str(rank),
            str(os.getpid()),
        ]
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with (self.folder / f"{rank}.output").open("wb") as output:
            return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def _wait(self, timeout: float, show: bool) -> str:
        """Waits for all processes to end: "", or the reason why they must be ended."""
        with contextlib.ExitStack() as at_the_end:
            shown: list[ShownOutput] = []

            def show_new() -> None:
                if show and not shown and self._all_have_started():
                    shown.append(at_the_end.enter_context(ShownOutput(self._outputs())))
                for each in shown:
                    each.update()

            why = self._wait_and(timeout, show_new)
            show_new()  # of ranks that were quick, too
            return why

    def _wait_and(self, timeout: float, show_new: Callable[[], None]) -> str:
        deadline, limit = time.monotonic() + START_LIMIT, f"did not start within {START_LIMIT:g} s"
        running = failing = False
        while any(process.poll() is None for process in self.processes):
            if not running and self._all_have_started():
                running = True
                deadline, limit = time.monotonic() + timeout, f"did not end within {timeout:g} s"
            if not failing and any(process.poll() not in (None, 0) for process in self.processes):
                failing = True
                deadline, limit = min(deadline, time.monotonic() + GRACE), "was still waiting after another rank failed"
            if time.monotonic() > deadline:
                return limit
            if self.told_to_end:
                return "was ended, since the process that started it was"
            show_new()
            time.sleep(0.02)
        return ""

    def _all_have_started(self) -> bool:
        return all(self._file(rank, "started").exists() for rank in range(self.nranks))

    def _outputs(self) -> list[tuple[Path, int]]:
        """The files, and where fn's own output begins, after that of Paddle's start."""
        starts = [int(self._file(rank, "started").read_text()) for rank in range(self.nranks)]
        return [(self._file(rank, "output"), start) for rank, start in enumerate(starts)]

    def _dump_stacks(self) -> None:
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)

    def _report(self, rank: int, why: str) -> _Report:
        has_started = self._file(rank, "started").exists()
        if self._file(rank, "result").exists():
            return _Report(rank, has_started, True, pickle.loads(self._file(rank, "result").read_bytes()), "")
        for name, lead in (("error", ""), ("stack", f"{why}; it was at\n")):
            if self._file(rank, name).exists() and self._file(rank, name).stat().st_size:
                return _Report(rank, has_started, False, None, lead + self._file(rank, name).read_text())
        code = self.processes[rank].returncode
        output = self._file(rank, "output").read_text()[-3000:]
        return _Report(rank, has_started, False, None, f"ended with code {code}\n{output}")

    def _file(self, rank: int, name: str) -> Path:
        return self.folder / f"{rank}.{name}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(process: subprocess.Popen[bytes]) -> None:
    """With the processes that it started, as those of a data loader: it began a session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_with_parent(parent: int) -> None:
    """Linux ends this process when the thread that started it ends, be it by SIGKILL."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _child() -> None:
    """The process of one rank, started by _Launch with a folder, a rank and the number of its own process."""
    folder, rank = Path(sys.argv[1]), sys.argv[2]
    _end_with_parent(int(sys.argv[3]))
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        try:
            result = _run_task(folder, rank)
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            raise
        _write_whole(folder / f"{rank}.result", pickle.dumps(result))
        os._exit(0)  # gloo's threads may outlive the others' sockets and abort at interpreter exit


def _run_task(folder: Path, rank: str) -> Any:
    task = pickle.loads((folder / "task").read_bytes())
    sys.path[:] = task["path"]
    import paddle

    paddle.set_device("cpu")
    paddle.distributed.init_parallel_env()
    if paddle.distributed.get_world_size() > 1:
        paddle.distributed.barrier()  # the others join through the first rank, which must not end before they have
    fn: Any = importlib.import_module(task["module"])
    for part in task["name"].split("."):
        fn = getattr(fn, part)
    _write_whole(folder / f"{rank}.started", str(os.fstat(1).st_size).encode())
    return fn(*task["args"])


def _write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that another process sees all of it or none of it."""
    path.with_suffix(".part").write_bytes(data)
    path.with_suffix(".part").rename(path)
