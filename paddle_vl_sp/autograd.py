"""What PyLayer and the CPU lack: an error for second gradients, float16."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle
from paddle import Tensor


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a PyLayer: raises where a graph of it is asked for, by create_graph=True."""
    name = backward.__qualname__.split(".")[0].lstrip("_")

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if paddle.is_grad_enabled():  # which Paddle's engine turns off unless create_graph is set
            raise ValueError(
                f"{name} has no second gradient: leave create_graph out, or keep it out of what is differentiated twice"
            )
        return backward(ctx, *grads)

    return checked


def via_float32(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """move(x), where move only moves elements; through float32 where the CPU has no float16 kernel: the same bits."""
    if x.place.is_cpu_place() and x.dtype == paddle.float16:
        return move(x.astype("float32")).astype("float16")
    return move(x)
