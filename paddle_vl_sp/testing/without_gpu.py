"""What Paddle and PaddleFormers' trainer call without asking whether there is a GPU, on ranks without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor


def is_on_cpu() -> bool:
    return str(paddle.get_device()) == "cpu"


def broadcast_input_data_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """The first tensor-parallel rank's batch on all of them, as Paddle's own does on a GPU; the rest stays."""

    def broadcast_input_data(hcg: Any, *inputs: Any, **named: Any) -> Any:
        if not is_on_cpu():
            return original(hcg, *inputs, **named)
        group, source = hcg.get_model_parallel_group(), hcg.get_model_parallel_group_src_rank()
        if group.nranks == 1:
            return inputs, named
        return _of_rank((inputs, named), source, group)

    return broadcast_input_data


def _of_rank(value: Any, source: int, group: Any) -> Any:
    """Its tensors, whose dtypes and numbers of axes are the same on all ranks; what is no tensor stays this rank's."""
    if isinstance(value, dict):
        return {key: _of_rank(each, source, group) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_of_rank(each, source, group) for each in value])
    if not isinstance(value, Tensor):
        return value
    shape = paddle.to_tensor([0, *value.shape], dtype="int64")  # the 0: gloo cannot send an empty array
    dist.broadcast(shape, src=source, group=group)
    there = shape.tolist()[1:]
    result = value.detach() if dist.get_rank() == source else paddle.empty(there, value.dtype)
    if result.size:
        dist.broadcast(result, src=source, group=group)
    return result


def synchronize_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """Does nothing where the CPU is in use, whose kernels end before they return."""

    def synchronize(device: Any = None) -> None:
        if not (device is None and is_on_cpu()):
            original(device)

    return synchronize


def cuda_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """The tensor itself where the CPU is in use."""

    def cuda(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return self if is_on_cpu() else original(self, *args, **options)

    return cuda
