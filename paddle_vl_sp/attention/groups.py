"""How ranks are split between Ulysses and the ring, and the groups of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paddle_vl_sp.comm.collectives import Group


@dataclass(frozen=True)
class Degrees:
    """The sizes of the two kinds of groups, ulysses * ring ranks together; str() gives the reason too."""

    ulysses: int
    ring: int
    reason: str

    def __str__(self) -> str:
        return f"Ulysses over {self.ulysses}, ring over {self.ring}: {self.reason}"


@dataclass(frozen=True)
class SequenceGroups:
    """This rank's two groups: ulysses undoes the layout's sp cut, ring its cp cut.

    >>> groups = SequenceGroups(ulysses=FakeGroup(1, 2), ring=FakeGroup(0, 2))
    >>> groups.ulysses.rank, groups.ring.rank  # sp_rank and cp_rank of the layout
    (1, 0)
    """

    ulysses: Group
    ring: Group


def choose_degrees(kv_heads: int, world: int) -> Degrees:
    """The most Ulysses ranks that need no key head repeated; the ring takes the rest.

    >>> choose_degrees(kv_heads=4, world=16)
    Degrees(ulysses=4, ring=4, reason='gcd(4 key heads, 16 ranks) = 4, and 16 / 4 = 4')
    """
    if kv_heads < 1 or world < 1:
        raise ValueError(f"kv_heads and world must be at least 1, got {kv_heads} and {world}")
    ulysses = math.gcd(kv_heads, world)
    reason = f"gcd({kv_heads} key heads, {world} ranks) = {ulysses}, and {world} / {ulysses} = {world // ulysses}"
    return Degrees(ulysses, world // ulysses, reason)


def rows_and_columns(ranks: Sequence[int], ulysses: int) -> tuple[list[list[int]], list[list[int]]]:
    """The Ulysses groups and the ring groups: neighbours form a Ulysses group, the ring takes one rank of each.

    ranks 0 1 2 3 4 5, ulysses 2  ->  [0 1] [2 3] [4 5]  and  [0 2 4] [1 3 5]
    """
    if ulysses < 1 or len(ranks) % ulysses:
        raise ValueError(
            f"{len(ranks)} ranks cannot be put into Ulysses groups of {ulysses}: its size must divide them"
        )
    rows = [list(ranks[i : i + ulysses]) for i in range(0, len(ranks), ulysses)]
    return rows, [list(column) for column in zip(*rows, strict=True)]


def groups_from_ranks(
    sequences: Sequence[Sequence[int]], ulysses: int, rank: int, new_group: Callable[[list[int]], Group]
) -> SequenceGroups:
    """The groups of `rank`; each list of `sequences` names the ranks that share one sequence.

    new_group   paddle.distributed.new_group. Every process must make all groups, in the same order: pass all sequences
                of the world on every process, not only this rank's

    ::

        groups = groups_from_ranks([[0, 1, 2, 3], [4, 5, 6, 7]], 2, dist.get_rank(), dist.new_group)
    """
    mine: list[Group] = []
    for ranks in sequences:
        for kind in rows_and_columns(ranks, ulysses):
            made = [(members, new_group(members)) for members in kind]
            mine += [group for members, group in made if rank in members]
    if len(mine) != 2:
        raise ValueError(f"rank {rank} must be in exactly one of the sequences, got {[list(r) for r in sequences]}")
    return SequenceGroups(ulysses=mine[0], ring=mine[1])


def groups_from_fleet(topology: Any, ulysses: int | None = None) -> SequenceGroups:
    """The groups of `fleet.get_hybrid_communicate_group()`: its sep axis is Ulysses, its context axis the ring.

    ulysses   the size of a Ulysses group, where the topology has only one of the two axes and it is to be split

    An axis of degree 1, or one that the topology lacks, is a group of one.

    ::

        groups = groups_from_fleet(fleet.get_hybrid_communicate_group(), ulysses=2)
    """
    sep = _axis(topology, "get_sep_parallel_world_size", "get_sep_parallel_group")
    context = _axis(topology, "get_context_parallel_world_size", "get_context_parallel_group")
    if sep is None and context is None:
        raise ValueError(
            "the topology has neither a sep nor a context axis: set sep_degree or cp_degree in hybrid_configs, or name "
            "the ranks (groups_from_ranks)"
        )
    if ulysses is None:
        rank = topology.global_rank
        return SequenceGroups(sep or Alone(rank), context or Alone(rank))
    if sep is not None and context is not None:
        raise ValueError(
            f"the topology has both axes, sep {sep.nranks} and context {context.nranks}: leave ulysses out"
        )
    import paddle.distributed as dist

    sequences = topology.topology().get_comm_list("sep") if sep else topology._cp_topo.get_comm_list("context")
    return groups_from_ranks(sequences, ulysses, topology.global_rank, dist.new_group)


def sep_group() -> Group:
    """The sep axis of fleet's hybrid topology, the ranks that share a sequence; of degree 1 a group of one."""
    from paddle.distributed import fleet

    try:
        topology = fleet.get_hybrid_communicate_group()
    except (AssertionError, AttributeError):  # how Paddle says that there is none
        topology = None
    if topology is None:
        raise ValueError(
            "no group shares the sequence: fleet has no hybrid topology yet; call fleet.init with sep_degree in "
            "hybrid_configs before the first forward (sep_parallel_size in a YAML), or pass group= to ContextParallel"
        )
    sep = _axis(topology, "get_sep_parallel_world_size", "get_sep_parallel_group")
    return Alone(int(topology.global_rank)) if sep is None else sep


class Alone:
    """A group of one rank; nothing is sent in it."""

    rank = 0
    nranks = world_size = 1
    backend = "NONE"

    def __init__(self, rank: int) -> None:
        self.ranks = [rank]


def group_or_alone(group: Group | None) -> Group:
    """None is no group, one process: a group of one."""
    return Alone(0) if group is None else group


def _axis(topology: Any, size: str, group: str) -> Group | None:
    if not hasattr(topology, size) or getattr(topology, size)() == 1:
        return None
    axis: Group = getattr(topology, group)()
    return axis
