"""Runs every kernel on random inputs and compares, bit by bit, all that it wrote with what it must write."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle  # tests/oracle.py

from . import inputs
from .device import Guarded, capture, launch_rows, stream
from .inputs import Case, Random
from .library import OPERATIONS, Library, Query

POISON = -7
MAX_FAILURES = 20
FAR_ROWS = (1 << 31) // 1024 + 1000  # of width 1024: beyond 2^31 elements


class IndexRun:
    """One rank's tokens and intervals on the GPU, and poisoned places for the tile counts and the plan."""

    def __init__(self, library: Library, rng: Random, case: Case) -> None:
        self.library, self.case, self._rng = library, case, rng
        self.pieces = inputs.draw_pieces(rng, case.layout, case.seq_len)
        self.positions = [position for piece in self.pieces.tolist() for position in range(*piece)]
        self.tokens = Guarded(self._draw(case.pattern), case.offset)
        own, every, self.num_rows = *self._num_visual, case.batch * len(self.positions)
        capacities = {"exact": own, "under": own // 2, "over": own + 5000, "zero": 0, "rows": self.num_rows}
        features = {"exact": every, "fewer": every * 3 // 4, "more": every + 3, "unknown": -1}
        self.capacity, self.num_features = capacities[case.capacity], features[case.features]
        shapes = ((library.num_tiles(case.batch, case.seq_len), 2), (self.capacity,), (self.capacity,), (2,))
        self.results = [Guarded(torch.full(shape, POISON)) for shape in shapes]
        self.tiles, self.update, self.gather, self.counts = self.results
        lengths = self.pieces[:, 1] - self.pieces[:, 0]
        table = np.stack([self.pieces[:, 0], lengths, np.cumsum(lengths) - lengths], axis=1)
        self._table = Guarded(torch.from_numpy(table))
        tokens = (self.tokens.address, case.token_type, case.batch, case.seq_len)
        self._query = Query(*tokens, self.ids, table, self._table.address, len(self.positions))

    def _draw(self, pattern: str) -> Tensor:
        case = self.case
        self._visual = inputs.draw_visual(self._rng, pattern, (case.batch, case.seq_len))
        tokens, self.ids = inputs.draw_tokens(self._rng, self._visual, case.token_type, case.num_ids)
        self._num_visual = [int(self._visual[:, self.positions].sum()), int(self._visual.sum())]  # own, all
        return tokens

    def redraw(self, pattern: str) -> None:
        """Other tokens in the same place, and the results poisoned again."""
        self.tokens.tensor.copy_(self._draw(pattern))
        for result in self.results:
            result.tensor.fill_(POISON)

    def count(self) -> None:
        self.library.count_tiles(self._query, self.tiles.address, stream())

    def launch(self) -> None:
        """Both kernels."""
        self.count()
        sizes = {"capacity": self.capacity, "num_features": self.num_features}
        places = {"pairs": (self.update.address, self.gather.address), "counts": self.counts.address * self.case.counts}
        order = {"sequence_first": self.case.sequence_first, "stream": stream()}
        self.library.write_plan(self._query, self.tiles.address, **sizes, **places, **order)

    def check(self) -> Tensor:
        """Of all that was written. Returns the padded pairs [2, capacity]; takes seconds for millions of tokens."""
        found = oracle.pairs(self._visual, self.positions, self.case.sequence_first)
        pairs = torch.from_numpy(np.array(found, np.int64))
        pairs = pairs[:, pairs[1] < self.num_features] if self.num_features >= 0 else pairs
        padded, counts = torch.full((2, self.capacity), -1), torch.tensor(self._num_visual)
        padded[:, : pairs.shape[1]] = pairs[:, : self.capacity]
        expect_bits("counts", self.counts.read(), counts if self.case.counts else torch.full((2,), POISON))
        expect_bits("sum of tiles", self.tiles.read().sum(0), counts)
        expect_bits("update", self.update.read(), padded[0])
        expect_bits("gather", self.gather.read(), padded[1])
        self.tokens.read()  # its guards
        return padded


def expect_bits(what: str, got: Tensor, want: Tensor, computed: bool = False) -> None:
    """Raises AssertionError where a bit differs. Where values were computed, not only moved, a NaN may be any NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
    different = got.view(bits) != want.view(bits)
    if computed:
        different &= ~(torch.isnan(got) & torch.isnan(want))
    if bool(different.any()):
        place = tuple(different.nonzero()[0].tolist())
        found, wanted = (f"{x[place].item()} (bits {x.view(bits)[place].item()})" for x in (got, want))
        number = f"{int(different.sum())} of {different.numel()} values differ"
        raise AssertionError(f"{what}: {number}, the first at {list(place)}: {found}, expected {wanted}")


def expected_rows(operation: str, hidden: Tensor, features: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and features after `operation`, on the host. Sums are in float32 (float64), rounded once."""
    hidden, features = hidden.clone(), features.clone()
    inside = (pairs >= 0).all(0) & (pairs[0] < len(hidden)) & (pairs[1] < len(features))
    update, gather = pairs[:, inside]
    if operation == "take":
        features.zero_()
        features[gather] = cast(hidden[update], features.dtype)
    elif operation == "zero":
        hidden[update] = 0
    else:
        given = cast(features[gather], hidden.dtype)
        if operation == "add":
            wide = torch.promote_types(hidden.dtype, torch.float32)
            given = (hidden[update].to(wide) + given.to(wide)).to(hidden.dtype)
        hidden[update] = given
    return hidden, features


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Every bit kept within one type, by way of float32 between two."""
    return values if values.dtype == dtype else values.to(torch.float32).to(dtype)


def expect_rows(operation: str, got: list[Tensor], before: list[Tensor], pairs: Tensor) -> None:
    """`got` and `before` are hidden and features; computed are sums, and what became another type."""
    computed = operation == "add" or before[0].dtype != before[1].dtype
    hidden, features = expected_rows(operation, *before, pairs)
    expect_bits("hidden", got[0], hidden, computed)
    expect_bits("features", got[1], features, computed)


def check_index(library: Library, rng: Random, case: Case) -> None:
    run = IndexRun(library, rng, case)
    run.launch()
    run.check()


def check_rows(library: Library, rng: Random, case: Case) -> None:
    sizes = zip(case.sizes, case.types, strict=True)
    before = [inputs.draw_values(rng, rows, case.width, type_name) for rows, type_name in sizes]
    pairs = inputs.draw_pairs(rng, case.pairs, *case.sizes)
    places = [Guarded(values, offset) for values, offset in zip(before, case.offsets, strict=True)]
    launch_rows(library, case.operation, places[0].tensor, places[1].tensor, *pairs.cuda())
    expect_rows(case.operation, [place.read() for place in places], before, pairs)


def check_graph(library: Library, rng: Random, case: Case) -> None:
    """Count, write and add captured once, replayed over changed tokens, without a host sync."""
    run = IndexRun(library, rng, case)
    before = [inputs.draw_values(rng, rows, 96, "bfloat16") for rows in (run.num_rows, run.num_features)]
    places = [Guarded(values) for values in before]
    arrays = [each.tensor for each in (*places, run.update, run.gather)]

    def launch() -> None:
        run.launch()
        launch_rows(library, "add", *arrays)

    replay = capture(launch)
    for pattern in ("runs", "none", "sparse", "all", "random"):
        run.redraw(pattern)
        places[0].tensor.copy_(before[0])
        replay()
        torch.cuda.synchronize()
        pairs = run.check()
        expect_rows("add", [place.read() for place in places], before, pairs)


def check_far_rows(library: Library, rng: Random, operation: str) -> None:
    """The last rows of hidden and of features beyond 2^31 elements; no other row of them changes, but by take."""
    width, count = 1024, 40
    before = [inputs.draw_values(rng, count, width, "bfloat16") for _ in range(2)]
    buffers = [torch.full((FAR_ROWS, width), POISON, dtype=torch.bfloat16, device="cuda") for _ in before]
    for buffer, values in zip(buffers, before, strict=True):
        buffer[-count:].copy_(values)
    pairs = inputs.draw_pairs(rng, "full", count, count)
    launch_rows(library, operation, *buffers, *(pairs + FAR_ROWS - count).cuda())
    expect_rows(operation, [buffer[-count:].cpu() for buffer in buffers], before, pairs)
    for buffer, fill in zip(buffers, (POISON, 0 if operation == "take" else POISON), strict=True):
        if bool((buffer[:-count] != fill).any()):
            raise AssertionError(f"a row that no pair names is not {fill} everywhere")


def check_all(name: str, check: Callable[[Any], None], cases: Iterable[Any]) -> Iterator[str]:
    passed = failed = 0
    for case in cases:
        try:
            check(case)
            passed += 1
        except (AssertionError, RuntimeError) as error:
            failed += 1
            yield f"* FAILED {name}: {' '.join(str(error).split())} in {case}"
        if failed == MAX_FAILURES:
            break
    yield f"* {name}: {passed} passed, {failed} failed{', stopped' if failed == MAX_FAILURES else ''}"


def run_kernels(library: Library, quick: bool) -> Iterator[str]:
    rng = np.random.default_rng(0)
    yield from check_all("index", partial(check_index, library, rng), inputs.index_cases(rng, quick))
    yield from check_all("rows", partial(check_rows, library, rng), inputs.rows_cases(rng, quick))


def run_checks(library: Library, quick: bool) -> Iterator[str]:
    """The kernels, replays of a captured graph, and rows beyond 2^31 elements where there is memory for them."""
    yield from run_kernels(library, quick)
    rng, sizes = np.random.default_rng(1), {"batch": 3, "seq_len": 5000, "capacity": "under", "features": "fewer"}
    cases = [inputs.make_case(inputs.INDEX, layout=layout, **sizes) for layout in ("zigzag", "packed")]
    yield from check_all("graph", partial(check_graph, library, rng), cases)
    if quick or torch.cuda.mem_get_info()[0] < 16 << 30:
        yield "* rows beyond 2^31 elements: not run (quick, or less than 16 GiB of free memory)"
    else:
        yield from check_all("rows beyond 2^31 elements", partial(check_far_rows, library, rng), OPERATIONS)
