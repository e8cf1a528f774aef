"""Items that ranks already hold, balanced over them with few moves. Numpy only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.vision.balance import longest_first, relieve_busiest

ROUNDS = 4  # swaps for each rank, at most

Integers = npt.NDArray[np.int64]


def move_few(costs: Integers, sizes: Integers, home: Integers, num_ranks: int) -> Integers:
    """The rank that does each item, int64 [J]: loads within 5 % of the least possible, and little of `sizes` moved.

    home  int64 [J], the rank that holds each item, increasing

    The least possible load is the mean, or the costliest item; few items may not allow it. A rank above the limit
    gives items away, large ones first, which cost the most for their size; they go to the rank with the smallest load,
    the costliest first. Where that is not enough, swaps help, and what fits at home again returns::

        costs 8 2 2 4, sizes the same, home 0 0 0 1   loads 12 4, least 8, limit 8   moved 2 2   loads 8 8
    """
    least = max(-(-int(costs.sum()) // num_ranks), int(costs.max(initial=0)))
    limit = least * 21 // 20

    def busiest(encoder: Integers) -> int:
        return int(sum_by_rank(costs, encoder, num_ranks).max())

    done_by = _give_away(costs, sizes, home, num_ranks, limit)
    if busiest(done_by) > limit:
        items = [np.flatnonzero(done_by == rank).tolist() for rank in range(num_ranks)]
        rounds = ROUNDS * num_ranks
        while rounds and relieve_busiest(items, costs, limit):
            rounds -= 1
        done_by = rank_of_each(items, len(costs))
        if busiest(done_by) > limit:  # large items that no swap parts
            done_by = min(done_by, rank_of_each(longest_first(costs, num_ranks), len(costs)), key=busiest)
        _exchange_ranks(done_by, sizes, home, num_ranks)
    return _return_home(done_by, costs, sizes, home, num_ranks, max(limit, busiest(done_by)))


def rank_of_each(items: Sequence[Sequence[int]], number: int) -> Integers:
    """The rank that has each item, [number], from the items of each rank."""
    rank_of = np.empty(number, dtype=np.int64)
    for rank, own in enumerate(items):
        rank_of[list(own)] = rank
    return rank_of


def sum_by_rank(numbers: Integers, rank_of: Integers, num_ranks: int) -> Integers:
    """[num_ranks]"""
    sums = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(sums, rank_of, numbers)
    return sums


def _give_away(costs: Integers, sizes: Integers, home: Integers, num_ranks: int, limit: int) -> Integers:
    """Every rank above the limit gives items away; each goes, costliest first, to the rank with the smallest load."""
    done_by, loads = home.copy(), sum_by_rank(costs, home, num_ranks)
    given: list[int] = []
    for rank in np.flatnonzero(loads > limit).tolist():
        own = np.flatnonzero(home == rank)
        gifts = _cheapest_cover(own[np.argsort(-costs[own], kind="stable")], costs, sizes, int(loads[rank]) - limit)
        loads[rank] -= costs[gifts].sum()
        given += gifts
    heap = [(int(load), rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in sorted(given, key=lambda item: (-int(costs[item]), item)):
        load, rank = heap[0]
        done_by[item] = rank
        heapq.heapreplace(heap, (load + int(costs[item]), rank))
    return done_by


def _cheapest_cover(by_cost: Integers, costs: Integers, sizes: Integers, excess: int) -> list[int]:
    """Items, out of `by_cost` (costliest first), that cost at least `excess` together, of small size.

    Either all that fit into what is left of the excess, and the smallest that covers the rest, or a single item.
    """
    left, chosen, others = excess, [], []
    for item in by_cost.tolist():
        if 0 < costs[item] <= left:
            chosen.append(item)
            left -= int(costs[item])
        else:
            others.append(item)
    if left:
        chosen.append([item for item in others if costs[item] >= left][-1])
    covers_all = by_cost[costs[by_cost] >= excess]
    if len(covers_all) and sizes[covers_all[-1]] <= sizes[chosen].sum():
        return [int(covers_all[-1])]
    return chosen


def _exchange_ranks(done_by: Integers, sizes: Integers, home: Integers, num_ranks: int) -> None:
    """Two ranks exchange all that they do where more of it is then at home."""
    held = np.zeros([num_ranks, num_ranks], dtype=np.int64)  # [done by, home]
    np.add.at(held, (done_by, home), sizes)
    while True:
        at_home = held.diagonal()
        gain = held + held.T - at_home[:, None] - at_home
        first, second = divmod(int(gain.argmax()), num_ranks)
        if gain[first, second] <= 0:
            return
        held[[first, second]] = held[[second, first]]
        of_first, of_second = done_by == first, done_by == second
        done_by[of_first], done_by[of_second] = second, first


def _return_home(
    done_by: Integers, costs: Integers, sizes: Integers, home: Integers, num_ranks: int, limit: int
) -> Integers:
    """Items that moved, the largest first, stay at home after all where the load allows it."""
    loads = sum_by_rank(costs, done_by, num_ranks)
    moved = np.flatnonzero(done_by != home)
    for item in moved[np.argsort(-sizes[moved], kind="stable")].tolist():
        if loads[home[item]] + costs[item] <= limit:
            loads[done_by[item]] -= costs[item]
            loads[home[item]] += costs[item]
            done_by[item] = home[item]
    return done_by
