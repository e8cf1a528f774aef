"""Routes of rows as values, all ranks together in one process. Bar: exact, against loops over ranks and rows."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual, replace_rows
from paddle_vl_sp.comm.routed import Routes, exchange_rows, routes_to_owners
from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.vision.owners import own_plan, rows_from_here, wanted_rows


def drawn(seed):
    """Rows that some ranks hold, in an order, and which rank wants which: none, one, or several."""
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 6))
    counts = rng.integers(0, 7, num_ranks) * rng.integers(0, 2, num_ranks)
    order = None if seed % 3 == 0 else rng.permutation(int(counts.sum()))
    wanted = rng.random([num_ranks, int(counts.sum())]) < rng.choice([0, 0.3, 0.9, 1])
    return UnevenRows(tuple(int(count) for count in counts), order), wanted


@pytest.mark.parametrize("seed", range(60))
def test_every_rank_gets_what_it_wants(seed):
    """Exact: what arrives, its order, and how much is announced; a simulated exchange of all ranks."""
    rows, wanted = drawn(seed)
    num_ranks = len(rows.counts)
    routes = [routes_to_owners(wanted, rows, rank) for rank in range(num_ranks)]
    held = [rows.rows_of(rank).array for rank in range(num_ranks)]
    for me, own in enumerate(routes):
        arrived = [held[source][each.sends[me]] for source, each in enumerate(routes)]
        assert own.receives == tuple(len(part) for part in arrived)
        np.testing.assert_array_equal(np.concatenate(arrived)[own.in_order.array], np.flatnonzero(wanted[me]))
        result = np.arange(len(own.in_order.array))
        np.testing.assert_array_equal(result[own.in_order.array][own.as_arrived.array], result)


@pytest.mark.parametrize("seed", range(60))
def test_every_copy_returns_to_its_row(seed):
    """Exact: each copy that goes out is found once, in the order of the ranks; none is behind the last."""
    rows, wanted = drawn(seed)
    for rank in range(len(rows.counts)):
        routes = routes_to_owners(wanted, rows, rank)
        sent = routes.outgoing.array.tolist()
        places = np.stack([each.array for each in routes.copies], axis=1)  # [rows, copies]
        for row, of_row in enumerate(places):
            found = [place for place in of_row.tolist() if place < len(sent)]
            assert found == [place for place, which in enumerate(sent) if which == row]
            assert set(of_row.tolist()) - set(found) <= {len(sent)}


def test_the_examples_of_the_docstrings():
    """Exact."""
    routes = Routes(4, (np.array([1]), np.array([0, 3]), np.zeros(0, np.int64)), (1, 0, 1), np.array([1, 0]))
    assert routes.send_counts == (1, 2, 0)
    assert routes.outgoing.array.tolist() == [1, 0, 3]
    assert [each.array.tolist() for each in routes.copies] == [[1, 0, 3, 2]]
    assert routes.as_arrived.array.tolist() == [1, 0]
    wanted = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)
    of_first = routes_to_owners(wanted, UnevenRows((3, 2), np.array([0, 3, 1, 4, 2])), 0)
    assert [rows.tolist() for rows in of_first.sends] == [[0, 1], [2]]
    assert of_first.receives == (2, 1)
    assert of_first.order.tolist() == [0, 2, 1]


def test_one_process_sends_to_itself():
    """Exact, forward and backward; a row that is sent twice has the sum of both gradients."""
    x = paddle.arange(8, dtype="float32").reshape([4, 2])
    x.stop_gradient = False
    (rows, twice), counts = exchange_rows([x, x * 2], [[3, 0, 3]], None)
    assert counts == (3,)
    assert rows.tolist() == [[6, 7], [0, 1], [6, 7]]
    assert twice.tolist() == [[12, 14], [0, 2], [12, 14]]
    (rows * paddle.to_tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert x.grad.tolist() == [[10, 10], [0, 0], [0, 0], [101, 101]]
    with pytest.raises(OSError, match="RouteRows has no second gradient"):
        paddle.grad(exchange_rows(x, [[0]], None)[0].sum(), [x], create_graph=True)


@pytest.mark.parametrize(
    ("x", "sends", "message"),
    [
        (paddle.zeros([2, 3]), [[0], [1]], "sends must be 1 lists"),
        (paddle.zeros([2, 3]), [[0, 2]], "from 0 to 1, got"),
        (paddle.zeros([2, 3]), [[-1]], "from 0 to 1, got"),
        (paddle.zeros([2, 3]), [[0.5]], "from 0 to 1, got"),
        (paddle.zeros([2, 3]), [[[0]]], "from 0 to 1, got"),
        ([paddle.zeros([2, 3]), paddle.zeros([1, 3])], [[0]], "must have equally many rows"),
        (np.zeros([2, 3]), [[0]], "must be a Paddle tensor"),
    ],
)
def test_wrong_rows_are_refused(x, sends, message):
    """A ValueError before anything is sent."""
    with pytest.raises(ValueError, match=message):
        exchange_rows(x, sends, None)


MASK = np.array([[1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0, 0]], bool)
LAYOUT = SeqLayout(8, cp_size=2, cp_rank=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
def test_the_own_plan_places_the_own_rows_alike(padded, on_host, is_given):
    """Bit-exact: own rows by the own plan are all rows by the plan, wherever it is and whether or not it is padded."""
    num_features = int(MASK.sum())
    given = num_features if is_given else None
    tokens = MASK if on_host else paddle.to_tensor(MASK)
    plan = plan_visual(tokens, None, LAYOUT, sequence_first=True, num_features=given, padded=padded)
    wanted = wanted_rows(plan, num_features)
    own = own_plan(plan, len(wanted))
    assert own.on_host == on_host
    assert own.num_features == len(wanted) == len(own.update_indices)
    assert wanted.tolist() == [2, 6, 7]  # of each sample positions 2 to 5
    own.check()
    hidden, features = paddle.randn([4, 2, 3]), paddle.randn([num_features, 3])
    (rows,) = rows_from_here([features], wanted)
    for place in (replace_rows, add_rows):
        got, expected = place(hidden, rows, own.to("cpu")), place(hidden, features, plan.to("cpu"))
        assert got.numpy().tobytes() == expected.numpy().tobytes()


def test_plans_of_other_batches_are_refused():
    """A ValueError that names both numbers, or the indices."""
    plan = plan_visual(MASK, None, LAYOUT, sequence_first=True)
    padded = plan_visual(paddle.to_tensor(MASK), None, LAYOUT, sequence_first=True, num_features=9, padded=True)
    for each in (plan, padded):
        with pytest.raises(ValueError, match="has 8 visual tokens but 9 feature rows"):
            wanted_rows(each, 9)
    for gather in ([0, 9], [3, 1], [2, 2], [-1, 3]):
        indices = paddle.to_tensor([0, 1]), paddle.to_tensor(gather)
        with pytest.raises(ValueError, match="gather indices increase and are below 9"):
            wanted_rows(VisualPlan.from_indices(*indices, (4, 2), None), 9)
