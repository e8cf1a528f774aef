"""float16 on the CPU, where Paddle lacks kernels."""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle import Tensor


def moved(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """move(x), where move only takes elements; by way of fp32 where the CPU cannot take float16: the same bits."""
    if x.place.is_cpu_place() and x.dtype == paddle.float16:
        return move(x.astype("float32")).astype("float16")
    return move(x)
