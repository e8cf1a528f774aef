"""Images balanced over ranks that bring their own. Bar: every item once, and no search finds a much better way."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp.comm.routed import routes_of_items
from paddle_vl_sp.vision.homes import POLICIES, balance_images
from paddle_vl_sp.vision.moves import move_few
from paddle_vl_sp.vision.share import tower_alpha

ALPHA = tower_alpha(1152, 4304)
GRID = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8)).map(lambda g: (g[0], 2 * g[1], 2 * g[2]))
GRIDS = st.lists(st.lists(GRID, max_size=5), min_size=1, max_size=5)


def lognormal_grids(rng, num_ranks, fewest, most, text_only):
    """[rank] -> [I, 3]: images of lognormal size, up to 128 x 128 patches; some ranks have text only."""
    grids = []
    for _ in range(num_ranks):
        number = 0 if rng.random() < text_only else rng.integers(fewest, most + 1)
        side = np.clip(np.sqrt(rng.lognormal(6.9, 1, number)) / 2, 1, 64).astype(int) * 2
        grids.append(np.stack([np.ones_like(side), side, side], axis=1))
    return grids


@settings(max_examples=200)
@given(GRIDS, st.sampled_from(POLICIES), st.booleans())
def test_every_item_is_encoded_once_and_loads_are_true(grids, policy, split_frames):
    """Exact, by every policy; what a rank encodes are the grids of its items, with whole videos joined again."""
    share = balance_images(grids, 2, ALPHA, policy, split_frames)
    of_ranks = [np.array(grid, dtype=np.int64).reshape(-1, 3) for grid in grids]
    whole = np.concatenate(of_ranks)
    assert share.patches.sum() == whole.prod(axis=1).sum()
    assert len(share.items) == (whole[:, 0].sum() if split_frames else len(whole))
    assert share.patches_at_home.tolist() == [grid.prod(axis=1).sum() for grid in of_ranks]
    cost = share.patches * (share.patches + ALPHA)
    for rank in range(len(grids)):
        here = share.encoder == rank
        assert share.loads[rank] == cost[here].sum()
        assert share.encoded_grid(rank).prod(axis=1).sum() == share.patches[here].sum() == share.patches_encoded[rank]
    assert share.moves == (share.moved_patches > 0)
    if policy == "home":
        assert not share.moves
        assert [share.encoded_grid(rank).tolist() for rank in range(len(grids))] == [grid.tolist() for grid in of_ranks]


def least(costs, sizes, home, num_ranks, bound=None):
    """All ways tried: the least largest load, or the least that must move for a largest load up to the bound."""
    ways = np.array(list(itertools.product(range(num_ranks), repeat=len(costs))))  # [ways, J]
    largest = np.stack([(costs * (ways == rank)).sum(axis=1) for rank in range(num_ranks)], axis=1).max(axis=1)
    return largest.min() if bound is None else (sizes * (ways != home)).sum(axis=1)[largest <= bound].min()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_no_other_way_is_much_better(num_ranks):
    """At most 1.06 times the least largest load; never more than twice what had to move for it, 1.02 times on average.

    Against all ways to spread up to seven images.
    """
    rng, over = np.random.default_rng(num_ranks), []
    for _ in range(250):
        number = int(rng.integers(1, 8))
        home = np.sort(rng.integers(0, num_ranks, number))
        sizes = np.clip(rng.lognormal(6.9, 1, number), 4, 16384).astype(np.int64) // 4 * 4
        costs = sizes * (sizes + ALPHA)
        encoder = move_few(costs, sizes, home, num_ranks)
        largest = np.bincount(encoder, costs, num_ranks).max()
        moved = sizes[encoder != home].sum()
        assert largest <= 1.06 * least(costs, sizes, home, num_ranks)
        needed = least(costs, sizes, home, num_ranks, largest)
        assert moved <= 2 * needed, (sizes, home, encoder)
        over.append(moved / needed if needed else 1)
    assert np.mean(over) < 1.02


@pytest.mark.parametrize(("num_ranks", "fewest", "most"), [(2, 8, 16), (4, 8, 16), (8, 1, 8), (32, 1, 8), (64, 4, 32)])
def test_the_busiest_rank_is_within_the_bar(num_ranks, fewest, most):
    """At most 1.1 times the lower bound, the mean or the largest image, in each of 60 batches; a third moves at most.

    Unbalanced the same batches are at 1.3 and more on average.
    """
    rng, before, moved = np.random.default_rng(0), [], []
    for _ in range(60):
        share = balance_images(lognormal_grids(rng, num_ranks, fewest, most, 0.2), 2, ALPHA)
        assert share.loads.max() <= 1.1 * share.least_load
        before.append(share.loads_at_home.max() / (share.least_load or 1))
        moved.append(share.moved_patches / (share.patches.sum() or 1))
    assert np.mean(before) > 1.3
    assert np.mean(moved) < 0.34


def test_what_is_balanced_already_stays():
    """Nothing moves within 5 % of the mean, nor if one image is all there is."""
    for grids in ([[[1, 40, 40]], [[1, 40, 42]]], [[[1, 128, 128]], [], [[1, 2, 2]]], [[], []]):
        assert not balance_images(grids, 2, ALPHA).moves


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_without_images_and_one_with_all(policy):
    share = balance_images([[], [[1, 4, 4]] * 6, []], 2, ALPHA, policy)
    assert share.patches_at_home.tolist() == [0, 96, 0]
    assert share.patches_encoded.tolist() == ([0, 96, 0] if policy == "home" else [32, 32, 32])


def test_wrong_policy():
    with pytest.raises(ValueError, match="policy must be one of 'longest', 'contiguous', 'count', 'home', got 'best'"):
        balance_images([[]], 2, ALPHA, "best")


ITEM = st.tuples(st.integers(0, 3), st.lists(st.booleans(), min_size=4, max_size=4), st.integers(0, 4))


@settings(max_examples=200)
@given(st.lists(ITEM, max_size=9))
def test_routes_of_items(items):
    """Exact: every rank's rows, sent and put in order in numpy, are those of its items in their order."""
    source, lengths = (np.array([item[i] for item in items], dtype=np.int64) for i in (0, 2))
    wanted = np.array([item[1] for item in items], dtype=bool).reshape(-1, 4).T
    rows = [[(item, row) for row in range(length)] for item, length in enumerate(lengths)]
    routes = [routes_of_items(source, wanted, lengths, rank) for rank in range(4)]
    held = [[row for item in np.flatnonzero(source == rank) for row in rows[item]] for rank in range(4)]
    for rank, own in enumerate(routes):
        assert own.num_rows == len(held[rank])
        arrived = [held[peer][row] for peer in range(4) for row in routes[peer].sends[rank]]
        assert own.receives == tuple(len(routes[peer].sends[rank]) for peer in range(4))
        got = [arrived[row] for row in own.in_order.array]
        assert got == [row for item in np.flatnonzero(wanted[rank]) for row in rows[item]]


@given(GRIDS, st.sampled_from(POLICIES), st.integers(2, 3))
def test_ranks_of_one_batch(grids, policy, ranks_per_batch):
    """Every rank gets the rows of all images of its batch, whoever encodes them; at home, they are shared by runs."""
    share = balance_images(grids, 2, ALPHA, policy, ranks_per_batch=ranks_per_batch)
    assert share.num_ranks == ranks_per_batch * len(grids)
    assert (share.home // ranks_per_batch == share.batch).all()
    assert (np.diff(share.home) >= 0).all()
    for rank in range(share.num_ranks):
        routes = share.routes_of_rows(rank)
        own = np.array(grids[rank // ranks_per_batch], dtype=np.int64).reshape(-1, 3)
        assert sum(routes.receives) == own.prod(axis=1).sum() // 4
        assert routes.num_rows == share.patches_encoded[rank] // 4
    if policy == "longest":
        assert share.loads.max() <= share.loads_at_home.max()
