"""Times each kernel against the bytes it must move, and PyTorch's own ways beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import inputs, oracle
from .checks import PlanOnDevice, TokensOnDevice, expect_same_values
from .inputs import IndexCase
from .library import Library
from .memory import GUARD, DeviceArray, Memory, TorchMemory
from .oracle import Array

COPY_BYTES = 1 << 30
REPEATS = 21


@dataclass(frozen=True)
class Timing:
    what: str
    case: str
    microseconds: float
    bytes: int  # each input read once, each output written once


@dataclass(frozen=True)
class RowsSize:
    """A deepstack layer on one rank of 8: half of B * S / 8 rows visual, features of the whole batch."""

    width: int
    num_rows: int = 32768
    num_features: int = 131072

    @property
    def num_pairs(self) -> int:
        return self.num_rows // 2


def median_us(memory: Memory, run: Callable[[], None]) -> float:
    for _ in range(3):
        run()
    return 1e3 * statistics.median(memory.milliseconds(run) for _ in range(REPEATS))


def time_launches(memory: Memory, launches: Sequence[Callable[[int], None]]) -> float:
    """Microseconds of one call, as the median over replays of a graph of all of them in turn."""
    for launch in launches:
        launch(memory.stream)
    memory.synchronize()

    def all_of_them(stream: int) -> None:
        for launch in launches:
            launch(stream)

    return median_us(memory, memory.capture(all_of_them)) / len(launches)


def copy_bandwidth(memory: Memory) -> float:
    """Bytes a second of a large device-to-device copy, read and written bytes counted."""
    source, target = memory.empty(COPY_BYTES), memory.empty(COPY_BYTES)
    fill_random(memory, source)
    return 2 * COPY_BYTES / (median_us(memory, lambda: memory.copy(target, source)) * 1e-6)


def fill_random(memory: Memory, buffer: Any) -> None:
    """Plain numbers as bfloat16, the same 8 MiB over and over."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal(1 << 22).astype(np.float32).view(np.uint32) >> 16
    block = memory.empty(2 * values.size)
    memory.write(block, 0, values.astype(np.uint16))
    for start in range(0, len(buffer), len(block)):
        size = min(len(block), len(buffer) - start)
        memory.copy(buffer[start : start + size], block[:size])
    memory.synchronize()


def num_sets(memory: Memory, touched: int) -> int:
    """So many buffer sets that the L2 cannot hold what comes around again."""
    return max(2, 4 * memory.device().l2_bytes // touched + 1)


def random_pairs(size: RowsSize, seed: int) -> Array:
    """Visual tokens in runs of 256 rows; their feature rows in one run, as one rank's are."""
    rng = np.random.default_rng(seed)
    runs = np.sort(rng.permutation(size.num_rows // 256)[: size.num_pairs // 256])
    update = (runs[:, None] * 256 + np.arange(256)).ravel()
    first = int(rng.integers(0, size.num_features - size.num_pairs + 1))
    return np.stack([update, np.arange(first, first + size.num_pairs)])


class RowsSet:
    """Hidden, features and pairs on the device, bfloat16."""

    def __init__(self, memory: Memory, size: RowsSize, seed: int) -> None:
        self.size, self.pairs = size, random_pairs(size, seed)
        self.hidden = memory.empty(size.num_rows * size.width * 2)
        self.features = memory.empty(size.num_features * size.width * 2)
        for buffer in (self.hidden, self.features):
            fill_random(memory, buffer)
        self.update, self.gather = (DeviceArray(memory, np.ascontiguousarray(p)) for p in self.pairs)
        self._addresses = [(memory.address(b), "bfloat16") for b in (self.hidden, self.features)]

    def launch(self, library: Library, operation: str, stream: int) -> None:
        size = self.size
        sizes = (size.num_pairs, size.num_rows, size.num_features, size.width)
        pairs = self.update.address, self.gather.address
        library.rows(operation, self._addresses[0], self._addresses[1], pairs, sizes, stream)

    def verify(self, library: Library, memory: Memory, operation: str) -> None:
        """Launches once and looks at a few rows: no time of a wrong kernel."""
        chosen = np.linspace(0, self.size.num_pairs - 1, 9).astype(np.int64)
        nearby = np.stack([np.arange(9), np.arange(9)])
        before = self._rows(memory, chosen)
        with np.errstate(all="ignore"):
            want = oracle.apply_rows(operation, before[0], "bfloat16", before[1], "bfloat16", nearby)
        self.launch(library, operation, memory.stream)
        for got, expected in zip(self._rows(memory, chosen), want, strict=True):
            expect_same_values(operation, got, expected, "bfloat16")

    def _rows(self, memory: Memory, chosen: Array) -> list[Array]:
        """The hidden and the feature rows of the chosen pairs."""
        size = self.size.width * 2
        return [
            np.stack([memory.read(buffer, row * size, size).view(np.uint16) for row in rows.tolist()])
            for buffer, rows in zip((self.hidden, self.features), self.pairs[:, chosen], strict=True)
        ]


def row_bytes(operation: str, size: RowsSize) -> int:
    pairs, features = size.num_pairs, size.num_features
    rows = {"replace": 2 * pairs, "add": 3 * pairs, "take": pairs + features, "zero": pairs}[operation]
    return rows * size.width * 2 + 16 * pairs


def time_rows(library: Library, memory: Memory, size: RowsSize) -> list[Timing]:
    sets = [RowsSet(memory, size, seed) for seed in range(num_sets(memory, size.num_pairs * size.width * 2))]
    case = f"bf16, {size.num_pairs} of {size.num_rows} rows x {size.width}, {size.num_features} features"
    timings = []
    for operation in ("replace", "add", "take", "zero"):
        if operation == "zero":  # leaves hidden empty: behind everything that reads it
            timings += time_torch_rows(memory, sets, case)
        sets[0].verify(library, memory, operation)
        spent = time_launches(memory, [partial(s.launch, library, operation) for s in sets])
        timings.append(Timing(operation, case, spent, row_bytes(operation, size)))
    return timings


def time_torch_rows(memory: Memory, sets: list[RowsSet], case: str) -> list[Timing]:
    """What a framework does without these kernels: by mask (which synchronises), and by index."""
    if not isinstance(memory, TorchMemory):
        return []
    torch = memory.torch
    size = sets[0].size
    tensors = []
    for s in sets:
        hidden = s.hidden.view(torch.bfloat16).view(size.num_rows, size.width)
        features = s.features.view(torch.bfloat16).view(size.num_features, size.width)
        update, gather = (torch.from_numpy(np.ascontiguousarray(p)).cuda() for p in s.pairs)
        mask = torch.zeros(size.num_rows, dtype=torch.bool, device="cuda")
        mask[update] = True
        tensors.append((hidden, features, update, gather, mask))

    def add_by_mask(h: Any, f: Any, u: Any, g: Any, m: Any) -> None:
        h[m] += f[g]

    def replace_by_mask(h: Any, f: Any, u: Any, g: Any, m: Any) -> None:
        h[m] = f[g]

    ways: dict[str, tuple[str, Callable[..., Any]]] = {
        "h[mask] = f[g]": ("replace", replace_by_mask),
        "index_copy_": ("replace", lambda h, f, u, g, m: h.index_copy_(0, u, f.index_select(0, g))),
        "h[mask] += f[g]": ("add", add_by_mask),
        "index_add_": ("add", lambda h, f, u, g, m: h.index_add_(0, u, f.index_select(0, g))),
        "zeros + index_copy_": (
            "take",
            lambda h, f, u, g, m: torch.zeros_like(f).index_copy_(0, g, h.index_select(0, u)),
        ),
        "index_fill_": ("zero", lambda h, f, u, g, m: h.index_fill_(0, u, 0)),
    }
    timings = []
    for name, (operation, way) in ways.items():
        turns = iter(tensors * (REPEATS + 3))
        spent = median_us(memory, lambda way=way, turns=turns: way(*next(turns)))  # type: ignore[misc]
        timings.append(Timing(f"PyTorch {operation}: {name}", case, spent, row_bytes(operation, size)))
    return timings


def time_index(library: Library, memory: Memory, case: IndexCase) -> list[Timing]:
    """Both kernels of a padded plan, and PyTorch's way where the rank owns one interval."""
    token_bytes = case.batch * case.seq_len * inputs.TOKEN_DTYPES[case.token_type].itemsize
    sources, plans = [], []
    for seed in range(min(16, num_sets(memory, token_bytes))):
        sources.append(TokensOnDevice(memory, case, np.random.default_rng(seed)))
        capacity = case.batch * sources[-1].local_len
        plans.append(PlanOnDevice(memory, library.num_tiles(case.batch, case.seq_len), capacity, -1))
        plans[-1].launch(library, sources[-1], memory.stream)
        plans[-1].check(sources[-1])
    sets = list(zip(sources, plans, strict=True))
    name = f"B{case.batch} S{case.seq_len} {case.token_type}, {case.layout}"
    counts = [partial(p.count, library, s) for s, p in sets]
    both = [partial(p.launch, library, s) for s, p in sets]
    plan_bytes = token_bytes + 16 * plans[0].capacity
    timings = [
        Timing("count", name, time_launches(memory, counts), token_bytes),
        Timing("count + write", name, time_launches(memory, both), plan_bytes),
    ]
    if len(sources[0].intervals) == 1 and case.token_type != "mask" and isinstance(memory, TorchMemory):
        spent = time_torch_index(memory, sources)
        timings.append(Timing("PyTorch plan: cumsum and nonzero", name, spent, plan_bytes))
    return timings


def time_torch_index(memory: TorchMemory, sources: list[TokensOnDevice]) -> float:
    torch, case = memory.torch, sources[0].case
    tensors = []
    for s in sources:
        raw = s.tokens.buffer[GUARD : len(s.tokens.buffer) - GUARD]
        tensors.append(raw.view(getattr(torch, case.token_type)).view(case.batch, case.seq_len))
    turns = iter(list(zip(tensors, sources, strict=True)) * (REPEATS + 3))

    def plan() -> None:
        tokens, source = next(turns)
        start, length, _ = source.intervals[0].tolist()
        image_id, video_id = source.ids.tolist()
        visual = (tokens == image_id) | (tokens == video_id)
        feature = visual.flatten().cumsum(0).view(visual.shape) - 1
        local = visual[:, start : start + length]
        local.T.flatten().nonzero()
        feature[:, start : start + length].T[local.T]

    return median_us(memory, plan)


def run_timings(library: Library, memory: Memory, quick: bool) -> list[Timing]:
    timings = []
    for layout in ("contiguous", "zigzag", "packed"):
        case = IndexCase(2, 4096, layout) if quick else IndexCase(8, 131072, layout)
        timings += time_index(library, memory, case)
    if quick:
        return timings + time_rows(library, memory, RowsSize(256, 1024, 2048))
    for token_type in inputs.TOKEN_DTYPES:
        timings += time_index(library, memory, IndexCase(64, 131072, token_type=token_type))
    for width in (4096, 1024, 5120, 1001):
        timings += time_rows(library, memory, RowsSize(width))
    return timings
