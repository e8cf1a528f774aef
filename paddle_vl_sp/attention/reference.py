"""Attention computed the slow, obvious way: tests compare the others with it."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.blocks import NO_KEY


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """softmax(q @ k.T * scale + mask) @ v on the whole sequence, all scores at once: [B, S, heads, D] in and out."""
    length, heads = q.shape[1], q.shape[2]
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    k, v = (paddle.repeat_interleave(x, heads // k.shape[2], axis=2) for x in (k, v))
    scores = paddle.einsum("bqhd,bkhd->bhqk", q, k) * scale  # [B, H, S, S]
    mask = visible(length, causal, cu_seqlens)
    weights = paddle.nn.functional.softmax(paddle.where(mask, scores, paddle.full_like(scores, NO_KEY)), axis=-1)
    return paddle.einsum("bhqk,bkhd->bqhd", weights, v)


def visible(length: int, causal: bool, cu_seqlens: Sequence[int] | None) -> Tensor:
    """bool [S, S]: whether the query of a row sees the key of a column."""
    position = paddle.arange(length)
    bounds = paddle.to_tensor(list(cu_seqlens or (0, length))[1:-1] or [length])
    segment = paddle.searchsorted(bounds, position, right=True)
    same = segment.unsqueeze(1) == segment.unsqueeze(0)
    return same & (position.unsqueeze(1) >= position.unsqueeze(0)) if causal else same


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Sequence[int] | None = None
) -> Tensor:
    """The gated delta rule, position by position: q, k [B, S, Hk, Dk], v [B, S, Hv, Dv], g, beta [B, S, Hv]."""
    batch, length, heads, width = v.shape
    q, k = (paddle.repeat_interleave(x, heads // x.shape[2], axis=2) for x in (q, k))
    q, k = (x * paddle.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    empty = paddle.zeros([batch, heads, q.shape[-1], width], v.dtype)
    state, outs = empty, []  # state [B, H, Dk, Dv]
    for t in range(length):
        state = empty if t in (cu_seqlens or (0,)) else state
        state = state * paddle.exp(g[:, t]).reshape([batch, heads, 1, 1])
        missing = v[:, t] - paddle.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + paddle.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * missing)
        outs.append(paddle.einsum("bhk,bhkv->bhv", q[:, t] * q.shape[-1] ** -0.5, state))
    return paddle.stack(outs, axis=1)
