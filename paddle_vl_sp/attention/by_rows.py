"""Attention with all keys at hand, in plain Paddle: exact softmax for some query rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.base import core

from paddle_vl_sp.attention.blocks import NO_KEY
from paddle_vl_sp.attention.heads import by_head, by_row, folded, unfolded
from paddle_vl_sp.attention.visible import VisibleRows

SCORES = 2**22  # how many are in memory at a time: 16 MiB in fp32, some times over
MOST_ROWS = 256  # with more, most scores of a causal chunk are hidden


class Chunk(NamedTuple):
    """Some query rows and the keys that they see."""

    rows: slice
    keys: slice
    hidden: slice  # the stretch of these keys that not all of the rows see
    mask: npt.NDArray[np.float32] | None  # [rows, hidden], or [B, 1, rows, hidden]: 0 where seen, else NO_KEY


def forward(q: Tensor, k: Tensor, v: Tensor, visible: VisibleRows, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D], k [B, S, Hk, D], v [B, S, Hk, Dv] -> out [B, Sq, Hq, Dv] and lse [B, Hk, G, Sq, 1], fp32.

    A row that sees no key has output 0.
    """
    queries, keys, values = (by_head(x, k.shape[2]) for x in (q, k, v))
    groups = queries.shape[2]
    outs, lses = [queries[:, :, :, :0, :1].expand([-1, -1, -1, -1, v.shape[3]])], [queries[:, :, :, :0, :1]]
    for chunk in _chunks(visible, q):
        scores = _scores(folded(queries, chunk.rows), keys, chunk, scale)  # [B, Hk, G * rows, keys]
        top = scores.max(-1, keepdim=True)
        total = scores.subtract_(top).exp_().sum(-1, keepdim=True)
        part = paddle.matmul(scores, values[:, :, 0, chunk.keys]) / total
        sees = (top > NO_KEY / 2).astype("float32")
        outs.append(unfolded(part * sees, groups))
        lses.append(unfolded((top + paddle.log(total)) * sees - NO_KEY * (1 - sees), groups))  # exp(score - lse) is 0
    return by_row(paddle.concat(outs, axis=3)), paddle.concat(lses, axis=3)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, visible: VisibleRows, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, fp32."""
    queries, keys, values, grad, out = (by_head(x, k.shape[2]) for x in (q, k, v, grad, out))
    groups, shared = queries.shape[2], (grad * out).sum(-1, keepdim=True)  # [B, Hk, G, Sq, 1]
    grad_queries = [queries[:, :, :, :0]]
    grad_keys, grad_values = (paddle.zeros_like(x[:, :, 0]) for x in (keys, values))
    for chunk in _chunks(visible, q):
        own, own_grad = folded(queries, chunk.rows), folded(grad, chunk.rows)
        weights = _scores(own, keys, chunk, scale).subtract_(folded(lse, chunk.rows)).exp_()
        grad_values[:, :, chunk.keys] += paddle.matmul(weights, own_grad, transpose_x=True)
        grad_weights = paddle.matmul(own_grad, values[:, :, 0, chunk.keys], transpose_y=True)
        grad_scores = grad_weights.subtract_(folded(shared, chunk.rows)).multiply_(weights).scale_(scale)
        grad_queries.append(unfolded(paddle.matmul(grad_scores, keys[:, :, 0, chunk.keys]), groups))
        grad_keys[:, :, chunk.keys] += paddle.matmul(grad_scores, own, transpose_x=True)
    return by_row(paddle.concat(grad_queries, axis=3)), *(by_row(x.unsqueeze(2)) for x in (grad_keys, grad_values))


def _scores(queries: Tensor, keys: Tensor, chunk: Chunk, scale: float) -> Tensor:
    """[B, Hk, G * rows, keys]; NO_KEY for keys that a row does not see."""
    scores = paddle.matmul(queries * scale, keys[:, :, 0, chunk.keys], transpose_y=True)
    if chunk.mask is None:
        return scores
    batch, kv_heads, folded_rows, cols = scores.shape
    by_mask = scores.reshape([batch, -1, chunk.mask.shape[-2], cols])  # [B, Hk * G, rows, keys], the same memory
    mask = paddle.to_tensor(chunk.mask, place=queries.place)
    by_mask[..., chunk.hidden] = by_mask[..., chunk.hidden] + mask
    return by_mask.reshape([batch, kv_heads, folded_rows, cols])


def _chunks(visible: VisibleRows, q: Tensor) -> Iterator[Chunk]:
    """All query rows, some at a time; chunks of which no row sees a key see key 0, masked."""
    if q.place.is_gpu_place() and core.is_cuda_graph_capturing():
        raise ValueError(
            f"a CUDA graph is being captured, and gather_attention of {q.dtype}, heads of {q.shape[3]}, has its mask "
            "on the host: use bfloat16 or float16 and heads that flash attention takes, or the ring"
        )
    begin, end = (x.numpy() for x in visible)  # [B or 1, S]
    batch, num_rows, heads, _ = q.shape
    step = min(max(SCORES // max(batch * heads * begin.shape[1], 1), 1), MOST_ROWS)
    for first in range(0, num_rows, step):
        yield _chunk(begin, end, first, min(first + step, num_rows))


def _chunk(begin: npt.NDArray[np.int32], end: npt.NDArray[np.int32], first: int, stop: int) -> Chunk:
    seen = _stretch((begin < stop) & (end > first) & (begin < end))
    seen = seen if seen.start < seen.stop else slice(0, 1)
    begin, end = begin[:, seen], end[:, seen]
    hidden = _stretch((begin > first) | (end < stop))
    if hidden.start == hidden.stop:
        return Chunk(slice(first, stop), seen, hidden, None)
    row = np.arange(first, stop)[:, None]
    sees = (begin[:, None, hidden] <= row) & (row < end[:, None, hidden])  # [B or 1, rows, hidden]
    mask = np.where(sees, np.float32(0), np.float32(NO_KEY))
    return Chunk(slice(first, stop), seen, hidden, mask[0] if len(mask) == 1 else mask[:, None])


def _stretch(which: npt.NDArray[np.bool_]) -> slice:
    """The shortest stretch of columns with every column that is True in some row."""
    columns = np.flatnonzero(which.any(axis=0))
    return slice(int(columns[0]), int(columns[-1]) + 1) if columns.size else slice(0, 0)
