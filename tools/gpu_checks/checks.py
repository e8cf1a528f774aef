"""Runs the kernels against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from . import inputs, oracle
from .inputs import IndexCase, RowsCase
from .library import Library, Query
from .memory import DeviceArray, Memory
from .oracle import Array, Plan

Case = TypeVar("Case")
POISON = -7


@dataclass
class Tally:
    """How many checks of each group passed, and what failed."""

    passed: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def run(self, group: str, check: Callable[[Case], None], cases: Iterable[Case]) -> None:
        self.passed[group] = 0
        for case in cases:
            try:
                check(case)
                self.passed[group] += 1
            except (AssertionError, RuntimeError) as error:
                self.failures.append(f"{group}: {error} in {case}")


class TokensOnDevice:
    """Tokens and intervals of one rank, ready for the kernels, with the plan they must give."""

    def __init__(self, memory: Memory, case: IndexCase, rng: np.random.Generator) -> None:
        self.case, self._rng = case, rng
        self.intervals, self.local_len = inputs.make_layout(rng, case.layout, case.seq_len)
        self.ids = inputs.make_ids(rng, case.token_type, case.num_ids)
        self.table = DeviceArray(memory, self.intervals)
        self.visual, tokens = self._draw(case.pattern)
        item = tokens.dtype.itemsize
        self.tokens = DeviceArray(memory, tokens, case.offset * item)
        self.query = Query(
            self.tokens.address,
            case.token_type,
            case.batch,
            case.seq_len,
            self.ids,
            self.intervals,
            self.table.address,
            self.local_len,
        )

    def _draw(self, pattern: str) -> tuple[Array, Array]:
        visual = inputs.make_visual(self._rng, pattern, (self.case.batch, self.case.seq_len))
        return visual, inputs.make_tokens(self._rng, visual, self.case.token_type, self.ids)

    def redraw(self, pattern: str) -> None:
        """Other tokens in the same place."""
        self.visual, tokens = self._draw(pattern)
        self.tokens.write(tokens)

    def plan(self, capacity: int, num_features: int) -> Plan:
        return oracle.make_plan(
            self.visual,
            self.intervals,
            self.local_len,
            capacity=capacity,
            num_features=num_features,
            sequence_first=self.case.sequence_first,
        )


class PlanOnDevice:
    """Poisoned places for the tile counts and the plan."""

    def __init__(self, memory: Memory, num_tiles: int, capacity: int, num_features: int) -> None:
        def poisoned(*shape: int) -> DeviceArray:
            return DeviceArray(memory, np.full(shape, POISON, np.int64))

        self.capacity, self.num_features = capacity, num_features
        self.tiles = poisoned(num_tiles, 2)
        self.update, self.gather, self.counts = poisoned(capacity), poisoned(capacity), poisoned(2)

    def count(self, library: Library, source: TokensOnDevice, stream: int) -> None:
        library.count_tiles(source.query, self.tiles.address, stream)

    def launch(self, library: Library, source: TokensOnDevice, stream: int) -> None:
        """Both kernels."""
        self.count(library, source, stream)
        library.write_plan(
            source.query,
            self.tiles.address,
            (self.update.address, self.gather.address),
            capacity=self.capacity,
            num_features=self.num_features,
            counts=self.counts.address if source.case.counts else 0,
            sequence_first=source.case.sequence_first,
            stream=stream,
        )

    def check(self, source: TokensOnDevice) -> None:
        want = source.plan(self.capacity, self.num_features)
        counts = want.counts if source.case.counts else np.full(2, POISON)
        expect_equal("counts", self.counts.read(), counts)
        expect_equal("sum of tiles", self.tiles.read().sum(0), want.counts)
        expect_equal("update", self.update.read(), want.update)
        expect_equal("gather", self.gather.read(), want.gather)


def expect_equal(what: str, got: Array, want: Array) -> None:
    if not np.array_equal(got, want):
        place = int(np.flatnonzero(got.ravel() != want.ravel())[0])
        raise AssertionError(f"{what}[{place}] is {got.flat[place]}, expected {want.flat[place]}")


def expect_same_values(what: str, got: Array, want: Array, type_name: str) -> None:
    if not oracle.same_values(got, want, type_name):
        rows = np.flatnonzero((got != want).any(1))
        raise AssertionError(f"{what} differs in {len(rows)} rows, the first is {rows[0]}")


class Checks:
    """The checks of one library on one device; each draws its inputs from the same generator."""

    def __init__(self, library: Library, memory: Memory, seed: int = 0) -> None:
        self.library, self.memory = library, memory
        self.rng = np.random.default_rng(seed)

    def index(self, case: IndexCase) -> None:
        source = TokensOnDevice(self.memory, case, self.rng)
        own, everything = source.plan(0, -1).counts.tolist()
        capacity = {"exact": own, "under": own // 2, "over": own + 5000, "zero": 0}[case.capacity]
        num_features = {
            "exact": everything,
            "fewer": everything * 3 // 4,
            "more": everything + 3,
            "unknown": -1,
        }[case.features]
        num_tiles = self.library.num_tiles(case.batch, case.seq_len)
        plan = PlanOnDevice(self.memory, num_tiles, capacity, num_features)
        plan.launch(self.library, source, self.memory.stream)
        plan.check(source)
        source.tokens.read()  # its guards

    def rows(self, case: RowsCase) -> None:
        types = case.hidden_type, case.feature_type
        hidden = inputs.make_values(self.rng, (case.num_rows, case.width), types[0])
        features = inputs.make_values(self.rng, (case.num_features, case.width), types[1])
        pairs = inputs.make_pairs(self.rng, case.pairs, case.num_rows, case.num_features)
        on_device = [
            DeviceArray(self.memory, array, offset * array.dtype.itemsize)
            for array, offset in zip((hidden, features), case.offsets, strict=True)
        ]
        indices = [DeviceArray(self.memory, np.ascontiguousarray(index)) for index in pairs]
        with np.errstate(all="ignore"):
            want = oracle.apply_rows(case.operation, hidden, types[0], features, types[1], pairs)
        self.library.rows(
            case.operation,
            (on_device[0].address, types[0]),
            (0 if case.operation == "zero" else on_device[1].address, types[1]),
            (indices[0].address, indices[1].address),
            (pairs.shape[1], case.num_rows, case.num_features, case.width),
            self.memory.stream,
        )
        with np.errstate(all="ignore"):
            expect_same_values("hidden", on_device[0].read(), want[0], types[0])
            expect_same_values("features", on_device[1].read(), want[1], types[1])

    def graph(self, case: IndexCase) -> None:
        """Count, write and add captured once, replayed over changed tokens, without a host sync."""
        width, capacity, num_features = 96, 700, 900
        source = TokensOnDevice(self.memory, case, self.rng)
        num_rows = source.local_len * case.batch
        hidden = inputs.make_values(self.rng, (num_rows, width), "bfloat16")
        features = inputs.make_values(self.rng, (num_features, width), "bfloat16")
        num_tiles = self.library.num_tiles(case.batch, case.seq_len)
        plan = PlanOnDevice(self.memory, num_tiles, capacity, num_features)
        place, given = DeviceArray(self.memory, hidden), DeviceArray(self.memory, features)

        def launch(stream: int) -> None:
            plan.launch(self.library, source, stream)
            self.library.rows(
                "add",
                (place.address, "bfloat16"),
                (given.address, "bfloat16"),
                (plan.update.address, plan.gather.address),
                (capacity, num_rows, num_features, width),
                stream,
            )

        launch(self.memory.stream)  # loads the kernels, which a capture may not
        self.memory.synchronize()
        replay = self.memory.capture(launch)
        for pattern in ("runs", "none", "sparse", "all", "random"):
            source.redraw(pattern)
            place.write(hidden)
            replay()
            self.memory.synchronize()
            plan.check(source)
            want = source.plan(capacity, num_features)
            with np.errstate(all="ignore"):
                pairs = np.stack([want.update, want.gather])
                expected, _ = oracle.apply_rows("add", hidden, "bfloat16", features, "bfloat16", pairs)
                expect_same_values(f"hidden ({pattern})", place.read(), expected, "bfloat16")

    def far_rows(self, operation: str) -> None:
        """Rows beyond 2^31 elements, in hidden and in features."""
        width, count = 1024, 40
        num_rows = (1 << 31) // width + 1000
        row_bytes = width * 2
        start = (num_rows - count) * row_bytes
        buffers = [self.memory.empty(num_rows * row_bytes) for _ in range(2)]
        values = [inputs.make_values(self.rng, (count, width), "bfloat16") for _ in range(2)]
        for buffer, value in zip(buffers, values, strict=True):
            self.memory.write(buffer, start, value)
        near = inputs.make_pairs(self.rng, "full", count, count)
        indices = [DeviceArray(self.memory, np.ascontiguousarray(index)) for index in near + num_rows - count]
        with np.errstate(all="ignore"):
            want = oracle.apply_rows(operation, values[0], "bfloat16", values[1], "bfloat16", near)
        self.library.rows(
            operation,
            (self.memory.address(buffers[0]), "bfloat16"),
            (self.memory.address(buffers[1]), "bfloat16"),
            (indices[0].address, indices[1].address),
            (count, num_rows, num_rows, width),
            self.memory.stream,
        )
        for name, buffer, expected in zip(("hidden", "features"), buffers, want, strict=True):
            got = self.memory.read(buffer, start, count * row_bytes).view(np.uint16).reshape(count, width)
            with np.errstate(all="ignore"):
                expect_same_values(name, got, expected, "bfloat16")


def run_checks(library: Library, memory: Memory, quick: bool) -> Tally:
    """Everything; `quick` is the small part of it that also runs under compute-sanitizer."""
    checks, tally = Checks(library, memory), Tally()
    tally.run("index", checks.index, inputs.index_cases(checks.rng, quick))
    tally.run("rows", checks.rows, inputs.rows_cases(quick))
    if quick:
        return tally
    padded = IndexCase(3, 5000, "zigzag")
    tally.run("graph", checks.graph, [padded, replace(padded, layout="packed", sequence_first=False)])
    if memory.free_bytes() > 12 << 30:
        tally.run("rows beyond 2^31 elements", checks.far_rows, ("replace", "add", "take", "zero"))
    return tally
