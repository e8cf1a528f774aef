"""Times each kernel against the bytes it must move, and PyTorch's own ways beside it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import inputs
from .checks import IndexRun, expect_bits, expect_rows
from .device import capture, launch_rows, microseconds
from .inputs import Case
from .library import OPERATIONS, TOKEN_TYPES, Library

REPEATS = 21
HEADER = """A device-to-device copy moves {:.2f} TB/s, read and written bytes counted; the floor is the bytes that must
move over that. All are replays of a graph over buffers beyond the L2, but for PyTorch's ways that synchronise (by
mask, and its plan): these are timed as they are called.

| what | case | µs, median | min | quartiles | floor µs | median / floor | TB/s |
|---|---|---|---|---|---|---|---|"""
Row = Callable[..., str]


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
        self.hidden = torch.empty((num_rows, width), dtype=torch.bfloat16, device="cuda")
        self.features = torch.empty((num_features, width), dtype=torch.bfloat16, device="cuda")

    def given(self) -> Tensor:
        return self.features[self.gather]

    def check(self, operation: str, way: Callable[[RowsSet], Any]) -> None:
        """Does one call do what its name says?"""
        before = [self.hidden.clone(), self.features.clone()]
        way(self)
        expect_rows(operation, [self.hidden, self.features], before, self.pairs)

    def bytes(self, operation: str) -> int:
        n = len(self.update)
        rows = {"replace": 2 * n, "add": 3 * n, "take": n + len(self.features), "zero": n}[operation]
        return rows * self.hidden.shape[1] * 2 + 16 * n


def time_graph(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of one call, from replays of a graph of all of them in turn."""
    replay = capture(lambda: [call() for call in calls])
    replay()
    return [microseconds(replay) / len(calls) for _ in range(REPEATS)]


def time_calls(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Microseconds of one call as Python makes it, from all of them in turn."""
    turns = itertools.cycle(calls)
    for _ in range(3):
        next(turns)()
    return [microseconds(next(turns)) for _ in range(REPEATS)]


# What, operation, way, how it is timed: a way by mask synchronises, so that no graph can hold it.
PEERS: list[tuple[str, str, Callable[[RowsSet], Any], Callable[..., list[float]]]] = [
    ("h[mask] = f[g]", "replace", lambda s: s.hidden.index_put_((s.mask,), s.given()), time_calls),
    ("index_copy_", "replace", lambda s: s.hidden.index_copy_(0, s.update, s.given()), time_graph),
    ("h[mask] += f[g]", "add", lambda s: s.hidden.index_put_((s.mask,), s.hidden[s.mask] + s.given()), time_calls),
    ("index_add_", "add", lambda s: s.hidden.index_add_(0, s.update, s.given()), time_graph),
    ("index_copy_", "take", lambda s: s.features.zero_().index_copy_(0, s.gather, s.hidden[s.update]), time_graph),
    ("index_fill_", "zero", lambda s: s.hidden.index_fill_(0, s.update, 0), time_graph),
]


def table_row(
    bandwidth: float, what: str, case: str, num_bytes: int, check: Callable[[], Any], measure: Callable[[], list[float]]
) -> str:
    """num_bytes: each input read once, each output written once. Also what is wrong is timed, and marked."""
    try:
        check()
    except (AssertionError, RuntimeError) as error:
        what += f" FAILED {error}"
    times = measure()
    first, median, third = statistics.quantiles(times, n=4)
    floor = 1e6 * num_bytes / bandwidth
    measured = f"{median:.1f} | {min(times):.1f} | {first:.1f} to {third:.1f}"
    return f"| {what} | {case} | {measured} | {floor:.1f} | {median / floor:.2f} | {num_bytes / median / 1e6:.2f} |"


def num_sets(touched: int) -> int:
    """So many sets of buffers that the L2 cannot hold what comes around again; 16 at the most."""
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
    return min(16, max(2, 4 * l2_bytes // touched + 1))


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes counted."""
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * num_bytes / (statistics.median(time_calls([lambda: target.copy_(source)])) * 1e-6)


def time_rows(library: Library, row: Row, width: int, num_rows: int, num_features: int) -> Iterator[str]:
    sets = [RowsSet(seed, width, num_rows, num_features) for seed in range(num_sets(num_rows * width))]
    case = f"bf16, {len(sets[0].update)} of {num_rows} rows x {width}, {num_features} features"

    def kernel(operation: str, s: RowsSet) -> None:
        launch_rows(library, operation, s.hidden, s.features, *s.pairs)

    ways = [(operation, operation, partial(kernel, operation), time_graph) for operation in OPERATIONS]
    ways += [(f"PyTorch {operation}: {what}", operation, way, measure) for what, operation, way, measure in PEERS]
    for what, operation, way, measure in ways:
        for each in sets:
            each.hidden.normal_()
            each.features.normal_()
        check, calls = partial(sets[0].check, operation, way), [partial(way, each) for each in sets]
        yield row(what, case, sets[0].bytes(operation), check, partial(measure, calls))


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


def time_index(library: Library, row: Row, case: Case) -> Iterator[str]:
    """Both kernels of a padded plan, and PyTorch's way where the rank owns one interval."""
    token_bytes = case.batch * case.seq_len * {"int64": 8, "int32": 4, "mask": 1}[case.token_type]
    runs = [IndexRun(library, np.random.default_rng(seed), case) for seed in range(num_sets(token_bytes))]
    plan_bytes = token_bytes + 16 * runs[0].capacity
    name = f"B{case.batch} S{case.seq_len} {case.token_type}, {case.layout}"
    runs[0].launch()
    counts, plans = [run.count for run in runs], [run.launch for run in runs]
    yield row("count + write", name, plan_bytes, runs[0].check, partial(time_graph, plans))
    yield row("count", name, token_bytes, runs[0].tiles.read, partial(time_graph, counts))
    if len(runs[0].pieces) == 1 and case.token_type != "mask":
        check, calls = partial(check_torch_plan, runs[0]), [partial(torch_plan, run) for run in runs]
        yield row("PyTorch plan: cumsum, nonzero", name, plan_bytes, check, partial(time_calls, calls))


def run_timings(library: Library, quick: bool) -> Iterator[str]:
    """A table, line by line."""
    bandwidth = copy_bandwidth(1 << 24 if quick else 1 << 30)
    row = partial(table_row, bandwidth)
    yield HEADER.format(bandwidth / 1e12)
    cases = [{"batch": 8, "layout": layout} for layout in ("contiguous", "zigzag", "packed")]
    cases += [{"batch": 64, "token_type": name} for name in TOKEN_TYPES]
    for case in cases[:1] if quick else cases:
        sizes = {"seq_len": 4096 if quick else 131072, "capacity": "rows", "features": "unknown"}
        yield from time_index(library, row, inputs.make_case(inputs.INDEX, **sizes, **case))
    for width in (256,) if quick else (4096, 1024, 5120, 1001):  # a deepstack layer on one rank of 8
        yield from time_rows(library, row, width, *((1024, 2048) if quick else (32768, 131072)))
