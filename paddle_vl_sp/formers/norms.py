"""q_norm and k_norm: replicated parameters, of which each rank's gradient covers its own heads; upstream sums none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.comm.grads import head_norms, sum_in_backward
from paddle_vl_sp.formers.groups import tensor_parallel_group
from paddle_vl_sp.formers.report import LEFT_ALONE, REPLACED, Line


def text_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has q_norm's and k_norm's gradients summed: by the trainer under sequence parallelism, else in the backward."""

    @functools.wraps(original)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        _have_summed(_head_norms(self), self.config)

    return __init__


def mark_head_norms(model: Layer) -> list[Line]:
    """The same in a model that was built before its class was changed.

    Marks must be there before the trainer wraps the model.
    """
    norms = _head_norms(model)
    name = "q_norm, k_norm"
    if not norms:
        return [Line("model", name, LEFT_ALONE, f"{type(model).__name__} has none of the plain classes'")]
    return [Line("model", name, *_have_summed(norms, getattr(model.config, "text_config", model.config)))]


def _have_summed(norms: list[Any], config: Any) -> tuple[str, str]:
    """State and reason, for the report."""
    if getattr(config, "sequence_parallel", False):
        for norm in norms:
            norm.enable_sequence_parallel()
        return REPLACED, f"{len(norms)} marked, the trainer sums their gradients"
    if (getattr(config, "tensor_model_parallel_size", 1) or 1) < 2:
        return LEFT_ALONE, "no tensor parallelism: a rank has all heads"
    for norm in norms:
        sum_in_backward(norm, tensor_parallel_group)
    return REPLACED, f"{len(norms)} whose gradients are summed in the backward"


def _head_norms(model: Layer) -> list[Any]:
    return [norm for norm in head_norms(model) if hasattr(norm, "enable_sequence_parallel")]
