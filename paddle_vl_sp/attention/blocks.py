"""Attention block by block, in plain Paddle: parts with their log-sum-exp, merged in fp32, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.schedule import Block, tiles

TILE = 256  # rows and columns of scores that are in memory at a time
# The score of a masked key, and the log-sum-exp of no keys. It behaves as -inf does: adding a real score rounds back to
# it, and exp(NO_KEY - score) is 0. -inf itself would end the process under FLAGS_check_nan_inf.
NO_KEY = -1e30


class Kernel(Protocol):
    """Attention of some query rows with some key rows: q [B, Sq, Hq, D], k [B, Sk, Hk, D], v [B, Sk, Hk, Dv]."""

    name: str

    def pieces(self, block: Block) -> Iterable[Block]:
        """The block in the sizes that `forward` and `backward` are called with."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """The output over these keys [B, Sq, Hq, Dv] and its log-sum-exp [B, Sq, Hq], fp32."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What these keys add to the gradients of q, k, v; out and lse are those over *all* keys."""


class Blockwise:
    """The kernel in plain Paddle: any device and head size, in fp32, one tile of scores at a time."""

    name = "blockwise"

    def pieces(self, block: Block) -> Iterable[Block]:
        return tiles(block, TILE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        kv_heads = k.shape[2]
        keys, values = _by_head(k, kv_heads), _by_head(v, kv_heads)
        scores = _scores(_by_head(q, kv_heads), keys, q.shape[1], scale, causal)
        lse = paddle.logsumexp(scores, axis=-1, keepdim=True)  # [B, Hk, G * Sq, 1]
        out = paddle.matmul(paddle.exp(scores - lse), values)  # [B, Hk, G * Sq, Dv]
        return _by_row(out, q.shape[1]), _by_row(lse, q.shape[1]).squeeze(-1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, kv_heads = q.shape[1], k.shape[2]
        queries, keys, values = (_by_head(x, kv_heads) for x in (q, k, v))
        grad, out, lse = (_by_head(x, kv_heads) for x in (grad, out, lse.unsqueeze(-1)))
        weights = paddle.exp(_scores(queries, keys, num_rows, scale, causal) - lse)  # [B, Hk, G * Sq, Sk]
        grad_values = paddle.matmul(weights, grad, transpose_x=True)
        grad_weights = paddle.matmul(grad, values, transpose_y=True)
        grad_scores = weights * (grad_weights - (grad * out).sum(-1, keepdim=True)) * scale
        grad_queries = paddle.matmul(grad_scores, keys)
        grad_keys = paddle.matmul(grad_scores, queries, transpose_x=True)
        return _by_row(grad_queries, num_rows), _by_row(grad_keys, k.shape[1]), _by_row(grad_values, k.shape[1])


def attend(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], kernel: Kernel, scale: float
) -> None:
    """Merges the blocks into out [B, Sq, Hq, Dv] and lse [B, Sq, Hq], fp32; lse is NO_KEY where no key was seen."""
    for block in blocks:
        for piece in kernel.pieces(block):
            rows, cols = _slices(piece)
            part, part_lse = kernel.forward(q[:, rows], k[:, cols], v[:, cols], scale, piece.causal)
            out[:, rows], lse[:, rows] = merge(out[:, rows], lse[:, rows], part, part_lse)


def attend_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Iterable[Block],
    kernel: Kernel,
    scale: float,
) -> None:
    """Adds what the blocks contribute to grads: the gradients of q, k and v, all fp32."""
    grad_q, grad_k, grad_v = grads
    for block in blocks:
        for piece in kernel.pieces(block):
            rows, cols = _slices(piece)
            part_q, part_k, part_v = kernel.backward(
                grad[:, rows], q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse[:, rows], scale, piece.causal
            )
            grad_q[:, rows] += part_q
            grad_k[:, cols] += part_k
            grad_v[:, cols] += part_v


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two softmax averages over different keys, each weighted by the exponential of its log-sum-exp.

    Where lse is NO_KEY (no keys so far) the result is the part, bit for bit.
    """
    top = paddle.maximum(lse, part_lse)
    weight, part_weight = paddle.exp(lse - top), paddle.exp(part_lse - top)
    total = weight + part_weight
    merged = out * (weight / total).unsqueeze(-1) + part * (part_weight / total).unsqueeze(-1)
    return merged, top + paddle.log(total)


def _slices(piece: Block) -> tuple[slice, slice]:
    rows = slice(piece.q_start, piece.q_start + piece.q_len)
    return rows, slice(piece.k_start, piece.k_start + piece.k_len)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[B, S, G * Hk, D] -> [B, Hk, G * S, D] in fp32: the G query heads of one key head, one after the other."""
    batch, rows, heads, width = x.shape
    groups = heads // kv_heads
    x = x.astype("float32").reshape([batch, rows, kv_heads, groups, width])
    return x.transpose([0, 2, 3, 1, 4]).reshape([batch, kv_heads, groups * rows, width])


def _by_row(x: Tensor, rows: int) -> Tensor:
    """[B, Hk, G * S, D] -> [B, S, G * Hk, D]"""
    batch, kv_heads, folded, width = x.shape
    groups = folded // rows
    x = x.reshape([batch, kv_heads, groups, rows, width]).transpose([0, 3, 1, 2, 4])
    return x.reshape([batch, rows, kv_heads * groups, width])


def _scores(queries: Tensor, keys: Tensor, rows: int, scale: float, causal: bool) -> Tensor:
    """[B, Hk, G * Sq, Sk]; where causal (a square block), NO_KEY for keys after their query."""
    scores = paddle.matmul(queries, keys, transpose_y=True) * scale
    if not causal:
        return scores
    later = paddle.triu(paddle.full([rows, rows], NO_KEY, "float32"), diagonal=1)  # [Sq, Sk]
    batch, kv_heads, folded, cols = scores.shape
    return (scores.reshape([batch, kv_heads, -1, rows, cols]) + later).reshape([batch, kv_heads, folded, cols])
