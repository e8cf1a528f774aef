"""Attention block by block, in plain Paddle: parts with their log-sum-exp, merged in fp32, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.heads import by_head, by_row, folded, unfolded
from paddle_vl_sp.attention.schedule import Block, tiles

TILE = 256  # rows and columns of scores that are in memory at a time
# The score of a masked key, and the log-sum-exp of no keys. It behaves as -inf does: adding a real score rounds back to
# it, and exp(NO_KEY - score) is 0. -inf itself would end the process under FLAGS_check_nan_inf.
NO_KEY = -1e30


class Kernel(Protocol):
    """Attention of some query rows with some key rows, on tensors in a form of the kernel's own.

    Tensors are brought into that form by `load`, once and not for every block. A log-sum-exp has the form of an output
    of width 1. Rows are along `axis`.
    """

    name: str
    axis: int

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        """[B, S, heads, D] in the kernel's form."""

    def store(self, x: Tensor) -> Tensor:
        """The inverse."""

    def zeros(self, rows: Tensor, width: int, value: float = 0.0) -> Tensor:
        """fp32, for the rows and heads of `rows`, which is in the kernel's form."""

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        """What `backward` needs of the output over *all* keys, from it and its gradient; rows along `axis`."""

    def pieces(self, block: Block) -> Iterable[Block]:
        """The block in the sizes that `forward` and `backward` are called with."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """The output over these keys and its log-sum-exp, fp32."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shared: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What these keys add to the gradients of q, k, v; lse is that over *all* keys."""


class Blockwise:
    """The kernel in plain Paddle: any device and head size, in fp32, one tile of scores at a time.

    Its form is [B, Hk, G, S, D]: by key head, G query heads each, rows of one head after the other.
    """

    name = "blockwise"
    axis = 3

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        return by_head(x, kv_heads)

    def store(self, x: Tensor) -> Tensor:
        return by_row(x)

    def zeros(self, rows: Tensor, width: int, value: float = 0.0) -> Tensor:
        return paddle.full([*rows.shape[:4], width], value, "float32")

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        return (grad * out).sum(-1, keepdim=True)  # [B, Hk, G, S, 1]

    def pieces(self, block: Block) -> Iterable[Block]:
        return tiles(block, TILE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        weights = _scores(_folded(q) * scale, k, causal)  # [B, Hk, G * Sq, Sk]
        top = weights.max(-1, keepdim=True)
        total = weights.subtract_(top).exp_().sum(-1, keepdim=True)
        out = paddle.matmul(weights, v.squeeze(2)) / total  # [B, Hk, G * Sq, Dv]
        return _unfolded(out, q), _unfolded(top + paddle.log(total), q)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shared: Tensor, lse: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, own_grad = _folded(q) * scale, _folded(grad)
        weights = _scores(queries, k, causal).subtract_(_folded(lse)).exp_()  # [B, Hk, G * Sq, Sk]
        grad_values = paddle.matmul(weights, own_grad, transpose_x=True)
        grad_weights = paddle.matmul(own_grad, v.squeeze(2), transpose_y=True)
        grad_scores = grad_weights.subtract_(_folded(shared)).multiply_(weights)
        grad_queries = paddle.matmul(grad_scores, k.squeeze(2)) * scale
        grad_keys = paddle.matmul(grad_scores, queries, transpose_x=True)
        return _unfolded(grad_queries, q), grad_keys.unsqueeze(2), grad_values.unsqueeze(2)


def attend(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], kernel: Kernel, scale: float
) -> None:
    """Merges the blocks into out and lse, fp32; lse is NO_KEY where no key was seen. All in the kernel's form."""
    for block in blocks:
        for piece in kernel.pieces(block):
            rows, cols = _slices(piece, kernel.axis)
            part, part_lse = kernel.forward(q[rows], k[cols], v[cols], scale, piece.causal)
            out[rows], lse[rows] = merge(out[rows], lse[rows], part, part_lse)


def attend_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shared: Tensor,
    lse: Tensor,
    blocks: Iterable[Block],
    kernel: Kernel,
    scale: float,
) -> None:
    """Adds what the blocks contribute to grads: the gradients of q, k and v, fp32. All in the kernel's form."""
    grad_q, grad_k, grad_v = grads
    for block in blocks:
        for piece in kernel.pieces(block):
            rows, cols = _slices(piece, kernel.axis)
            part_q, part_k, part_v = kernel.backward(
                grad[rows], q[rows], k[cols], v[cols], shared[rows], lse[rows], scale, piece.causal
            )
            grad_q[rows] += part_q
            grad_k[cols] += part_k
            grad_v[cols] += part_v


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two softmax averages over different keys, each weighted by the exponential of its log-sum-exp [.., 1].

    Where lse is NO_KEY (no keys so far) the result is the part, bit for bit.
    """
    top = paddle.maximum(lse, part_lse)
    weight, part_weight = paddle.exp(lse - top), paddle.exp(part_lse - top)
    total = weight + part_weight
    return out * (weight / total) + part * (part_weight / total), top + paddle.log(total)


def _slices(piece: Block, axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    rows = slice(piece.q_start, piece.q_start + piece.q_len)
    before = (slice(None),) * axis
    return (*before, rows), (*before, slice(piece.k_start, piece.k_start + piece.k_len))


def _folded(x: Tensor) -> Tensor:
    """[B, Hk, G, S, D] -> [B, Hk, G * S, D]"""
    return folded(x, slice(None))


def _unfolded(x: Tensor, q: Tensor) -> Tensor:
    """[B, Hk, G * S, D] -> [B, Hk, G, S, D]"""
    return unfolded(x, q.shape[2])


def _scores(queries: Tensor, k: Tensor, causal: bool) -> Tensor:
    """[B, Hk, G * Sq, Sk]; where causal (a square block), NO_KEY for keys after their query."""
    scores = paddle.matmul(queries, k.squeeze(2), transpose_y=True)
    if not causal:
        return scores
    batch, kv_heads, rows, cols = scores.shape
    later = paddle.triu(paddle.full([cols, cols], NO_KEY, "float32"), diagonal=1)  # [Sq, Sk]
    return (scores.reshape([batch, -1, cols, cols]) + later).reshape([batch, kv_heads, rows, cols])
