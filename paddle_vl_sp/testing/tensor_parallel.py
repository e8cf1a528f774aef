"""Tensor-parallel and sequence-parallel layers on CPU ranks, for tests without a GPU.

Paddle's tensor-parallel layers run on the gloo backend but for four calls, which gloo or the CPU
kernels lack. ``enable_tensor_parallel_on_cpu`` supplies those four from what is there:

==================================================  ================================================
what the layers call                                made of
==================================================  ================================================
``paddle.distributed.stream.reduce_scatter``        all_reduce, then this rank's slice
``ProcessGroupGloo.all_reduce_on_calc_stream``      ``ProcessGroupGloo.allreduce`` and wait
``paddle._C_ops.c_identity`` (no CPU kernel)        a copy
``paddle._C_ops.c_concat`` (no CPU kernel)          all_gather, concatenated on the last axis;
                                                    backward: this rank's columns
==================================================  ================================================

Tensors on a device, and groups of any other backend, still take Paddle's own way. A rank does::

    paddle.set_device("cpu")
    with enable_tensor_parallel_on_cpu():
        init_tensor_parallel(nranks)
        model = ...      # its layers look for the group when they are made: build it last
        ...              # forward, backward and optimizer inside the ``with``

Not supplied: ``c_softmax_with_cross_entropy``; gather the logits: ``tensor_parallel_output=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle
import paddle.distributed as dist
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import fleet

_enabled: list[tuple[Any, str, Any]] = []
_ABSENT = object()


class TensorParallelOnCpu:
    """Puts Paddle's own calls back by ``disable()`` or on leaving ``with``, if it was this one that supplied others."""

    def __init__(self, has_supplied: bool) -> None:
        self._has_supplied = has_supplied

    def disable(self) -> None:
        while self._has_supplied and _enabled:
            owner, name, original = _enabled.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def __enter__(self) -> TensorParallelOnCpu:
        return self

    def __exit__(self, *unused: object) -> None:
        self.disable()


def enable_tensor_parallel_on_cpu() -> TensorParallelOnCpu:
    """Supplies the four calls, once; a second call changes nothing, and neither does leaving it."""
    is_first = not _enabled
    if is_first:
        stream = dist.communication.stream
        _supply(stream, "reduce_scatter", _reduce_scatter_over(stream.reduce_scatter))
        _supply(core.ProcessGroupGloo, "all_reduce_on_calc_stream", _all_reduce_on_calc_stream)
        _supply(paddle._C_ops, "c_identity", _c_identity_over(paddle._C_ops.c_identity))
        _supply(paddle._C_ops, "c_concat", _c_concat_over(paddle._C_ops.c_concat))
    return TensorParallelOnCpu(is_first)


def init_tensor_parallel(nranks: int) -> Any:
    """``fleet.init`` with one tensor-parallel group of all ``nranks`` ranks; returns that group.

    It is the default group: on gloo a second group over the same ranks often fails to connect.
    """
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": nranks, "pp_degree": 1}
    with _default_group_for_all_ranks():
        fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group().get_model_parallel_group()


@contextmanager
def _default_group_for_all_ranks() -> Iterator[None]:
    new_group = dist.new_group

    def reuse(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is None or len(ranks) == dist.get_world_size():
            return dist.get_group(0)
        return new_group(ranks, *args, **kwargs)

    dist.new_group = reuse
    try:
        yield
    finally:
        dist.new_group = new_group


def _supply(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    # vars, not getattr: what a class inherits must be inherited again afterwards.
    _enabled.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, replacement)


def _is_gloo(group: Any) -> bool:
    return isinstance(group.process_group, core.ProcessGroupGloo)


class _Done:
    """The task of a call that has finished."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _reduce_scatter_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        tensor: paddle.Tensor,
        tensor_or_tensor_list: Any,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        sync_op: bool = True,
        use_calc_stream: bool = False,
    ) -> Any:
        group = group or dist.get_group(0)
        if not _is_gloo(group):
            return original(tensor, tensor_or_tensor_list, op, group, sync_op, use_calc_stream)
        whole = tensor_or_tensor_list  # [nranks * rows, ...]
        if isinstance(whole, (list, tuple)):
            whole = paddle.concat(list(whole), axis=0)
        whole = whole.clone()  # all_reduce writes in place
        dist.all_reduce(whole, op=op, group=group)
        rows = tensor.shape[0]
        paddle.assign(whole[group.rank * rows : (group.rank + 1) * rows], tensor)
        return _Done()

    return reduce_scatter


def _all_reduce_on_calc_stream(self: Any, tensor: paddle.Tensor, op: Any) -> _Done:
    self.all_reduce(tensor, op, True).wait()
    return _Done()


def _c_identity_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def c_identity(x: paddle.Tensor, *args: Any) -> paddle.Tensor:
        return paddle.assign(x) if x.place.is_cpu_place() else original(x, *args)

    return c_identity


class _ConcatColumns(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, group: Any) -> paddle.Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        parts: list[paddle.Tensor] = []
        dist.all_gather(parts, x.contiguous(), group=group)
        return paddle.concat(parts, axis=-1)

    @staticmethod
    def backward(ctx: Any, grad: paddle.Tensor) -> paddle.Tensor:
        start = ctx.group.rank * ctx.width
        return grad[..., start : start + ctx.width].contiguous()


def _c_concat_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def c_concat(x: paddle.Tensor, rank: int, nranks: int, ring_id: int, *args: Any) -> Any:
        if not x.place.is_cpu_place():
            return original(x, rank, nranks, ring_id, *args)
        return _ConcatColumns.apply(x, dist.get_group(ring_id))

    return c_concat
