"""PaddleFormers' attention functions: the one that a cut asks for where there is a cut, else the original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers.context.marker import cut_in

INDICES = "attn_mask_startend_row_indices"


def crossing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Attends across the ranks that share the sequence."""

    @functools.wraps(original)
    def attend(module: Layer, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        cut = cut_in(kwargs.get(INDICES), module)
        if cut is None:
            return original(module, query, key, value, *args, **kwargs)
        _refuse(kwargs)
        q, k, v = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))  # [B, S_local, heads, D]
        scale = kwargs.get("scaling")
        out = cut.chosen.attend(q, k, v, layout=cut.layout, scale=scale, boundaries=cut.bounds)
        return out.flatten(2), None

    return attend


def core_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Attends across the ranks that share the sequence."""

    @functools.wraps(original)
    def forward(self: Layer, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        cut = cut_in(kwargs.get(INDICES, args[1] if len(args) > 1 else None), self)
        if cut is None:
            return original(self, query, key, value, *args, **kwargs)
        scale = self.softmax_scale
        out = cut.chosen.attend(query, key, value, layout=cut.layout, scale=scale, boundaries=cut.bounds)
        return out.flatten(2)

    return forward


def _refuse(given: dict[str, Any]) -> None:
    """What no attention of ours does, and a model must not go without."""
    for name, value in (("dropout", given.get("dropout")), ("sink", given.get("sink"))):
        if value is not None and not (isinstance(value, (int, float)) and value == 0):
            raise ValueError(f"context parallelism takes no attention {name}, got {value}: turn it off")
