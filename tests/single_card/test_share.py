"""Shares of images. Bar: contiguous is the exact optimum; every item once, and all back in reading order."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp.comm.uneven import MODES, UnevenRows
from paddle_vl_sp.vision.share import POLICIES, share_images, tower_alpha, vision_items

COSTS = st.lists(st.integers(0, 50), max_size=9)
RANKS = st.integers(1, 6)


def best_of_all_cuts(costs, num_ranks):
    """The smallest largest load of all ways to cut a list into runs, tried one by one."""
    cuts = itertools.combinations_with_replacement(range(len(costs) + 1), num_ranks - 1)
    partitions = ([0, *cut, len(costs)] for cut in cuts)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise(ends)) for ends in partitions)


def greedy_loads(costs, num_ranks):
    """Each rank takes images until it has its mean of what is left, and at least one."""
    loads, at = [], 0
    for rank in range(num_ranks):
        mean = sum(costs[at:]) / (num_ranks - rank)
        load = 0
        while at < len(costs) and (load == 0 or load < mean) and len(costs) - at >= num_ranks - rank:
            load, at = load + costs[at], at + 1
        loads.append(load)
    return loads


@settings(max_examples=300)
@given(COSTS, RANKS)
def test_contiguous_is_the_optimum_of_all_cuts(costs, num_ranks):
    """Exact, against all ways to cut tried one by one."""
    share = share_images(costs, [1] * len(costs), num_ranks)
    assert max(share.loads) == best_of_all_cuts(costs, num_ranks)
    assert [item for items in share.items for item in items] == list(range(len(costs)))


@settings(max_examples=300)
@given(COSTS, RANKS, st.sampled_from(POLICIES))
def test_every_item_once_and_loads_true(costs, num_ranks, policy):
    """Exact, by every policy."""
    share = share_images(costs, [3] * len(costs), num_ranks, policy)
    assert sorted(item for items in share.items for item in items) == list(range(len(costs)))
    assert all(list(items) == sorted(items) for items in share.items)
    assert share.loads == tuple(sum(costs[item] for item in items) for items in share.items)
    assert share.counts == tuple(3 * len(items) for items in share.items)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), RANKS, st.sampled_from(POLICIES))
def test_no_rank_is_idle_that_need_not_be(costs, num_ranks, policy):
    """As many busy ranks as there are items, by every policy."""
    share = share_images(costs, costs, num_ranks, policy)
    assert sum(bool(items) for items in share.items) == min(len(costs), num_ranks)


@given(st.lists(st.integers(0, 9), max_size=12), RANKS, st.sampled_from(POLICIES), st.integers(0, 9))
def test_rows_come_back_in_reading_order(token_counts, num_ranks, policy, seed):
    """Exact, row by row."""
    costs = np.random.default_rng(seed).integers(0, 99, size=len(token_counts)).tolist()
    share = share_images(costs, token_counts, num_ranks, policy)
    encoded = [f"{item}.{row}" for items in share.items for item in items for row in range(token_counts[item])]
    order = share.rows.order
    got = encoded if order is None else [encoded[row] for row in order]
    assert got == [f"{item}.{row}" for item, count in enumerate(token_counts) for row in range(count)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 9), st.booleans())
def test_unpacking_indices_undo_each_other(counts, seed, permuted):
    """Exact, with and without an order of its own."""
    total = sum(counts)
    rows = UnevenRows(tuple(counts), np.random.default_rng(seed).permutation(total) if permuted else None)
    whole = np.arange(total)  # the result
    padded = np.append(whole, -1)[rows.to_padded.array].reshape(len(counts), rows.longest)
    np.testing.assert_array_equal(padded.ravel()[rows.from_padded.array], whole)
    for rank, count in enumerate(counts):
        np.testing.assert_array_equal(padded[rank, :count], whole[rows.rows_of(rank).array])
        assert (padded[rank, count:] == -1).all()
        own = np.append(padded[rank, :count], -1)[rows.among_others(rank).array]
        np.testing.assert_array_equal(own, np.where(np.isin(whole, padded[rank, :count]), whole, -1))


@settings(max_examples=300)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=24), st.integers(2, 8))
def test_contiguous_is_never_worse_than_greedy(costs, num_ranks):
    """The largest load, compared."""
    assert max(share_images(costs, costs, num_ranks).loads) <= max(greedy_loads(costs, num_ranks))


DRAWS = {
    "lognormal": lambda rng, number: rng.lognormal(6, 1, number),
    "one huge": lambda rng, number: rng.permutation(np.append(rng.uniform(64, 256, number - 1), 16384)),
    "uniform": lambda rng, number: rng.uniform(64, 4096, number),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_thousand_batches_are_never_worse_than_greedy(draw):
    """4 to 64 images, 2 to 16 ranks, quadratic costs; longest is at worst within 5 % of the best runs."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        patches = draw(rng, int(rng.integers(4, 65))).astype(np.int64)
        costs, num_ranks = (patches * (patches + 6608)).tolist(), int(rng.integers(2, 17))
        runs = max(share_images(costs, costs, num_ranks).loads)
        assert runs <= max(greedy_loads(costs, num_ranks))
        assert max(share_images(costs, costs, num_ranks, "longest").loads) <= 1.05 * runs


def test_longest_first_is_within_a_percent_of_the_bound():
    """Lognormal, 64 images on 8 ranks, mean over 1,000 batches; the bound is the mean load or the largest item."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        costs = rng.lognormal(6, 0.75, size=64).astype(np.int64)
        bound = max(costs.sum() / 8, costs.max())
        ratios.append(max(share_images(costs, costs, 8, "longest").loads) / bound)
    assert 1 <= np.mean(ratios) < 1.002


def test_one_huge_image_is_left_alone():
    """Exact shares."""
    costs = [1, 1, 1, 100, 1, 1, 1, 1]
    assert (3,) in share_images(costs, costs, 4).items
    assert (3,) in share_images(costs, costs, 4, "longest").items


def test_frames_are_items_where_they_are_independent():
    """Exact items, rows and costs, by hand."""
    grid = np.array([[2, 4, 6], [1, 2, 2]])
    costs, rows, items = vision_items(grid, 2, alpha=10, split_frames=True)
    assert items.tolist() == [[1, 4, 6], [1, 4, 6], [1, 2, 2]]
    assert rows.tolist() == [6, 6, 1]
    assert costs.tolist() == [24 * 34, 24 * 34, 4 * 14]
    costs, rows, items = vision_items(grid, 2, alpha=10, split_frames=False)
    assert items.tolist() == grid.tolist()
    assert rows.tolist() == [12, 1]
    assert costs.tolist() == [48 * 58, 4 * 14]
    assert tower_alpha(1152, 4304) == 6608


@pytest.mark.parametrize(
    ("counts", "row_bytes", "mode"),
    [
        ([400, 400, 400, 400], 2**16, "max"),
        ([400, 100, 100, 100], 2**16, "ragged"),  # 1600 and 1400 rows in one collective, 700 in four
        ([8, 4, 4, 4], 2**16, "max"),  # too few bytes to start more than one collective for
        ([80, 10, 10, 10], 2**16, "sum"),  # 320 rows of max, 220 of sum; 110 of ragged and three more collectives
        ([400, 0, 0, 0], 2**16, "ragged"),
        ([4, 0, 0, 0], 2**10, "ragged"),
        ([4, 4, 0, 0], 2**10, "max"),
        ([0, 0, 0, 0], 2**10, "max"),
        ([3, 5], 2**10, "max"),
    ],
)
def test_the_gather_mode_follows_the_bytes(counts, row_bytes, mode):
    """The mode that the comment's arithmetic says; under capture the one whose shapes stay."""
    rows = UnevenRows(tuple(counts))
    assert rows.best_mode(row_bytes) == mode
    assert rows.best_mode(row_bytes, capturing=True) == "max"
    sent = {way: rows.wire_rows(way) for way in MODES}
    assert sent == {"max": len(counts) * max(counts), "sum": 2 * sum(counts), "ragged": sum(counts)}


def test_costs_may_be_fractions():
    """Exact shares and loads."""
    share = share_images([0.5, 0.25, 0.25, 0.5], [1] * 4, 2)
    assert share.items == ((0, 1), (2, 3))
    assert share.loads == (0.75, 0.75)


def test_shares_are_values():
    """Equal where they are the same, and only there."""
    share = share_images([1, 2], [3, 4], 2)
    assert share == share_images(np.array([1, 2]), (3, 4), 2)
    assert share != share_images([1, 2], [4, 3], 2)
    assert share != share_images([2, 1], [3, 4], 2)


def test_report_tells_loads_and_bytes():
    """The numbers, in words."""
    report = share_images([4, 1, 1], [400, 100, 100], 2).report(row_bytes=2**20)
    assert "3 items, 600 rows on 2 ranks, contiguous: the busiest rank has 1.333 of the mean load" in report
    assert "rank   0     1 items      400 rows   66.7% of the load" in report
    assert "each rank sends max 400.0 MiB, sum 600.0 MiB, ragged 300.0 MiB; auto takes ragged" in report
    assert "busiest rank has 1.000" in share_images([], [], 2).report()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1, 2], [1], 2), "every item needs a cost and a token count >= 0, got 2 costs and"),
        (([1, -2], [1, 1], 2), "finite numbers >= 0"),
        (([1, float("nan")], [1, 1], 2), "finite numbers >= 0"),
        (([1], [1], 0), "num_ranks must be at least 1, got 0"),
        (([1], [1], 2, "best"), "policy must be one of 'contiguous', 'longest', 'count', got 'best'"),
    ],
)
def test_errors_name_what_was_got(arguments, words):
    """Refused before anything is shared."""
    with pytest.raises(ValueError, match=words):
        share_images(*arguments)


def test_sharing_needs_no_paddle():
    """Nothing of Paddle among the modules of a new process."""
    code = "import sys, paddle_vl_sp.vision.share; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
