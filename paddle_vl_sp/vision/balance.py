"""Items with costs spread over ranks: the best contiguous runs, or, where order is free, longest first. Numpy only."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

SWAP_ROUNDS = 2  # for each rank; most batches need fewer
GOOD_ENOUGH = 1.001  # largest load over the mean load: no more swaps

Integers = npt.NDArray[np.int64]


def count_ends(num_items: int, num_ranks: int) -> list[int]:
    """Where each rank's run ends, with equally many items in each."""
    return [-(-num_items * (rank + 1) // num_ranks) for rank in range(num_ranks)]


def even_ends(costs: Integers, num_ranks: int) -> list[int]:
    """Where each rank's run ends: no load above the least possible maximum, each near the mean of what is left."""
    num_items = len(costs)
    bound = _least_bound(costs, num_ranks)
    prefix = _sums(costs)
    earliest = num_items - _fill(_sums(costs[::-1]), bound, num_ranks)  # [k] where the last k may begin
    ends = [0]
    for rank in range(num_ranks):
        begin, after = ends[-1], num_ranks - rank - 1
        least = min(begin + 1, num_items)
        lowest = max(earliest[after], least)
        highest = min(_reach(prefix, begin, bound), max(num_items - after, least))  # an item for every later rank
        mean_end = prefix[begin] + (prefix[-1] - prefix[begin]) / (after + 1)
        ends.append(int(min(max(_nearest(prefix, mean_end), lowest), highest)))
    return ends[1:]


def _least_bound(costs: Integers, num_ranks: int) -> int:
    """The largest load of the best contiguous partition, exactly.

    A bisection that takes few rounds, since each end of the interval moves on to the nearest sum of a run.
    """
    if not len(costs):
        return 0
    prefix = _sums(costs)
    total = int(prefix[-1])
    low, high = max(int(costs.max()), -(-total // num_ranks)), total
    while low < high:
        middle = (low + high) // 2
        ends = _fill(prefix, middle, num_ranks)
        if ends[-1] == len(costs):
            high = int(np.diff(prefix[ends]).max())
        else:
            low = int((prefix[ends[1:] + 1] - prefix[ends[:-1]]).min())  # a smaller bound gives the same runs
    return high


def _fill(prefix: Integers, bound: int, num_ranks: int) -> Integers:
    """Run ends [num_ranks + 1], from 0, where each rank takes all it can within the bound; items may be left over."""
    ends = [0]
    for _ in range(num_ranks):
        ends.append(_reach(prefix, ends[-1], bound))
    return np.array(ends, dtype=np.int64)


def _reach(prefix: Integers, begin: int, bound: int) -> int:
    """Where the longest run from `begin` within the bound ends."""
    return int(np.searchsorted(prefix, prefix[begin] + bound, side="right")) - 1


def _nearest(prefix: Integers, value: float) -> int:
    """The index of the running sum that is nearest to the value."""
    after = min(int(np.searchsorted(prefix, value)), len(prefix) - 1)
    return after - 1 if after and value - prefix[after - 1] <= prefix[after] - value else after


def _sums(costs: Integers) -> Integers:
    """[len + 1] running sums, from 0."""
    return np.append(0, np.cumsum(costs)).astype(np.int64)


def longest_first(costs: Integers, num_ranks: int) -> list[tuple[int, ...]]:
    """The costliest item first, each to the rank with the smallest load so far; then swaps that relieve the busiest."""
    items: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0, 0, rank) for rank in range(num_ranks)]  # load, number of items, rank
    for item in np.argsort(-costs, kind="stable").tolist():
        load, number, rank = heap[0]
        items[rank].append(item)
        heapq.heapreplace(heap, (load + int(costs[item]), number + 1, rank))
    rounds = SWAP_ROUNDS * num_ranks
    good_enough = int(GOOD_ENOUGH * int(costs.sum()) / num_ranks)
    while rounds and relieve_busiest(items, costs, good_enough):
        rounds -= 1
    return [tuple(sorted(own)) for own in items]


def relieve_busiest(items: list[list[int]], costs: Integers, good_enough: int) -> bool:
    """Moves or swaps one item of the busiest rank, with the least loaded rank that helps.

    False where none does, or where no load is above good_enough.
    """
    loads = [int(costs[own].sum()) for own in items]
    by_load = sorted(range(len(items)), key=loads.__getitem__)
    busiest = by_load.pop()
    if loads[busiest] <= good_enough:
        return False
    for other in by_load:
        gap = loads[busiest] - loads[other]
        returned = np.append(costs[items[other]], 0)  # the last: nothing
        shift = costs[items[busiest]][:, None] - returned  # [items of the busiest, items of the other + 1]
        gain = np.where((shift > 0) & (shift < gap), np.minimum(shift, gap - shift), 0)
        if gain.any():
            give, take = divmod(int(gain.argmax()), len(returned))
            item = items[busiest].pop(give)
            if take < len(items[other]):
                items[busiest].append(items[other].pop(take))
            items[other].append(item)
            return True
    return False
