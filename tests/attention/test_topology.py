"""How many ranks to Ulysses, how many to the ring, and which groups."""

import paddle
import paddle.distributed as dist
import pytest

from paddle_vl_sp.attention import choose_degrees, groups_from_fleet, groups_from_ranks
from paddle_vl_sp.attention.groups import rows_and_columns
from paddle_vl_sp.comm import exchange
from paddle_vl_sp.comm.exchange import partners
from paddle_vl_sp.testing import FakeGroup


@pytest.mark.parametrize(
    ("kv_heads", "world", "ulysses", "ring"), [(4, 16, 4, 4), (8, 8, 8, 1), (3, 8, 1, 8), (6, 4, 2, 2), (2, 1, 1, 1)]
)
def test_degrees(kv_heads, world, ulysses, ring):
    """Exact degrees, and the sum that they come from."""
    degrees = choose_degrees(kv_heads, world)
    assert (degrees.ulysses, degrees.ring) == (ulysses, ring)
    assert f"gcd({kv_heads} key heads, {world} ranks) = {ulysses}" in str(degrees)


def test_rows_and_columns():
    """Exact members; a number of ranks that does not divide is refused."""
    assert rows_and_columns([8, 9, 10, 11, 12, 13], 2) == (
        [[8, 9], [10, 11], [12, 13]],
        [[8, 10, 12], [9, 11, 13]],
    )
    with pytest.raises(ValueError, match="6 ranks cannot be put into Ulysses groups of 4"):
        rows_and_columns(range(6), 4)


class Made:
    """new_group that remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, members):
        self.asked.append(members)
        return tuple(members)


def test_groups_of_several_sequences_are_made_in_one_order_on_every_rank():
    """Two sequences of four ranks: rank 6 gets its row and its column; every rank makes all groups, alike."""
    orders = []
    for rank in range(8):
        made = Made()
        groups = groups_from_ranks([[0, 1, 2, 3], [4, 5, 6, 7]], 2, rank, made)
        assert rank in groups.ulysses
        assert rank in groups.ring
        orders.append(made.asked)
        if rank == 6:
            assert (groups.ulysses, groups.ring) == ((6, 7), (4, 6))
    assert all(order == orders[0] for order in orders)
    with pytest.raises(ValueError, match="rank 9 must be in exactly one of the sequences"):
        groups_from_ranks([[0, 1]], 2, 9, Made())


class Topology:
    """fleet's hybrid topology, as far as it is asked: degrees and groups of two axes."""

    global_rank = 1

    def __init__(self, sep, context):
        self.sep, self.context = sep, context

    def get_sep_parallel_world_size(self):
        return self.sep

    def get_sep_parallel_group(self):
        return FakeGroup(1, self.sep)

    def get_context_parallel_world_size(self):
        return self.context

    def get_context_parallel_group(self):
        return FakeGroup(0, self.context)

    def topology(self):
        return self

    def get_comm_list(self, axis):
        return {"sep": [[0, 1, 2, 3]]}[axis]


def test_groups_of_fleet():
    """Sizes and members, by a double of fleet's topology; no axis at all is refused."""
    groups = groups_from_fleet(Topology(2, 4))
    assert (groups.ulysses.nranks, groups.ring.nranks) == (2, 4)
    alone = groups_from_fleet(Topology(4, 1))
    assert (alone.ulysses.nranks, alone.ring.nranks, alone.ring.ranks) == (4, 1, [1])
    with pytest.raises(ValueError, match=r"neither a sep nor a context axis.*sep_degree or cp_degree"):
        groups_from_fleet(Topology(1, 1))


def test_one_axis_of_fleet_is_split(monkeypatch):
    """Exact members of both groups; two axes are not split again."""
    monkeypatch.setattr(dist, "new_group", tuple)
    groups = groups_from_fleet(Topology(4, 1), ulysses=2)
    assert (groups.ulysses, groups.ring) == ((0, 1), (1, 3))
    with pytest.raises(ValueError, match="has both axes, sep 2 and context 2: leave ulysses out"):
        groups_from_fleet(Topology(2, 2), ulysses=2)


@pytest.mark.parametrize("size", [2, 4, 6, 8, 10])
def test_partners_leave_nobody_out(size):
    """Exact: in each of size - 1 rounds everyone has one partner, who has it too; all meet all."""
    rounds = list(zip(*(list(partners(rank, size)) for rank in range(size)), strict=True))
    assert len(rounds) == size - 1
    for turn in rounds:
        assert all(turn[turn[rank]] == rank != turn[rank] for rank in range(size))
    assert all({turn[rank] for turn in rounds} == set(range(size)) - {rank} for rank in range(size))


def test_messages_name_their_peers_by_global_rank(monkeypatch):
    """Exact: P2POp takes the rank in the world, our callers give the place in the group."""
    seen = []
    monkeypatch.setattr(exchange, "is_gloo", lambda _: False)
    monkeypatch.setattr(dist, "P2POp", lambda op, x, peer, group: seen.append((op, peer)))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: [])
    one = paddle.ones([1])
    exchange.Messages([(1, one), (2, one)], [(2, one)], FakeGroup(0, 3, [4, 6, 5]))
    assert seen == [(dist.isend, 6), (dist.isend, 5), (dist.irecv, 5)]
