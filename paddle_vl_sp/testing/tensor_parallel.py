"""Tensor-parallel and sequence-parallel layers, and PaddleFormers' trainer, on CPU ranks, for tests without a GPU.

Paddle's tensor-parallel layers run on the gloo backend except for four calls that gloo or the CPU kernels lack, and a
trainer makes three more that ask for a GPU. ``enable_tensor_parallel_on_cpu`` replaces these seven:

==================================================  ================================================
what is called                                      replaced by
==================================================  ================================================
``paddle.distributed.stream.reduce_scatter``        all_reduce, then this rank's slice
``ProcessGroupGloo.all_reduce_on_calc_stream``      ``ProcessGroupGloo.allreduce`` and wait
``paddle._C_ops.c_identity`` (no CPU kernel)        a copy
``paddle._C_ops.c_concat`` (no CPU kernel)          all_gather, concatenated on the last axis;
                                                    backward: this rank's columns
``broadcast_input_data`` of fleet's TensorParallel  the first tensor-parallel rank's batch on all
``paddle.device.synchronize``                       nothing
``paddle.Tensor.cuda``                              the tensor itself
==================================================  ================================================

Tensors on a device, and groups of other backends, still use Paddle's own. On each rank::

    paddle.set_device("cpu")
    with enable_tensor_parallel_on_cpu():
        init_tensor_parallel(nranks)
        model = ...      # after the group: its layers look it up when they are made
        ...              # forward, backward and optimizer, or a whole trainer, inside the ``with``

Not replaced: ``c_softmax_with_cross_entropy``; gather the logits with ``tensor_parallel_output=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext
from paddle.base import core
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group
from paddle.distributed.fleet.meta_parallel import tensor_parallel

from paddle_vl_sp.testing import without_gpu

_replaced: list[tuple[object, str, Any]] = []  # owner, name, original
_ABSENT = object()


class TensorParallelOnCpu:
    """Puts Paddle's own calls back by ``disable()`` or on leaving ``with``, unless an earlier one will do so."""

    def __init__(self, is_first: bool) -> None:
        self._is_first = is_first

    def disable(self) -> None:
        while self._is_first and _replaced:
            owner, name, original = _replaced.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def __enter__(self) -> TensorParallelOnCpu:
        return self

    def __exit__(self, *unused: object) -> None:
        self.disable()


def enable_tensor_parallel_on_cpu() -> TensorParallelOnCpu:
    """Replaces the seven calls, once; a second call changes nothing, and neither does leaving it.

    ::

        with enable_tensor_parallel_on_cpu():
            group = init_tensor_parallel(2)
            model = ...
    """
    is_first = not _replaced
    if is_first:
        stream = dist.communication.stream
        _replace(stream, "reduce_scatter", _reduce_scatter_over(stream.reduce_scatter))
        _replace(core.ProcessGroupGloo, "all_reduce_on_calc_stream", _all_reduce_on_calc_stream)
        _replace(paddle._C_ops, "c_identity", _c_identity_over(paddle._C_ops.c_identity))
        _replace(paddle._C_ops, "c_concat", _c_concat_over(paddle._C_ops.c_concat))
        for owner, name in (
            (tensor_parallel, "broadcast_input_data"),
            (paddle.device, "synchronize"),
            (Tensor, "cuda"),
        ):
            _replace(owner, name, getattr(without_gpu, f"{name}_over")(getattr(owner, name)))
    return TensorParallelOnCpu(is_first)


def init_tensor_parallel(nranks: int) -> Group:
    """``fleet.init`` with one tensor-parallel group of all ``nranks`` ranks; returns that group.

    It is the default group: on gloo a second group of the same ranks often fails to connect.

    ::

        group = init_tensor_parallel(dist.get_world_size())  # before the model is built
    """
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": nranks, "pp_degree": 1}
    with _default_group_for_all_ranks():
        fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group().get_model_parallel_group()


@contextmanager
def _default_group_for_all_ranks() -> Iterator[None]:
    new_group = dist.new_group

    def reuse(ranks: list[int] | None = None, *args: object, **options: object) -> Group:
        if ranks is None or len(ranks) == dist.get_world_size():
            return dist.get_group(0)
        return new_group(ranks, *args, **options)

    dist.new_group = reuse
    try:
        yield
    finally:
        dist.new_group = new_group


def _replace(owner: object, name: str, replacement: Callable[..., Any]) -> None:
    # vars, not getattr: an inherited attribute must be inherited again afterwards
    _replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, replacement)


def _is_gloo(group: Group) -> bool:
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
        tensor: Tensor,
        tensor_or_tensor_list: Tensor | Sequence[Tensor],
        op: int = dist.ReduceOp.SUM,
        group: Group | None = None,
        sync_op: bool = True,
        use_calc_stream: bool = False,
    ) -> Any:
        group = group or dist.get_group(0)
        if not _is_gloo(group):
            return original(tensor, tensor_or_tensor_list, op, group, sync_op, use_calc_stream)
        blocks = tensor_or_tensor_list
        whole = paddle.concat(list(blocks)) if isinstance(blocks, (list, tuple)) else paddle.assign(blocks)
        dist.all_reduce(whole, op=op, group=group)  # [nranks * rows, ...], in place: not in the caller's memory
        rows = tensor.shape[0]
        paddle.assign(whole[group.rank * rows : (group.rank + 1) * rows], tensor)
        return _Done()

    return reduce_scatter


def _all_reduce_on_calc_stream(self: core.ProcessGroupGloo, tensor: Tensor, op: core.ReduceOp) -> _Done:
    self.all_reduce(tensor, op, True).wait()
    return _Done()


def _c_identity_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def c_identity(x: Tensor, *args: object) -> Tensor:
        return paddle.assign(x) if x.place.is_cpu_place() else original(x, *args)

    return c_identity


class _ConcatColumns(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.width = group, x.shape[-1]
        parts: list[Tensor] = []
        dist.all_gather(parts, x.contiguous(), group=group)
        return paddle.concat(parts, axis=-1)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        start = ctx.group.rank * ctx.width
        return grad[..., start : start + ctx.width].contiguous()


def _c_concat_over(original: Callable[..., Any]) -> Callable[..., Any]:
    def c_concat(x: Tensor, rank: int, nranks: int, ring_id: int, *args: object) -> Tensor:
        if not x.place.is_cpu_place():
            return original(x, rank, nranks, ring_id, *args)
        return _ConcatColumns.apply(x, dist.get_group(ring_id))

    return c_concat
