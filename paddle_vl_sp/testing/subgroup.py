"""Sub-groups of a gloo world without new connections: messages and collectives over the default group.

gloo sometimes fails to connect new groups on one machine. A SubGroup is a Paddle `Group` whose process group sends
through the default one, so it can be passed wherever a group can.

gloo matches messages by how many operations each rank has done. So all sub-groups must have one size and do the same
operations at the same time, as the rows, or the columns, of a grid do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.base import core
from paddle.distributed.communication.group import Group

from paddle_vl_sp.comm.exchange import partners

FIRST_ID = 1000  # ids of sub-groups stay clear of Paddle's own


class SubGroup(Group):  # type: ignore[misc]
    """The group of these global ranks, in this order; each of them must make it. For tests on the CPU.

    ::

        rank = dist.get_rank()  # of four: the rows [0 1], [2 3] of a grid
        row = SubGroup([rank - rank % 2, rank - rank % 2 + 1])
        dist.all_reduce(x, group=row)
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        members = [int(rank) for rank in ranks]
        me = dist.get_rank()
        if len(set(members)) != len(members) or me not in members:
            raise ValueError(f"a SubGroup is made by its members, each named once; rank {me} got ranks {members}")
        if len(members) > 1 and len(members) % 2:
            raise ValueError(f"a SubGroup has an even number of members, got {members}: its exchanges go in pairs")
        identity = FIRST_ID + sum(1 << rank for rank in members)
        super().__init__(members.index(me), identity, members, _EmulatedProcessGroup(members), f"emulated {members}")


class _Done:
    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _complete(method: Callable[..., None]) -> Callable[..., _Done]:
    """Makes the method return a finished task; it ends before it returns, whatever its sync_op."""

    @functools.wraps(method)
    def call(*args: object) -> _Done:
        method(*args)
        return _Done()

    return call


class _EmulatedProcessGroup:
    """The methods of a process group that paddle.distributed calls; ranks are those within the sub-group."""

    def __init__(self, members: list[int]) -> None:
        self._members = members
        self._world = dist.get_group(0).process_group
        self._rank, self._size = members.index(dist.get_rank()), len(members)

    def name(self) -> str:
        return "GLOO"

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    @_complete
    def send(self, tensor: Tensor, peer: int, _sync_op: bool = True) -> None:
        self._world.send(tensor, self._members[peer], True).wait()

    @_complete
    def recv(self, tensor: Tensor, peer: int, _sync_op: bool = True) -> None:
        self._world.recv(tensor, self._members[peer], True).wait()

    @_complete
    def all_gather(self, outputs: list[Tensor], tensor: Tensor, _sync_op: bool = True) -> None:
        for output, value in zip(outputs, self._gather(tensor), strict=True):
            paddle.assign(value, output=output)

    @_complete
    def all_gather_into_tensor(self, output: Tensor, tensor: Tensor, _sync_op: bool = True) -> None:
        paddle.assign(paddle.concat(self._gather(tensor)).reshape(output.shape), output=output)

    @_complete
    def all_reduce(self, tensor: Tensor, op: core.ReduceOp = core.ReduceOp.SUM, _sync_op: bool = True) -> None:
        paddle.assign(self._reduced(tensor, op), output=tensor)

    @_complete
    def reduce(self, tensor: Tensor, root: int, op: core.ReduceOp = core.ReduceOp.SUM, _sync_op: bool = True) -> None:
        total = self._reduced(tensor, op)
        if self._rank == root:
            paddle.assign(total, output=tensor)

    @_complete
    def broadcast(self, tensor: Tensor, source: int, _sync_op: bool = True) -> None:
        if self._rank != source:
            self.recv(tensor, source)
            return
        for peer in range(self._size):
            if peer != source:
                self.send(tensor, peer)

    @_complete
    def barrier(self, _device: int = 0) -> None:
        self._gather(paddle.zeros([1], "int32"))

    def _reduced(self, tensor: Tensor, op: core.ReduceOp) -> Tensor:
        values = [
            value.astype("float32").numpy() if _is_half(value) else value.numpy() for value in self._gather(tensor)
        ]
        total = functools.reduce(_REDUCTIONS[op], values)  # in rank order: the same bits on every rank
        return paddle.to_tensor(total).astype(tensor.dtype).reshape(tensor.shape)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every member's tensor, by an exchange with each other member in turn."""
        values = [tensor if peer == self._rank else paddle.empty_like(tensor) for peer in range(self._size)]
        for partner in partners(self._rank, self._size) if self._size > 1 else ():
            if self._rank < partner:
                self.send(tensor, partner)
            self.recv(values[partner], partner)
            if self._rank > partner:
                self.send(tensor, partner)
        return values


_REDUCTIONS: dict[core.ReduceOp, np.ufunc] = {
    core.ReduceOp.SUM: np.add,
    core.ReduceOp.MAX: np.maximum,
    core.ReduceOp.MIN: np.minimum,
    core.ReduceOp.PRODUCT: np.multiply,
}


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (paddle.float16, paddle.bfloat16)
