"""Runs every kernel on random inputs and compares, bit by bit, all that it wrote with what it must write."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oracle  # tests/oracle.py

from . import inputs
from .device import Guarded, Rows, capture, stream
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
        shapes = (library.workspace_size(case.batch, case.seq_len), self.capacity, self.capacity, 2)
        self.results = [Guarded(torch.full((size,), POISON)) for size in shapes]
        self.workspace, self.update, self.gather, self.counts = self.results
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
        self.library.count_visual(self._query, self.workspace.address, self.counts.address, stream())

    def launch(self) -> None:
        """Both kernels."""
        self.count()
        sizes = {"capacity": self.capacity, "num_features": self.num_features}
        places = {"pairs": (self.update.address, self.gather.address), "counts": self.counts.address}
        order = {"sequence_first": self.case.sequence_first, "stream": stream()}
        self.library.write_plan(self._query, self.workspace.address, **sizes, **places, **order)

    def check(self) -> Tensor:
        """Of all that was written. Returns the padded pairs [2, capacity]; takes seconds for millions of tokens."""
        found = oracle.pairs(self._visual, self.positions, self.case.sequence_first)
        pairs = torch.from_numpy(np.array(found, np.int64))
        pairs = pairs[:, pairs[1] < self.num_features] if self.num_features >= 0 else pairs
        padded, counts = torch.full((2, self.capacity), -1), torch.tensor(self._num_visual)
        padded[:, : pairs.shape[1]] = pairs[:, : self.capacity]
        expect_bits("counts", self.counts.read(), counts)
        self.workspace.read()  # its guards
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


def expected_rows(operation: str, hidden: Tensor, features: Tensor, pairs: Tensor) -> tuple[str, Tensor]:
    """Which array `operation` writes, and what then is in it. Sums are in float32 (float64), rounded once."""
    inside = (pairs >= 0).all(0) & (pairs[0] < len(hidden)) & (pairs[1] < len(features))
    update, gather = pairs[:, inside]
    if operation == "take":
        taken = torch.zeros(features.shape, dtype=features.dtype)
        taken[gather] = cast(hidden[update], features.dtype)
        return "features", taken
    out = hidden.clone()
    if operation == "zero":
        out[update] = 0
    else:
        given = cast(features[gather], hidden.dtype)
        if operation != "replace":
            wide = torch.promote_types(hidden.dtype, torch.float32)
            given = (hidden[update].to(wide) + given.to(wide)).to(hidden.dtype)
        out[update] = given
    return "hidden" if operation == "add in place" else "out", out


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Every bit kept within one type, by way of float32 between two."""
    return values if values.dtype == dtype else values.to(torch.float32).to(dtype)


class RowsRun:
    """Arrays of a row operation on the GPU, guarded, with poison where it writes all; and what they held before."""

    def __init__(self, hidden: Tensor, features: Tensor, pairs: Tensor, offsets: tuple[int, int] = (0, 0)) -> None:
        self._before = {"hidden": hidden, "features": features, "out": torch.full_like(hidden, POISON)}
        shifts = {"hidden": offsets[0], "features": offsets[1], "out": offsets[0]}
        self._guarded = {name: Guarded(values, shifts[name]) for name, values in self._before.items()}
        self.map, self.pairs = Guarded(torch.full((len(hidden),), POISON)), pairs
        arrays = {name: guarded.tensor for name, guarded in self._guarded.items()}
        update, gather = pairs.cuda()
        self.arrays = Rows(**arrays, update=update, gather=gather, map=self.map.tensor)

    def restore(self) -> None:
        for name, guarded in self._guarded.items():
            guarded.tensor.copy_(self._before[name])

    def check(self, operation: str) -> None:
        """Computed are sums, and what became another type; all other bits are moved, or stay."""
        hidden, features = self._before["hidden"], self._before["features"]
        written, values = expected_rows(operation, hidden, features, self.pairs)
        computed = operation.startswith("add") or hidden.dtype != features.dtype
        for name, guarded in self._guarded.items():
            want = values if name == written else self._before[name]
            expect_bits(name, guarded.read(), want, computed and name == written)
        self.map.read()  # its guards


def check_index(library: Library, rng: Random, case: Case) -> None:
    run = IndexRun(library, rng, case)
    run.launch()
    run.check()


def check_rows(library: Library, rng: Random, case: Case) -> None:
    sizes = zip(case.sizes, case.types, strict=True)
    hidden, features = (inputs.draw_values(rng, rows, case.width, type_name) for rows, type_name in sizes)
    run = RowsRun(hidden, features, inputs.draw_pairs(rng, case.pairs, *case.sizes), case.offsets)
    run.arrays.launch(library, case.operation)
    run.check(case.operation)


def check_graph(library: Library, rng: Random, case: Case) -> None:
    """Count, write and add captured once, replayed over changed tokens, without a host sync."""
    plan = IndexRun(library, rng, case)
    hidden, features = (inputs.draw_values(rng, rows, 96, "bfloat16") for rows in (plan.num_rows, plan.num_features))
    rows = RowsRun(hidden, features, torch.full((2, plan.capacity), -1))
    rows.arrays.update, rows.arrays.gather = plan.update.tensor, plan.gather.tensor

    def launch() -> None:
        plan.launch()
        rows.arrays.launch(library, "add")

    replay = capture(launch)
    for pattern in ("runs", "none", "sparse", "all", "random"):
        plan.redraw(pattern)
        rows.restore()
        replay()
        torch.cuda.synchronize()
        rows.pairs = plan.check()
        rows.check("add")


def check_far_rows(library: Library, rng: Random, operation: str) -> None:
    """The last rows beyond 2^31 elements, of hidden, features and out; no other row of these is touched but where all
    are written."""
    width, count = 1024, 40
    before = [inputs.draw_values(rng, count, width, "bfloat16") for _ in range(2)]
    poison = partial(torch.full, (FAR_ROWS, width), POISON, dtype=torch.bfloat16, device="cuda")
    hidden, features, out = poison(), poison(), poison()
    for buffer, values in zip((hidden, features), before, strict=True):
        buffer[-count:].copy_(values)
    pairs = inputs.draw_pairs(rng, "full", count, count)
    update, gather = (pairs + FAR_ROWS - count).cuda()
    arrays = Rows(hidden, features, out, update, gather, torch.zeros(FAR_ROWS, dtype=torch.int64, device="cuda"))
    arrays.launch(library, operation)
    written, values = expected_rows(operation, *before, pairs)
    expect_bits(written, getattr(arrays, written)[-count:].cpu(), values, computed=operation.startswith("add"))
    for name in ("hidden", "features", "out"):
        fill = 0 if name == written == "features" else POISON
        if bool((getattr(arrays, name)[:-count] != fill).any()):
            raise AssertionError(f"{name}: a row that no pair names is not {fill} everywhere")


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
