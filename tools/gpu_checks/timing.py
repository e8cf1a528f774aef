"""Times each kernel against the bytes it must move, and PyTorch's own ways beside it."""

from __future__ import annotations

import itertools
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import inputs
from .checks import IndexRun, expect_bits, expected_rows
from .device import Rows, capture, microseconds
from .inputs import Case
from .library import OPERATIONS, TOKEN_TYPES, Library

REPEATS, QUICK_REPEATS = 21, 3
GRAPH_LAUNCHES = 12  # at least so many calls in a graph, and between two events
HEADER = """Device to device, read and written bytes counted, a copy moves {copy:.2f} TB/s and a sum of two arrays
{sum:.2f} TB/s; the floor is the bytes that must move over the former. `graph`: replays of a graph of {launches} calls
and more, over buffers beyond the L2. `calls`: the same calls one by one from Python; so are timed PyTorch's ways that
synchronise, which no graph can hold.

| what | case | how | µs, median | min | quartiles | floor µs | median / floor | TB/s |
|---|---|---|---|---|---|---|---|---|"""
Row = Callable[..., str]
Calls = Sequence[Callable[[], Any]]


class RowsSet:
    """bfloat16 hidden and features on the GPU, half of the rows visual in runs of 256, their feature rows one run."""

    def __init__(self, seed: int, width: int, num_rows: int, num_features: int) -> None:
        rng = np.random.default_rng(seed)
        runs = np.sort(rng.permutation(num_rows // 256)[: num_rows // 512])
        update = (runs[:, None] * 256 + np.arange(256)).ravel()
        gather = np.arange(len(update)) + rng.integers(0, num_features - len(update) + 1)
        self.pairs = torch.from_numpy(np.stack([update, gather])).cuda()
        self.update, self.gather = self.pairs
        self.mask = torch.zeros(num_rows, dtype=torch.bool, device="cuda")
        self.mask[self.update] = True
        self.hidden, self.out = (torch.empty((num_rows, width), dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.features = torch.empty((num_features, width), dtype=torch.bfloat16, device="cuda")
        map_of_rows = torch.empty(num_rows, dtype=torch.int64, device="cuda")
        self.rows = Rows(self.hidden, self.features, self.out, self.update, self.gather, map_of_rows)

    def given(self) -> Tensor:
        return self.features[self.gather]

    def dense(self) -> Tensor:
        """The features that `add` adds, zero in the other rows."""
        return torch.zeros_like(self.hidden).index_copy_(0, self.update, self.given())

    def check(self, operation: str, way: Callable[[RowsSet], Any]) -> None:
        """Does one call do what its name says? What it returns, if a tensor, is what our kernels write to `out`."""
        written, want = expected_rows(operation, self.hidden.cpu(), self.features.cpu(), self.pairs.cpu())
        returned = way(self)
        got = returned if isinstance(returned, Tensor) else getattr(self, written)
        expect_bits(written, got.cpu(), want, computed=operation.startswith("add"))

    def bytes(self, operation: str) -> int:
        n, num_rows, num_features = len(self.update), len(self.hidden), len(self.features)
        read_and_written = {
            "replace": 2 * num_rows,
            "add": 2 * num_rows + n,
            "zero": 2 * num_rows - n,
            "add in place": 3 * n,
            "take": n + num_features,
        }
        return read_and_written[operation] * self.hidden.shape[1] * 2 + 16 * n


def time_graph(calls: Calls, repeats: int) -> list[float]:
    """Microseconds of one call, from replays of a graph of all of them in turn."""
    rounds = -(-GRAPH_LAUNCHES // len(calls))
    replay = capture(lambda: [call() for _ in range(rounds) for call in calls])
    replay()
    return [microseconds(replay) / (rounds * len(calls)) for _ in range(repeats)]


def time_calls(calls: Calls, repeats: int) -> list[float]:
    """Microseconds of one call as Python makes it, from all of them in turn."""
    turns = itertools.cycle(calls)

    def call_some() -> None:
        for _ in range(GRAPH_LAUNCHES):
            next(turns)()

    call_some()
    return [microseconds(call_some) / GRAPH_LAUNCHES for _ in range(repeats)]


BOTH = {"graph": time_graph, "calls": time_calls}
SYNCHRONISES = {"calls": time_calls}


def clone_then(change: Callable[[RowsSet, Tensor], Any], s: RowsSet) -> Tensor:
    out = s.hidden.clone()
    change(s, out)
    return out


def masked_add(s: RowsSet, out: Tensor) -> None:
    out[s.mask] += s.given()


def masked_replace(s: RowsSet, out: Tensor) -> None:
    out[s.mask] = s.given()


def masked_scatter(s: RowsSet, out: Tensor) -> None:
    out.masked_scatter_(s.mask[:, None], s.given())


def index_add_in_place(s: RowsSet) -> None:
    s.hidden.index_add_(0, s.update, s.given())


def index_copy_taken(s: RowsSet) -> None:
    s.features.zero_().index_copy_(0, s.gather, s.hidden[s.update])


# What PyTorch has: operation, way, how it is timed.
PEERS: list[tuple[str, str, Callable[[RowsSet], Any], dict[str, Callable[[Calls, int], list[float]]]]] = [
    ("clone, h[mask] = f[g]", "replace", partial(clone_then, masked_replace), SYNCHRONISES),
    ("clone, masked_scatter_", "replace", partial(clone_then, masked_scatter), BOTH),
    ("index_copy", "replace", lambda s: s.hidden.index_copy(0, s.update, s.given()), BOTH),
    ("clone, h[mask] += f[g]", "add", partial(clone_then, masked_add), SYNCHRONISES),
    ("index_add", "add", lambda s: s.hidden.index_add(0, s.update, s.given()), BOTH),
    ("h + dense", "add", lambda s: s.hidden + s.dense(), BOTH),
    ("index_fill", "zero", lambda s: s.hidden.index_fill(0, s.update, 0), BOTH),
    ("h[mask] += f[g]", "add in place", lambda s: masked_add(s, s.hidden), SYNCHRONISES),
    ("index_add_", "add in place", index_add_in_place, BOTH),
    ("index_copy_", "take", index_copy_taken, BOTH),
]


def mistake(check: Callable[[], Any]) -> str:
    """Also what is wrong is timed, and marked with this."""
    try:
        check()
    except (AssertionError, RuntimeError) as error:
        return f" FAILED {error}"
    return ""


def table_row(bandwidth: float, what: str, case: str, num_bytes: int, how: str, times: list[float]) -> str:
    """num_bytes: each input read once, each output written once."""
    first, median, third = statistics.quantiles(times, n=4)
    floor = 1e6 * num_bytes / bandwidth
    measured = f"{median:.1f} | {min(times):.1f} | {first:.1f} to {third:.1f} | {floor:.1f} | {median / floor:.2f}"
    return f"| {what} | {case} | {how} | {measured} | {num_bytes / median / 1e6:.2f} |"


def num_sets(touched: int) -> int:
    """So many sets of buffers that the L2 cannot hold what comes around again; 16 at the most."""
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    return min(16, max(2, 4 * l2_bytes // touched + 1))


def measure_ceilings(num_bytes: int, repeats: int) -> dict[str, float]:
    """Bytes a second of a large copy and of a large sum, read and written bytes counted."""
    one, other = (torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    target = torch.empty_like(one)
    ways = {"copy": (2, lambda: target.copy_(one)), "sum": (3, lambda: torch.add(one, other, out=target))}
    return {
        name: 1e6 * n * num_bytes / statistics.median(time_calls([way], repeats)) for name, (n, way) in ways.items()
    }


def time_rows(library: Library, row: Row, repeats: int, width: int, num_rows: int, num_features: int) -> Iterator[str]:
    sets = [RowsSet(seed, width, num_rows, num_features) for seed in range(num_sets(num_rows * width))]
    case = f"bf16, {len(sets[0].update)} of {num_rows} rows x {width}, {num_features} features"

    def kernel(operation: str, s: RowsSet) -> None:
        s.rows.launch(library, operation)

    ways = [(operation, operation, partial(kernel, operation), BOTH) for operation in OPERATIONS]
    ways += [(f"PyTorch {operation}: {what}", operation, way, measures) for what, operation, way, measures in PEERS]
    for what, operation, way, measures in ways:
        for each in sets:
            each.hidden.normal_()
            each.features.normal_()
        name = what + mistake(partial(sets[0].check, operation, way))
        for how, measure in measures.items():
            yield row(
                name, case, sets[0].bytes(operation), how, measure([partial(way, each) for each in sets], repeats)
            )


def torch_plan(run: IndexRun) -> tuple[Tensor, Tensor]:
    """PyTorch's update and gather of a rank that owns one interval, sequence first."""
    start, stop = run.pieces[0].tolist()
    image_id, video_id = run.ids.tolist()
    visual = (run.tokens.tensor == image_id) | (run.tokens.tensor == video_id)
    feature = visual.flatten().cumsum(0).reshape(visual.shape) - 1
    own = visual[:, start:stop]
    place = own.nonzero()
    return place[:, 1] * len(own) + place[:, 0], feature[:, start:stop][own]


def check_torch_plan(run: IndexRun) -> None:
    written = torch.stack([run.update.read(), run.gather.read()])
    expect_bits("pairs", torch.stack(torch_plan(run)).cpu(), written[:, written[0] >= 0])


def time_index(library: Library, row: Row, repeats: int, case: Case) -> Iterator[str]:
    """Both kernels of a padded plan, and PyTorch's way where the rank owns one interval."""
    token_bytes = case.batch * case.seq_len * {"int64": 8, "int32": 4, "mask": 1}[case.token_type]
    runs = [IndexRun(library, np.random.default_rng(seed), case) for seed in range(num_sets(token_bytes))]
    plan_bytes = token_bytes + 16 * runs[0].capacity
    name = f"B{case.batch} S{case.seq_len} {case.token_type}, {case.layout}"
    runs[0].launch()
    plan, counts = "count + write" + mistake(runs[0].check), [run.count for run in runs]
    for how, measure in BOTH.items():
        yield row(plan, name, plan_bytes, how, measure([run.launch for run in runs], repeats))
    yield row("count", name, token_bytes, "graph", time_graph(counts, repeats))
    if len(runs[0].pieces) == 1 and case.token_type != "mask":
        peer = "PyTorch plan: cumsum, nonzero" + mistake(partial(check_torch_plan, runs[0]))
        yield row(peer, name, plan_bytes, "calls", time_calls([partial(torch_plan, run) for run in runs], repeats))


def clocks() -> str:
    """Of the GPU now, and what holds them down, as nvidia-smi says it."""
    asked = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known ({error})"


def run_timings(library: Library, quick: bool) -> Iterator[str]:
    """A table, line by line."""
    repeats = QUICK_REPEATS if quick else REPEATS
    ceilings = measure_ceilings(1 << 24 if quick else 1 << 30, repeats)
    row = partial(table_row, ceilings["copy"])
    yield f"* clocks (SM now, at most, memory), °C, W, reasons for lower ones, before: {clocks()}"
    yield ""
    yield HEADER.format(launches=GRAPH_LAUNCHES, **{name: speed / 1e12 for name, speed in ceilings.items()})
    cases = [{"batch": 8, "layout": layout} for layout in ("contiguous", "zigzag", "packed")]
    cases += [{"batch": 64, "token_type": name} for name in TOKEN_TYPES]
    cases += [{"batch": 64, "seq_len": 1 << 20}]
    for case in [{}] if quick else cases:
        sizes = {"seq_len": 4096 if quick else 131072, "capacity": "rows", "features": "unknown"}
        yield from time_index(library, row, repeats, inputs.make_case(inputs.INDEX, **sizes | case))
    for width in (64,) if quick else (4096, 1024, 5120, 1002, 1001):  # a deepstack layer on one rank of 8
        yield from time_rows(library, row, repeats, width, *((1024, 2048) if quick else (32768, 131072)))
    yield ""
    yield f"* clocks after: {clocks()}"
