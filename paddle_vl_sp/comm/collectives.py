"""Collectives without gradients, and what replaces those that a backend lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp.log import logger

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Group(Protocol):
    """A process group: Paddle's `Group`, or `testing.FakeGroup`. rank is the rank within the group."""

    @property
    def rank(self) -> int: ...
    @property
    def nranks(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def ranks(self) -> Sequence[int]: ...


def has_peers(group: Group | None) -> TypeIs[Group]:
    """Whether the group has another rank; False for None, which means no group."""
    return group is not None and group.nranks > 1


def warn_of_no_group(group: Group | None, function: str, left_out: str) -> None:
    """Warns of group=None in one process of several: no group to this package, the world to paddle.distributed."""
    if group is None and dist.is_initialized() and dist.get_world_size() > 1:
        logger.warning(
            "%s got group=None, which means no group, so %s: pass the group; paddle.distributed.get_group(0) is the "
            "world",
            function,
            left_out,
        )


def is_gloo(group: Group) -> bool:
    return str(getattr(group, "backend", "")).upper() == "GLOO"


def has_reduce_scatter(group: Group) -> bool:
    """False on gloo, where an all-reduce and a cut replace it, with twice the bytes."""
    return not is_gloo(group)


def wire_place(group: Group) -> str:
    """The place that a tensor must be on to be sent in this group."""
    return "cpu" if is_gloo(group) else str(paddle.device.get_device())


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[rows, ...], of one shape on all ranks  ->  [nranks * rows, ...], rank after rank."""
    out = x.new_empty([group.nranks * x.shape[0], *x.shape[1:]])  # on x's device, which may not be the default one
    if x.size:  # gloo ends the process on an empty tensor
        dist.stream.all_gather(out, x.contiguous(), group=group, sync_op=True)
    return out


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """The sum over the group, in x's dtype. Overwrites x if it is contiguous: no other code may use its memory."""
    return _reduced(x, group, dist.all_reduce)


def reduce_sum(x: Tensor, owner: int, group: Group) -> Tensor:
    """As `all_reduce_sum`, but on rank `owner` of the group alone; the others' results are undefined."""
    return _reduced(x, group, functools.partial(dist.reduce, dst=group.ranks[owner]))


def _reduced(x: Tensor, group: Group, reduce: Callable[..., Any]) -> Tensor:
    if not x.size:
        return x
    if is_gloo(group) and x.dtype == paddle.float16:  # gloo's float16 sum is wrong: 1 + 2 is inf
        return _reduced(x.astype("float32"), group, reduce).astype("float16")
    x = x.contiguous()
    reduce(x, group=group)
    return x


def reduce_scatter_sum(x: Tensor, group: Group) -> Tensor:
    """[nranks * rows, ...]  ->  [rows, ...]: of all ranks' blocks for this rank, the sum.

    Only where `has_reduce_scatter`.
    """
    out = x.new_empty([x.shape[0] // group.nranks, *x.shape[1:]])
    if x.size:
        dist.stream.reduce_scatter(out, x.contiguous(), group=group, sync_op=True)
    return out


def broadcast(x: Tensor, owner: int, group: Group) -> Tensor:
    """x of rank `owner` of the group; on the others x only gives the shape, and may be overwritten."""
    x = x.contiguous()
    if x.size:
        dist.broadcast(x, src=group.ranks[owner], group=group)
    return x
