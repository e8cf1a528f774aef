"""What Gated DeltaNet computes on a whole sequence: the gated delta rule and the causal convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp.attention.blocks import NO_KEY
from paddle_vl_sp.layout import SeqLayout

CHUNK = 64  # positions that the delta rule computes at once


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    scale: float | None = None,
    normalize: bool = True,
) -> Tensor:
    """The gated delta rule in plain Paddle, chunk by chunk, with gradients: -> [B, S, Hv, Dv].

    q, k       [B, S, Hk, Dk], v [B, S, Hv, Dv], where Hk divides Hv
    g          [B, S, Hv], the log of the decay: not positive
    beta       [B, S, Hv], the strength of the write
    normalize  first scale each q and k to unit length

    Equivalent, in each segment, to

        state = exp(g[t]) * state                                  # [Dk, Dv], zero where a segment begins
        state += outer(k[t], beta[t] * (v[t] - k[t] @ state))
        out[t] = scale * q[t] @ state                              # scale = 1 / sqrt(Dk) unless given
    """
    bounds = _bounds(q.shape[1], cu_seqlens)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    dtype, heads = v.dtype, v.shape[2]
    with paddle.amp.auto_cast(enable=False):
        q, k, v, g, beta = (x.astype("float32") for x in (q, k, v, g, beta))
        if normalize:
            q, k = (x * paddle.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (paddle.repeat_interleave(x, heads // x.shape[2], axis=2) for x in (q * scale, k))
        segments = [slice(begin, end) for begin, end in pairwise(bounds) if begin < end]
        outs = [_delta_rule_of_segment(*(x[:, segment] for x in (q, k, v, g, beta))) for segment in segments]
        return paddle.concat(outs or [v], axis=1).astype(dtype)


def causal_conv(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """Depthwise causal convolution within each segment, then silu: x [B, S, H, D], weight [H, D, K] -> [B, S, H, D].

    out[t] = silu(sum over i of weight[.., K - 1 - i] * x[t - i]), where x is zero before its segment begins.
    """
    length, taps = x.shape[1], weight.shape[-1]
    offset = paddle.to_tensor(_offset_in_segment(length, cu_seqlens), place=x.place)  # [S]
    total = x * weight[..., taps - 1]
    for back in range(1, min(taps, length)):
        earlier = paddle.concat([paddle.zeros_like(x[:, :back]), x[:, : length - back]], axis=1)
        inside = (offset >= back).astype(x.dtype).reshape([1, length, 1, 1])
        total = total + earlier * inside * weight[..., taps - 1 - back]
    return F.silu(total)


def _bounds(length: int, cu_seqlens: Sequence[int] | None) -> Sequence[int]:
    """The segments' boundaries, checked against the length; without cu_seqlens the sequence is one segment."""
    return SeqLayout(length, cu_seqlens=cu_seqlens).cu_seqlens or (0, length)


def _offset_in_segment(length: int, cu_seqlens: Sequence[int] | None) -> npt.NDArray[np.int64]:
    """int64 [S]: how many positions of its segment come before each.   cu_seqlens 0 3 5  ->  0 1 2 0 1"""
    bounds = np.asarray(_bounds(length, cu_seqlens), dtype=np.int64)
    return np.arange(length, dtype=np.int64) - np.repeat(bounds[:-1], np.diff(bounds))


def _delta_rule_of_segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The rule for one segment: all [B, S, H, ..] in fp32 -> [B, S, H, Dv].

    Inside a chunk each write depends on those before it: a unit lower triangular system, solved for all chunks at
    once. From chunk to chunk only the state is passed on.
    """
    length = q.shape[1]
    q, k, v = (_split_into_chunks(x) for x in (q, k, v))  # [B, H, N, C, D]
    g, beta = (_split_into_chunks(x.unsqueeze(-1)) for x in (g, beta))  # [B, H, N, C, 1]
    chunk = q.shape[3]
    total = paddle.cumsum(g, axis=3)  # [B, H, N, C, 1], log of the decay since the chunk began
    later = paddle.triu(paddle.full([chunk, chunk], NO_KEY, "float32"), diagonal=1)
    decay = paddle.exp(total - total.transpose([0, 1, 2, 4, 3]) + later)  # [B, H, N, C, C], lower triangular
    written = k * beta
    coupling = paddle.tril(paddle.matmul(written, k, transpose_y=True) * decay, -1)
    right = paddle.concat([v * beta, written * paddle.exp(total)], axis=-1)  # [B, H, N, C, Dv + Dk]
    system = coupling + paddle.eye(chunk, dtype="float32")
    solved = paddle.linalg.triangular_solve(system, right, upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], axis=-1)
    scores = paddle.matmul(q, k, transpose_y=True) * decay
    from_begin, to_end = paddle.exp(total), paddle.exp(total[:, :, :, -1:] - total)
    outs = _scan_chunks(q * from_begin, k * to_end, values, reads, scores, total)
    out = paddle.concat(outs, axis=2)[:, :, :length]  # [B, H, S, Dv]
    return out.transpose([0, 2, 1, 3])


def _scan_chunks(q: Tensor, k: Tensor, values: Tensor, reads: Tensor, scores: Tensor, total: Tensor) -> list[Tensor]:
    """Chunk after chunk, passing on the state [B, H, Dk, Dv]: N outputs [B, H, C, Dv]."""
    batch, heads, chunks, _, width = q.shape
    state = paddle.zeros([batch, heads, width, values.shape[-1]], "float32")
    outs = []
    for n in range(chunks):
        written = values[:, :, n] - paddle.matmul(reads[:, :, n], state)
        outs.append(paddle.matmul(q[:, :, n], state) + paddle.matmul(scores[:, :, n], written))
        state = state * paddle.exp(total[:, :, n, -1:]) + paddle.matmul(k[:, :, n], written, transpose_x=True)
    return outs


def _split_into_chunks(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, N, C, D], zeros at the end: a step where k, v, g and beta are zero changes no state."""
    batch, length, heads, width = x.shape
    chunk = min(CHUNK, length)
    missing = -length % chunk
    if missing:
        x = paddle.concat([x, paddle.zeros([batch, missing, heads, width], "float32")], axis=1)
    return x.reshape([batch, -1, chunk, heads, width]).transpose([0, 3, 1, 2, 4])
