"""Attention block by block, in plain Paddle: parts with their log-sum-exp, merged in fp32, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.heads import by_head, by_row, folded, unfolded
from paddle_vl_sp.attention.schedule import Block, tiles

TILE = 256  # rows and columns of scores that are in memory at a time
# The score of a masked key, and the log-sum-exp of no keys. It behaves as -inf does: adding a real score rounds back to
# it, and exp(NO_KEY - score) is 0. -inf itself would end the process under FLAGS_check_nan_inf.
NO_KEY = -1e30


class Part(NamedTuple):
    """Attention over some keys: a softmax average and its log-sum-exp, which has the form of an output of width 1."""

    out: Tensor
    lse: Tensor


class Kernel(Protocol):
    """Attention of this rank's queries with the keys that are here at one step, on tensors in a form of its own.

    Tensors are brought into that form by `load`, once and not for every block.
    """

    name: str

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        """[B, S, heads, D] in the kernel's form."""

    def store(self, x: Tensor) -> Tensor:
        """The inverse."""

    def nothing(self, q: Tensor, width: int) -> Part:
        """Attention of q over no keys: 0 and NO_KEY, fp32."""

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        """What `backward` needs of the output over *all* keys, from it and its gradient."""

    def forward(
        self, so_far: Part | None, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], scale: float
    ) -> Part | None:
        """so_far with these keys too: merged in fp32, and overwritten. None is over no keys."""

    def backward(
        self,
        so_far: Tensor | None,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shared: Tensor,
        lse: Tensor,
        blocks: Iterable[Block],
        scale: float,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """so_far, the gradient of q (None is zeros), with what these keys add to it, and the gradients of k and v. lse
        is that over *all* keys."""


class Blockwise:
    """The kernel in plain Paddle: any device and head size, in fp32, one tile of scores at a time.

    Its form is [B, Hk, G, S, D]: by key head, G query heads each, rows of one head after the other.
    """

    name = "blockwise"

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        return by_head(x, kv_heads)

    def store(self, x: Tensor) -> Tensor:
        return by_row(x)

    def nothing(self, q: Tensor, width: int) -> Part:
        return Part(q.new_zeros([*q.shape[:4], width]), q.new_full([*q.shape[:4], 1], NO_KEY))

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        return (grad * out).sum(-1, keepdim=True)  # [B, Hk, G, S, 1]

    def forward(
        self, so_far: Part | None, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], scale: float
    ) -> Part | None:
        out, lse = so_far or self.nothing(q, v.shape[-1])
        for block in blocks:
            for tile in tiles(block, TILE):
                rows, cols = _slices(tile)
                part = tile_forward(q[rows], k[cols], v[cols], scale, tile.causal)
                is_first = so_far is None and tile.k_start == block.k_start
                out[rows], lse[rows] = part if is_first else merge(out[rows], lse[rows], *part)
        return Part(out, lse)

    def backward(
        self,
        so_far: Tensor | None,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shared: Tensor,
        lse: Tensor,
        blocks: Iterable[Block],
        scale: float,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        grad_q = paddle.zeros_like(q) if so_far is None else so_far
        grad_k, grad_v = paddle.zeros_like(k), paddle.zeros_like(v)
        for block in blocks:
            for tile in tiles(block, TILE):
                rows, cols = _slices(tile)
                parts = tile_backward(
                    grad[rows], q[rows], k[cols], v[cols], shared[rows], lse[rows], scale, tile.causal
                )
                grad_q[rows] += parts[0]
                grad_k[cols] += parts[1]
                grad_v[cols] += parts[2]
        return grad_q, grad_k, grad_v


def tile_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    """The output over these keys and its log-sum-exp."""
    weights = _scores(_folded(q) * scale, k, causal)  # [B, Hk, G * Sq, Sk]
    top = weights.max(-1, keepdim=True)
    total = weights.subtract_(top).exp_().sum(-1, keepdim=True)
    out = paddle.matmul(weights, v.squeeze(2)) / total  # [B, Hk, G * Sq, Dv]
    return Part(_unfolded(out, q), _unfolded(top + paddle.log(total), q))


def tile_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, shared: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradients of q, k, v; lse is that over *all* keys."""
    queries, own_grad = _folded(q) * scale, _folded(grad)
    weights = _scores(queries, k, causal).subtract_(_folded(lse)).exp_()  # [B, Hk, G * Sq, Sk]
    grad_values = paddle.matmul(weights, own_grad, transpose_x=True)
    grad_weights = paddle.matmul(own_grad, v.squeeze(2), transpose_y=True)
    grad_scores = grad_weights.subtract_(_folded(shared)).multiply_(weights)
    grad_queries = paddle.matmul(grad_scores, k.squeeze(2)) * scale
    grad_keys = paddle.matmul(grad_scores, queries, transpose_x=True)
    return _unfolded(grad_queries, q), grad_keys.unsqueeze(2), grad_values.unsqueeze(2)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Part:
    """Joins two softmax averages over different keys, each weighted by the exponential of its log-sum-exp [.., 1].

    In fp32. Where lse is NO_KEY (no keys so far, and out is 0) the result is the part, bit for bit.
    """
    top = paddle.maximum(lse, part_lse)
    part_weight = paddle.exp(part_lse - top)
    total = paddle.exp(lse - top) + part_weight
    joined = paddle.lerp(out.astype("float32"), part.astype("float32"), part_weight / total)
    return Part(joined, top + paddle.log(total))


def _slices(tile: Block) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    before = (slice(None),) * 3
    rows = slice(tile.q_start, tile.q_start + tile.q_len)
    return (*before, rows), (*before, slice(tile.k_start, tile.k_start + tile.k_len))


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
    later = paddle.triu(scores.new_full([cols, cols], NO_KEY), diagonal=1)  # [Sq, Sk]
    return (scores.reshape([batch, -1, cols, cols]) + later).reshape([batch, kv_heads, rows, cols])
