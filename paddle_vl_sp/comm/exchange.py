"""Messages between two ranks, and all-to-all, on NCCL and on gloo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp.comm.collectives import Group, has_peers, is_gloo


class Messages:
    """Sends and receives that run while the caller computes, until `wait`. On gloo all are done on construction.

    sends    (peer, tensor): peer is a rank of the group
    expects  (peer, tensor): the tensor is overwritten; messages between two ranks keep their order
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
        """Returns when the expected tensors may be used; on a GPU the compute stream waits, not the host."""
        for task in self._tasks:
            task.wait()
        self._tasks, self._sends = [], []


def _exchange_on_gloo(sends: Sequence[tuple[int, Tensor]], expects: Sequence[tuple[int, Tensor]], group: Group) -> None:
    """Blocking sends and receives, in rounds in which every rank has a partner.

    gloo matches messages by how many operations each rank has done before: every rank must do the same number in the
    same order. So in each round the ranks form pairs, and each pair exchanges a message each way, a dummy if need be.
    """
    if group.nranks % 2:
        _exchange_by_gathering(sends, expects, group)
        return
    like = (sends or expects)[0][1]
    for partner in partners(group.rank, group.nranks):
        outgoing = _bundle([x for peer, x in sends if peer == partner], like)
        wanted = [x for peer, x in expects if peer == partner]
        incoming = _buffer([max(sum(x.size for x in wanted), 1)], like)
        if group.rank < partner:
            dist.send(outgoing, dst=group.ranks[partner], group=group)
        dist.recv(incoming, src=group.ranks[partner], group=group)
        if group.rank > partner:
            dist.send(outgoing, dst=group.ranks[partner], group=group)
        _unbundle(incoming, wanted)


def partners(rank: int, size: int) -> Iterator[int]:
    """A rank's partner in each of size - 1 rounds: each round pairs all ranks, and every two meet once. size is even.

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
    """For an odd number of ranks, which cannot form pairs: every rank gets all messages and keeps its own."""
    sent: list[list[tuple[int, npt.NDArray[Any]]]] = []  # of every rank
    dist.all_gather_object(sent, [(peer, x.numpy()) for peer, x in sends], group=group)
    for source in range(group.nranks):
        arrived = [value for peer, value in sent[source] if peer == group.rank]
        wanted = [x for peer, x in expects if peer == source]
        for value, x in zip(arrived, wanted, strict=True):
            paddle.assign(paddle.to_tensor(value), output=x)


def _bundle(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return paddle.concat([x.flatten() for x in tensors if x.size] or [_buffer([1], like)])


def _unbundle(bundle: Tensor, tensors: Sequence[Tensor]) -> None:
    begin = 0
    for x in tensors:
        if x.size:
            paddle.assign(bundle[begin : begin + x.size].reshape(x.shape), output=x)
        begin += x.size


def _buffer(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory to receive into: zeros, since under FLAGS_check_nan_inf the garbage of `paddle.empty` may be an error."""
    return like.new_zeros(list(shape))


def pass_on(tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> tuple[list[Tensor], Messages]:
    """Starts to send the tensors to the next rank of the ring, and to receive the previous one's, of these shapes."""
    following, previous = (group.rank + 1) % group.nranks, (group.rank - 1) % group.nranks
    arriving = [_buffer(shape, x) for shape, x in zip(shapes, tensors, strict=True)]
    messages = Messages([(following, x) for x in tensors], [(previous, x) for x in arriving], group)
    return arriving, messages


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Group) -> list[Tensor]:
    """parts[r] goes to rank r; the r-th tensor of the result, of shapes[r], came from rank r. By messages."""
    me = group.rank
    arriving = [_buffer(shape, parts[me]) for shape in shapes]
    others = [rank for rank in range(group.nranks) if rank != me]
    Messages([(r, parts[r]) for r in others], [(r, arriving[r]) for r in others], group).wait()
    arriving[me] = parts[me]
    return arriving


def all_to_all_rows(x: Tensor, sends: Sequence[int], receives: Sequence[int], group: Group | None) -> Tensor:
    """x [sum(sends), width]: sends[r] rows to rank r, rank after rank -> [sum(receives), width] from the ranks.

    One collective on one buffer; messages on gloo. No group, or one rank, gives a copy.
    """
    if not has_peers(group):
        return x.clone()
    if has_all_to_all(group):
        arriving = _buffer([sum(receives), *x.shape[1:]], x)
        dist.alltoall_single(arriving, x.contiguous(), list(sends), list(receives), group=group)
        return arriving
    ends = np.cumsum(sends).tolist()
    parts = [x[end - count : end] for end, count in zip(ends, sends, strict=True)]
    return paddle.concat(all_to_all(parts, [[count, *x.shape[1:]] for count in receives], group))


def has_all_to_all(group: Group) -> bool:
    """False on gloo, where messages replace it."""
    return not is_gloo(group)
