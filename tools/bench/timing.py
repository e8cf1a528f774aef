"""Contenders beside each other in one process, round after round: medians of ratios, against a memory floor."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import paddle

from paddle_vl_sp import backend

# glibc maps every larger block anew and gives it back at once: without this, large tensors measure page faults.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
SYNCHRONISING_METHODS = ("item", "numpy", "tolist", "__int__", "__float__", "__bool__", "__index__")
SYNCHRONISING_FUNCTIONS = ("nonzero", "masked_select")
TABLES: list[dict[str, object]] = []  # what --json writes: a title, a note, and lines of a name and numbers


def parse_sizes(doc: str | None, **sizes: int | list[int]) -> argparse.Namespace:
    """The command line: an option for each size, a list takes several, False is a switch; and --json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in sizes.items():
        option = f"--{name.replace('_', '-')}"
        if value is False:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=int, default=value, nargs="+" if isinstance(value, list) else None)
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    return parser.parse_args()


def keep_memory() -> None:
    """In the processes that are started from here on, unless their caller has set it."""
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)


def start_race(new_memory: bool = False) -> None:
    """Says what runs, in a process whose allocator keeps its memory or not: starts this program again to get one."""
    wanted = {"OMP_NUM_THREADS": "1"} | ({} if new_memory else KEEP_MEMORY)
    others = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    if os.environ != others | wanted:
        os.execve(sys.executable, [sys.executable, *sys.argv], others | wanted)
    memory = "mapped anew for each large tensor, glibc's default" if new_memory else "kept by the allocator"
    print(f"{machine()}, memory {memory}\npaddle_vl_sp: {backend()}")


@dataclass(frozen=True)
class Contender:
    """One way of doing it. `prepare` runs before each round, outside the clock; its result is what `run` gets."""

    name: str
    run: Callable[..., object]
    prepare: Callable[[], tuple[object, ...]] = tuple


@dataclass(frozen=True)
class Line:
    name: str
    milliseconds: float
    times_ours: float
    times_floor: float
    syncs: int
    times_as_fast: float | None  # as the peer; None where the peer did not run


def race(ours: Contender, others: list[Contender], floor: Contender, rounds: int, peer: str) -> list[Line]:
    """A line for ours and each other contender: median time, and medians of the ratios within each round.

    peer  the contender that is what users have today
    """
    contenders = [ours, *others, floor]
    syncs = {c.name: count_syncs(c) for c in contenders}  # also the warm-up
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            arguments = contender.prepare()
            start = time.perf_counter()
            contender.run(*arguments)
            times[contender.name].append(time.perf_counter() - start)

    def ratio(name: str, to: str) -> float:
        return median(a / b for a, b in zip(times[name], times[to], strict=True))

    return [
        Line(
            c.name,
            1e3 * median(times[c.name]),
            ratio(c.name, ours.name),
            ratio(c.name, floor.name),
            syncs[c.name],
            ratio(peer, c.name) if peer in times else None,
        )
        for c in contenders
    ]


def copied(num_bytes: int, name: str = "its bytes, copied") -> Contender:
    """The floor: as many bytes, half of them read and half written by a copy."""
    source, target = (np.ones(num_bytes // 2, dtype=np.uint8) for _ in range(2))
    return Contender(f"floor: {name}", lambda: np.copyto(target, source))


def add_table(title: str, note: str) -> list[dict[str, object]]:
    """A table for --json; returns its lines, to be filled."""
    lines: list[dict[str, object]] = []
    TABLES.append({"title": title, "note": note, "lines": lines})
    return lines


def show(title: str, lines: list[Line], note: str) -> None:
    add_table(title, note).extend(asdict(line) for line in lines)
    print(f"\n{title}\n  {note}")
    print(f"  {'':44} {'median ms':>10} {'x ours':>8} {'x floor':>8} {'host syncs':>11} {'peer / it':>10}")
    for line in lines:
        as_fast = "-" if line.times_as_fast is None else f"{line.times_as_fast:.1f}"
        print(
            f"  {line.name:44} {line.milliseconds:10.3f} {line.times_ours:8.2f} {line.times_floor:8.2f}"
            f" {line.syncs:11d} {as_fast:>10}"
        )


def write_json(path: Path | None) -> None:
    """Everything shown so far and the machine, where a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), "tables": TABLES}))


def count_syncs(contender: Contender) -> int:
    """The host syncs of one run."""
    arguments = contender.prepare()
    with counted_syncs() as counts:
        contender.run(*arguments)
    return counts[0]


@contextmanager
def counted_syncs() -> Iterator[list[int]]:
    """Counts reads of tensors by the host and operations whose output size is data, once however deep they nest."""
    counts, depth = [0], [0]

    def watched(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            counts[0] += depth[0] == 0
            depth[0] += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    places = [(paddle.Tensor, name) for name in SYNCHRONISING_METHODS] + [
        (paddle, name) for name in SYNCHRONISING_FUNCTIONS
    ]
    originals = [getattr(place, name) for place, name in places]
    try:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, watched(original))
        yield counts
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)


def machine() -> str:
    model = "unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Paddle {paddle.version.full_version}, Python {platform.python_version()}"


def runs_of_visual(batch: int, seq_len: int, shortest: int, longest: int, seed: int = 0) -> np.ndarray:
    """A bool mask [batch, seq_len] of alternating runs of text and of visual tokens, half of each on average."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((batch, seq_len), dtype=bool)
    for row in mask:
        ends = np.cumsum(rng.integers(shortest, longest + 1, size=2 * seq_len // shortest + 2))
        row[:] = np.searchsorted(ends, np.arange(seq_len), side="right") % 2 == 1
    return mask
