"""The operations of `reference`, with the same signatures, by the custom operators. `ops` decides when they serve."""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor, _C_ops
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp import reference
from paddle_vl_sp.layout import SeqLayout

MAX_PLACEHOLDERS = 8
MAX_INLINE_INTERVALS = 8
ELEMENT_TYPES = (paddle.float32, paddle.float64, paddle.float16, paddle.bfloat16)  # as in custom_ops/rows.h

_run = _C_ops._run_custom_op  # type: ignore[attr-defined]
joint_order = reference.joint_order
joint_rows = reference.joint_rows


def build_plan(
    tokens: Tensor,  # [B, S]
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2]. Padded, it never waits for a device; else it does, once, for their size."""
    if ids is not None and len(ids) > MAX_PLACEHOLDERS:
        tokens, ids = reference.is_any_of(tokens, ids), None
    table = None if layout.cu_seqlens is None else _interval_table(tokens, layout)
    update, gather, counts = _run(
        "vlsp_plan",
        tokens,
        table,
        [1] if ids is None else list(ids),
        _rule(layout),
        layout.local_len,
        sequence_first,
        num_features,
        padded,
    )
    return update, gather, counts


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] = features[gather], on a copy; -1 is skipped."""
    return _run_rows("vlsp_replace_rows", hidden, features, update, gather)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather], on a copy; -1 is skipped."""
    return _run_rows("vlsp_add_rows", hidden, features, update, gather)


def add_rows_inplace(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather]; -1 is skipped. hidden is contiguous and not a leaf that needs a gradient."""
    if hidden.stop_gradient or not paddle.is_grad_enabled():
        _run("vlsp_add_rows_", hidden, features, update, gather)
    else:
        _AddRowsInplace.apply(hidden, features, update, gather)
    return hidden


class _AddRowsInplace(PyLayer):  # type: ignore[misc]  # a custom operator's own gradient leaves `hidden` the old graph
    @staticmethod
    def forward(ctx: PyLayerContext, hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
        ctx.save_for_backward(update, gather)
        ctx.needs_features = not features.stop_gradient
        ctx.features = (features.shape[0] if ctx.needs_features else 0, _element_type(features))
        _run("vlsp_add_rows_", hidden, features, update, gather)
        return hidden

    @staticmethod
    def backward(ctx: PyLayerContext, out_grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_grad, feature_grad = _run("vlsp_add_rows_back", out_grad, *ctx.saved_tensor(), *ctx.features)
        return hidden_grad, feature_grad if ctx.needs_features else None


def _run_rows(name: str, hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    if paddle.in_dynamic_mode():
        if not paddle.is_grad_enabled():  # which custom operators do not ask
            hidden, features = hidden.detach(), features.detach()
        num_features, like_features = features.shape[0], gather  # the second is not looked at
    else:
        num_features, like_features = -1, features[:, :0]
    (out,) = _run(name, hidden, features, update, gather, like_features, num_features, _element_type(features))
    return out


def _element_type(x: Tensor) -> int:
    return ELEMENT_TYPES.index(x.dtype)


def _rule(layout: SeqLayout) -> list[int]:
    return [
        layout.cp_size,
        layout.cp_rank,
        int(layout.cp_mode == "zigzag"),
        layout.sp_size,
        layout.sp_rank,
        int(layout.remainder == "front"),
    ]


def _interval_table(tokens: Tensor, layout: SeqLayout) -> Tensor:
    """(start, length, local start) of every interval, int64 [K, 3], where the operator wants it."""
    intervals = layout.intervals()
    if not len(intervals):
        intervals = np.zeros((1, 2), dtype=np.int64)  # Paddle would take an empty table for none
    length = intervals[:, 1:]
    table = np.concatenate([intervals, np.cumsum(length, axis=0) - length], axis=1)
    place = paddle.CPUPlace() if len(table) <= MAX_INLINE_INTERVALS else tokens.place
    return paddle.to_tensor(table, place=place)
