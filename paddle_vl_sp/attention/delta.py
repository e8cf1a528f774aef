"""What Gated DeltaNet computes on a whole sequence: the gated delta rule and the causal convolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp.attention.blocks import NO_KEY
from paddle_vl_sp.comm.resident import Resident
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

    >>> q, k, v = (paddle.randn([1, 6, 2, 4]) for _ in range(3))
    >>> g, beta = -paddle.ones([1, 6, 2]), paddle.full([1, 6, 2], 0.5)
    >>> list(gated_delta_rule(q, k, v, g, beta, cu_seqlens=(0, 2, 6)).shape)
    [1, 6, 2, 4]
    """
    bounds = _bounds(q.shape[1], cu_seqlens)
    with paddle.amp.auto_cast(enable=False):
        inputs = delta_inputs(q, k, v, g, beta, scale, normalize)
        segments = [slice(begin, end) for begin, end in pairwise(bounds) if begin < end]
        outs = [delta_rule_of_segment(*(x[:, segment] for x in inputs)) for segment in segments]
        return paddle.concat(outs or [inputs[2]], axis=1).astype(v.dtype)


def delta_inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, normalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All in fp32 with Hv heads; q and k of unit length, q scaled."""
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    heads = v.shape[2]
    q, k, v, g, beta = (x.astype("float32") for x in (q, k, v, g, beta))
    if normalize:
        q, k = (x * paddle.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (paddle.repeat_interleave(x, heads // x.shape[2], axis=2) for x in (q * scale, k))
    return q, k, v, g, beta


def causal_conv(x: Tensor, weight: Tensor, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """Depthwise causal convolution within each segment, then silu: x [B, S, H, D], weight [H, D, K] -> [B, S, H, D].

    out[t] = silu(sum over i of weight[.., K - 1 - i] * x[t - i]), where x is zero before its segment begins. In fp32,
    rounded once to x's dtype.
    """
    length, taps = x.shape[1], weight.shape[-1]
    offset = _offset_in_segment(_bounds(length, cu_seqlens)).on(x.place)  # [S]
    with paddle.amp.auto_cast(enable=False):
        rows, weight = x.astype("float32"), weight.astype("float32")
        total = rows * weight[..., taps - 1]
        for back in range(1, min(taps, length)):
            earlier = paddle.concat([paddle.zeros_like(rows[:, :back]), rows[:, : length - back]], axis=1)
            inside = (offset >= back).astype("float32").reshape([1, length, 1, 1])
            total = total + earlier * inside * weight[..., taps - 1 - back]
        return F.silu(total).astype(x.dtype)


def _bounds(length: int, cu_seqlens: Sequence[int] | None) -> tuple[int, ...]:
    """The segments' boundaries, checked against the length; without cu_seqlens the sequence is one segment."""
    return tuple(SeqLayout(length, cu_seqlens=cu_seqlens).cu_seqlens or (0, length))


@lru_cache(maxsize=16)
def _offset_in_segment(bounds: tuple[int, ...]) -> Resident:
    """int64 [S]: how many positions of its segment come before each.   bounds 0 3 5  ->  0 1 2 0 1"""
    begins = np.repeat(bounds[:-1], np.diff(bounds))
    return Resident(np.arange(bounds[-1], dtype=np.int64) - begins)


class Chunks(NamedTuple):
    """A stretch of positions, chunk by chunk, ready to be scanned from any state: all [B, H, N, C, ..] in fp32."""

    q: Tensor  # [.., Dk] with the decay since the chunk began
    k: Tensor  # [.., Dk] with the decay to the chunk's end
    values: Tensor  # [.., Dv] what is written where the chunk begins with no state
    reads: Tensor  # [.., Dk] what is taken off that for the state that it begins with
    scores: Tensor  # [.., C] of each query with the writes before it
    total: Tensor  # [.., 1] the log of the decay since the chunk began
    length: int  # without the zeros at the end


def delta_rule_of_segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The rule for one segment: all [B, S, H, ..] in fp32 -> [B, S, H, Dv]."""
    chunks = chunked(q, k, v, g, beta)
    batch, heads, _, _, width = chunks.k.shape
    return outputs_from(chunks, v.new_zeros([batch, heads, width, v.shape[-1]]))


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Chunks:
    """Inside a chunk each write depends on those before it: a unit lower triangular system, solved for all chunks at
    once. From chunk to chunk only the state is passed on."""
    length = q.shape[1]
    q, k, v = (_split_into_chunks(x) for x in (q, k, v))  # [B, H, N, C, D]
    g, beta = (_split_into_chunks(x.unsqueeze(-1)) for x in (g, beta))  # [B, H, N, C, 1]
    chunk = q.shape[3]
    total = paddle.cumsum(g, axis=3)  # [B, H, N, C, 1], log of the decay since the chunk began
    later = paddle.triu(g.new_full([chunk, chunk], NO_KEY), diagonal=1)
    decay = paddle.exp(total - total.transpose([0, 1, 2, 4, 3]) + later)  # [B, H, N, C, C], lower triangular
    written = k * beta
    coupling = paddle.tril(paddle.matmul(written, k, transpose_y=True) * decay, -1)
    right = paddle.concat([v * beta, written * paddle.exp(total)], axis=-1)  # [B, H, N, C, Dv + Dk]
    system = coupling + _unit_matrix(coupling, chunk)
    solved = paddle.linalg.triangular_solve(system, right, upper=False, unitriangular=True)
    values, reads = solved.split([v.shape[-1], k.shape[-1]], axis=-1)
    scores = paddle.matmul(q, k, transpose_y=True) * decay
    from_begin, to_end = paddle.exp(total), paddle.exp(total[:, :, :, -1:] - total)
    return Chunks(q * from_begin, k * to_end, values, reads, scores, total, length)


def outputs_from(chunks: Chunks, state: Tensor) -> Tensor:
    """Chunk after chunk from the state [B, H, Dk, Dv] -> [B, S, H, Dv]."""
    outs = []
    for n in range(chunks.q.shape[2]):
        written = chunks.values[:, :, n] - paddle.matmul(chunks.reads[:, :, n], state)
        outs.append(paddle.matmul(chunks.q[:, :, n], state) + paddle.matmul(chunks.scores[:, :, n], written))
        state = _next_state(chunks, n, state, written)
    return paddle.concat(outs, axis=2)[:, :, : chunks.length].transpose([0, 2, 1, 3])


def state_map(chunks: Chunks) -> Tensor:
    """What the chunks make of any state, as a map: state -> map[.., Dv:] @ state + map[.., :Dv]; [B, H, Dk, Dv + Dk].

    Writes are linear in the state, so it is found by a scan from "nothing" (the first Dv columns) and, without writes,
    from the unit matrix (the others).
    """
    batch, heads, _, _, width = chunks.k.shape
    value_width = chunks.values.shape[-1]
    unit = _unit_matrix(chunks.k, width)
    start = paddle.concat([unit.new_zeros([width, value_width]), unit], axis=-1)
    state = start.expand([batch, heads, width, value_width + width])
    for n in range(chunks.k.shape[2]):
        values = F.pad(chunks.values[:, :, n], [0, width])  # [B, H, C, Dv + Dk]
        state = _next_state(chunks, n, state, values - paddle.matmul(chunks.reads[:, :, n], state))
    return state


def _unit_matrix(like: Tensor, size: int) -> Tensor:
    """On like's device, which may not be the default one."""
    return paddle.diag(like.new_full([size], 1.0))


def _next_state(chunks: Chunks, n: int, state: Tensor, written: Tensor) -> Tensor:
    decayed = state * paddle.exp(chunks.total[:, :, n, -1:])
    return decayed + paddle.matmul(chunks.k[:, :, n], written, transpose_x=True)


def _split_into_chunks(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, N, C, D], zeros at the end: a step where k, v, g and beta are zero changes no state."""
    batch, length, heads, width = x.shape
    chunk = min(CHUNK, length)
    missing = -length % chunk
    if missing:
        x = paddle.concat([x, x.new_zeros([batch, missing, heads, width])], axis=1)
    return x.reshape([batch, -1, chunk, heads, width]).transpose([0, 3, 1, 2, 4])
