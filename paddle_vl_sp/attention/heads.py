"""Tensors by head: what plain Paddle multiplies, where several query heads share a key head."""

from __future__ import annotations

from paddle import Tensor


def by_head(x: Tensor, kv_heads: int) -> Tensor:
    """[B, S, G * Hk, D] -> [B, Hk, G, S, D] in fp32: the G query heads of each key head; G is 1 for keys and values."""
    batch, rows, heads, width = x.shape
    x = x.astype("float32").reshape([batch, rows, kv_heads, heads // kv_heads, width])
    return x.transpose([0, 2, 3, 1, 4]).contiguous()


def by_row(x: Tensor) -> Tensor:
    """[B, Hk, G, S, D] -> [B, S, G * Hk, D]: the inverse."""
    batch, kv_heads, groups, rows, width = x.shape
    return x.transpose([0, 3, 1, 2, 4]).reshape([batch, rows, kv_heads * groups, width])


def folded(x: Tensor, rows: slice) -> Tensor:
    """Some rows of [B, Hk, G, S, D], the heads that share a key head one after the other: [B, Hk, G * rows, D]"""
    part = x[:, :, :, rows]
    batch, kv_heads, groups, length, width = part.shape
    return part.reshape([batch, kv_heads, groups * length, width])


def unfolded(x: Tensor, groups: int) -> Tensor:
    """[B, Hk, G * rows, D] -> [B, Hk, G, rows, D]"""
    batch, kv_heads, rows, width = x.shape
    return x.reshape([batch, kv_heads, groups, rows // groups, width])
