"""Workarounds for Paddle: an error where a PyLayer has no second gradient, 16-bit kernels that the CPU lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayerContext


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the backward of a PyLayer: raises a ValueError under create_graph=True, naming the layer."""
    name = backward.__qualname__.split(".")[0].lstrip("_")

    @functools.wraps(backward)
    def checked(ctx: PyLayerContext, *grads: Tensor) -> Any:
        if paddle.is_grad_enabled():  # in a backward Paddle turns it off unless create_graph is set
            raise ValueError(
                f"{name} has no second gradient: leave create_graph out, or keep it out of what is differentiated twice"
            )
        return backward(ctx, *grads)

    return checked


def via_float32(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """move(x), by way of float32 for float16 on the CPU, which lacks kernels; move only moves elements: same bits."""
    if x.place.is_cpu_place() and x.dtype == paddle.float16:
        return move(x.astype("float32")).astype("float16")
    return move(x)


def concat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """paddle.concat with a gradient; by way of float32 for bfloat16 on the CPU, where there is none: same bits."""
    if tensors[0].place.is_cpu_place() and tensors[0].dtype == paddle.bfloat16:
        return paddle.concat([x.astype("float32") for x in tensors], axis=axis).astype("bfloat16")
    return paddle.concat(list(tensors), axis=axis)


def keep_gradient_contiguous(parameter: Tensor) -> None:
    """For a parameter that is multiplied transposed, whose gradient Paddle leaves strided, [1, V] for [V, H].

    Paddle 3.3.1's fused_allreduce_gradients sums memory, not elements: it permutes such a gradient.
    """
    parameter.register_hook(lambda grad: grad.contiguous())
