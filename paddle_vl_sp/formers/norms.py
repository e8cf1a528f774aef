"""q_norm and k_norm of the plain classes: replicated parameters whose gradients upstream does not sum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.formers.report import LEFT_ALONE, REPLACED, Line

NAMES = ("q_norm", "k_norm")


def text_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Marks q_norm and k_norm under sequence parallelism, so that the trainer sums their gradients."""

    @functools.wraps(original)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if self.config.sequence_parallel:
            for norm in _head_norms(self):
                norm.enable_sequence_parallel()

    return __init__


def mark_head_norms(model: Layer) -> list[Line]:
    """Marks them in a model that was built before its class was changed, so that PaddleFormers' trainer sums them.

    Every rank's gradient covers its own heads only. The marks must be there before the trainer wraps the model.
    """
    norms = _head_norms(model)
    if not norms:
        return [Line("model", "q_norm, k_norm", LEFT_ALONE, f"{type(model).__name__} has none of the plain classes'")]
    text_config = getattr(model.config, "text_config", model.config)
    if not getattr(text_config, "sequence_parallel", False):
        return [
            Line("model", "q_norm, k_norm", LEFT_ALONE, "sequence_parallel is off: no trainer sums marked gradients")
        ]
    for norm in norms:
        norm.enable_sequence_parallel()
    return [Line("model", "q_norm, k_norm", REPLACED, f"{len(norms)} marked, the trainer sums their gradients")]


def _head_norms(model: Layer) -> list[Any]:
    return [
        layer
        for name, layer in model.named_sublayers()
        if name.rpartition(".")[2] in NAMES and hasattr(layer, "enable_sequence_parallel")
    ]
