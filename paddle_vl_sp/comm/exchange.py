"""Messages between ranks and all-to-all, on NCCL and on gloo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp.comm.collectives import Group, is_gloo


class Messages:
    """Messages under way. On NCCL they travel beside what is computed until `wait`; gloo is done when this is made.

    sends    (peer, tensor): peer is a rank of the group
    expects  (peer, tensor): the tensor is written; messages between two ranks keep their order
    """

    def __init__(
        self, sends: Sequence[tuple[int, Tensor]], expects: Sequence[tuple[int, Tensor]], group: Group
    ) -> None:
        self._sends = [(peer, x.contiguous()) for peer, x in sends]
        self._tasks: list[Any] = []
        if is_gloo(group):
            _exchange_on_gloo(self._sends, expects, group)
            return
        operations = [dist.P2POp(dist.isend, x, group.ranks[peer], group) for peer, x in self._sends if x.size]
        operations += [dist.P2POp(dist.irecv, x, group.ranks[peer], group) for peer, x in expects if x.size]
        if operations:
            self._tasks = dist.batch_isend_irecv(operations)

    def wait(self) -> None:
        """Until what was expected is there; on a GPU the compute stream waits, not the host."""
        for task in self._tasks:
            task.wait()
        self._tasks, self._sends = [], []


def _exchange_on_gloo(sends: Sequence[tuple[int, Tensor]], expects: Sequence[tuple[int, Tensor]], group: Group) -> None:
    """Blocking sends that meet blocking receives, in rounds that leave nobody out.

    gloo matches messages by how many operations each rank has done before: every rank must do the same number in the
    same order. So each round is a perfect matching, in which a pair exchanges one message each way, if only a dummy.
    """
    if group.nranks % 2:
        _exchange_by_gathering(sends, expects, group)
        return
    like = (sends or expects)[0][1]
    for partner in partners(group.rank, group.nranks):
        outgoing = _bundle([x for peer, x in sends if peer == partner], like)
        wanted = [x for peer, x in expects if peer == partner]
        incoming = _room([max(sum(x.size for x in wanted), 1)], like)
        there = {"dst": group.ranks[partner]}, {"src": group.ranks[partner]}
        if group.rank < partner:
            dist.send(outgoing, group=group, **there[0])
        dist.recv(incoming, group=group, **there[1])
        if group.rank > partner:
            dist.send(outgoing, group=group, **there[0])
        _unbundle(incoming, wanted)


def partners(rank: int, size: int) -> Iterator[int]:
    """Whom a rank meets in each of size - 1 rounds; everyone meets everyone once, and nobody waits. size is even.

    size 4, round by round     0-3 1-2 | 0-1 2-3 | 0-2 1-3
    """
    last = size - 1
    for turn in range(last):
        meets_last = turn * (size // 2) % last
        if rank == last:
            yield meets_last
        else:
            yield last if rank == meets_last else (turn - rank) % last


def _exchange_by_gathering(
    sends: Sequence[tuple[int, Tensor]], expects: Sequence[tuple[int, Tensor]], group: Group
) -> None:
    """For an odd number of ranks, which no round can pair: everyone gets everything and takes its own."""
    everyones: list[list[tuple[int, Any]]] = []
    dist.all_gather_object(everyones, [(peer, x.numpy()) for peer, x in sends], group=group)
    for source in range(group.nranks):
        mine = [value for peer, value in everyones[source] if peer == group.rank]
        wanted = [x for peer, x in expects if peer == source]
        for value, x in zip(mine, wanted, strict=True):
            paddle.assign(paddle.to_tensor(value), output=x)


def _bundle(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return paddle.concat([x.flatten() for x in tensors if x.size] or [_room([1], like)])


def _unbundle(bundle: Tensor, tensors: Sequence[Tensor]) -> None:
    begin = 0
    for x in tensors:
        if x.size:
            paddle.assign(bundle[begin : begin + x.size].reshape(x.shape), output=x)
        begin += x.size


def _room(shape: Sequence[int], like: Tensor) -> Tensor:
    """For what arrives; zeros, since FLAGS_check_nan_inf may end the process at what `paddle.empty` finds there."""
    return like.new_zeros(list(shape))


def pass_on(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> tuple[list[Tensor], Messages]:
    """Sends the tensors to the next rank of the ring and expects the previous one's, of these shapes."""
    following, previous = (group.rank + 1) % group.nranks, (group.rank - 1) % group.nranks
    arriving = [_room(shape, x) for shape, x in zip(shapes, tensors, strict=True)]
    messages = Messages([(following, x) for x in tensors], [(previous, x) for x in arriving], group)
    return arriving, messages


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """parts[r] goes to rank r; the result's r-th, of shapes[r], came from rank r.

    One collective where the backend has it and all parts are alike; messages where it has not or they are not.
    """
    me = group.rank
    arriving = [_room(shape, parts[me]) for shape in shapes]
    alike = len({tuple(x.shape) for x in parts} | {tuple(shape) for shape in shapes}) == 1
    if not is_gloo(group) and alike and parts[me].size:
        dist.alltoall(arriving, [part.contiguous() for part in parts], group=group)
        return arriving
    others = [rank for rank in range(group.nranks) if rank != me]
    Messages([(r, parts[r]) for r in others], [(r, arriving[r]) for r in others], group).wait()
    arriving[me] = parts[me]
    return arriving
