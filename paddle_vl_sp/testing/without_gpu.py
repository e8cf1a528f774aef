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
    """Overwrites every rank's batch with that of the first tensor-parallel rank, as Paddle's own does on a GPU."""

    def broadcast_input_data(hcg: Any, *inputs: Any, **named: Any) -> Any:
        if not is_on_cpu():
            return original(hcg, *inputs, **named)
        group, source = hcg.get_model_parallel_group(), hcg.get_model_parallel_group_src_rank()
        if group.nranks > 1:
            _overwrite((inputs, named), source, group)
        return inputs, named

    return broadcast_input_data


def _overwrite(value: Any, source: int, group: Any) -> None:
    """Its tensors, in place: fleet's wrapper calls the model with what it had. The rest stays this rank's, as there."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            _overwrite(each, source, group)
    elif isinstance(value, Tensor):
        _overwrite_tensor(value.detach(), value, source, group)


def _overwrite_tensor(own: Tensor, target: Tensor, source: int, group: Any) -> None:
    """The ranks' tensors have one dtype and one number of axes."""
    shape = paddle.to_tensor([0, *own.shape], dtype="int64")  # the 0: gloo cannot send an empty array
    dist.broadcast(shape, src=source, group=group)
    is_source, there = dist.get_rank() == source, shape.tolist()[1:]
    received = own if is_source else paddle.empty(there, own.dtype)
    if received.size:
        dist.broadcast(received, src=source, group=group)
    if not is_source:
        received._share_underline_tensor_to(target)  # memory and shape


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
