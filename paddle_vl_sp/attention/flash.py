"""The kernel on Paddle's flash attention: fp16 or bf16 on a GPU, all blocks of a step in one varlen call."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.attention.blocks import NO_KEY, Part, merge
from paddle_vl_sp.attention.schedule import Block
from paddle_vl_sp.attention.spans import Rows, Span, spans
from paddle_vl_sp.comm.gather import take_rows


class Flash:
    """paddle._C_ops.flash_attn_unpadded and its gradient operator. Its form is [B, S, heads, D], as it comes.

    The gradient operator takes the output and log-sum-exp as arguments, so it can be given those over the keys of all
    steps. The operator's log-sum-exp is [heads, rows], or [segments, heads, longest], which the forward finds out.
    """

    name = "flash"

    def __init__(self) -> None:
        self._has_padded_lse = False

    def load(self, x: Tensor, kv_heads: int) -> Tensor:
        return x

    def store(self, x: Tensor) -> Tensor:
        return x

    def nothing(self, q: Tensor, width: int) -> Part:
        shape = q.shape[:3]
        out, lse = q.new_zeros([*shape, width], dtype="float32"), q.new_full([*shape, 1], NO_KEY, dtype="float32")
        return Part(out, lse)

    def shared(self, grad: Tensor, out: Tensor) -> Tensor:
        return out

    def forward(
        self, so_far: Part | None, q: Tensor, k: Tensor, v: Tensor, blocks: Iterable[Block], scale: float
    ) -> Part | None:
        for span in spans(tuple(blocks), q.shape[0], q.shape[1], k.shape[1]):
            so_far = _joined(so_far, self._call(span, q, k, v, scale), span.queries)
        return so_far

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
        grad_q, grad_k, grad_v = so_far, None, None
        for span in spans(tuple(blocks), q.shape[0], q.shape[1], k.shape[1]):
            part_q, part_k, part_v = self._call_gradient(span, grad, q, k, v, shared, lse, scale)
            grad_q = _added(grad_q, part_q, span.queries)
            grad_k = _added(grad_k, part_k, span.keys)
            grad_v = _added(grad_v, part_v, span.keys)
        if grad_k is None or grad_v is None:
            return grad_q, *(x.new_zeros(x.shape, dtype="float32") for x in (k, v))
        return grad_q, grad_k, grad_v

    def _call(self, span: Span, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
        """The output [rows, heads, D] in q's dtype and its log-sum-exp [rows, heads, 1], of the span's queries."""
        q, k, v = span.queries.take(q), span.keys.take(k), span.keys.take(v)
        # The operator returns no log-sum-exp. All its results are written into the tensors of out=, of any shape.
        results = tuple(q.new_empty([0], dtype=kind) for kind in (q.dtype, q.dtype, "float32", "int64"))
        paddle._C_ops.flash_attn_unpadded(
            q, k, v, *_segments(span, q), None, None, span.longest_q, span.longest_k,
            scale, 0.0, span.causal, False, True, "", out=results,
        )  # fmt: skip
        out, _, lse, _ = results
        self._has_padded_lse = _check_lse(lse, span, q)
        return Part(out, _by_row(lse, span))

    def _call_gradient(
        self, span: Span, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the span's keys add to the gradients of its queries and keys, [rows, heads, D] in q's dtype."""
        grad, out = grad.astype(q.dtype), out.astype(q.dtype)
        q, grad, out, lse = (span.queries.take(x) for x in (q, grad, out, lse))
        k, v = span.keys.take(k), span.keys.take(v)
        lse = _padded_by_head(lse, span) if self._has_padded_lse else lse.squeeze(-1).transpose([1, 0]).contiguous()
        grads: tuple[Tensor, Tensor, Tensor] = paddle._C_ops.flash_attn_unpadded_grad(
            q, k, v, *_segments(span, q), out, lse, _no_seed(), None, grad, span.longest_q, span.longest_k,
            scale, 0.0, span.causal,
        )  # fmt: skip
        return grads


def _segments(span: Span, q: Tensor) -> tuple[Tensor, Tensor]:
    return span.bounds_q.on(q.place), span.bounds_k.on(q.place)


@cache
def _no_seed() -> Tensor:
    """Seed and offset of dropout, which is off; the gradient operator reads them on the host."""
    return paddle.to_tensor(np.zeros(2, dtype=np.int64), place=paddle.CPUPlace())


def _check_lse(lse: Tensor, span: Span, q: Tensor) -> bool:
    """Whether it is padded, if it is of one of the two forms."""
    rows, heads, _ = q.shape
    flat, padded = [heads, rows], [span.bounds_q.array.size - 1, heads, span.longest_q]
    if list(lse.shape) not in (flat, padded):
        raise ValueError(
            f"flash_attn_unpadded of Paddle {paddle.version.full_version} gave a log-sum-exp of {list(lse.shape)}, "
            f"expected {flat} or {padded}: use Paddle 3.3, or float32 q, k and v, which plain Paddle computes"
        )
    return list(lse.shape) != flat


def _by_row(lse: Tensor, span: Span) -> Tensor:
    """[heads, rows] or [segments, heads, longest] -> [rows, heads, 1]"""
    if lse.ndim == 2:
        return lse.transpose([1, 0]).unsqueeze(-1)
    return take_rows(lse.transpose([0, 2, 1]).flatten(0, 1), span.padded[0]).unsqueeze(-1)


def _padded_by_head(lse: Tensor, span: Span) -> Tensor:
    """[rows, heads, 1] -> [segments, heads, longest], 0 where a segment is shorter"""
    lse = lse.squeeze(-1)
    padded = take_rows(paddle.concat([lse, paddle.zeros_like(lse[:1])]), span.padded[1])
    return padded.reshape([-1, span.longest_q, lse.shape[1]]).transpose([0, 2, 1]).contiguous()


def _joined(so_far: Part | None, part: Part, rows: Rows) -> Part:
    """so_far [B, S, ..] with the part [rows, ..]; nothing is merged where nothing is there yet."""
    at = rows.stretch
    if so_far is None or rows.are_all or at is None:
        whole = Part(rows.put(part.out), rows.put(part.lse, NO_KEY))
        return whole if so_far is None else Part(*merge(*so_far, *whole))
    out, lse = so_far.out.astype("float32"), so_far.lse
    out[:, at], lse[:, at] = merge(out[:, at], lse[:, at], part.out.unsqueeze(0), part.lse.unsqueeze(0))
    return Part(out, lse)


def _added(total: Tensor | None, part: Tensor, rows: Rows) -> Tensor:
    """total [B, S, ..] with the part [rows, ..], in fp32 where there are two; the first stays as it came."""
    if total is None:
        return rows.put(part)
    total, at = total.astype("float32"), rows.stretch
    if rows.are_all or at is None:
        return total + rows.put(part).astype("float32")
    total[:, at] = total[:, at] + part.unsqueeze(0).astype("float32")
    return total
