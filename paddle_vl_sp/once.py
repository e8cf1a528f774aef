"""Backwards that have no gradient of their own: they say so, where Paddle would go on without it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import paddle


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
