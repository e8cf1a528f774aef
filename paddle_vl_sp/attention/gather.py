"""Attention over gathered keys and values: queries stay, every rank has the keys of the whole sequence for a moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.attention import by_rows, flashmask
from paddle_vl_sp.attention.groups import group_or_alone
from paddle_vl_sp.attention.kernels import check_backward
from paddle_vl_sp.attention.ring import check_heads, check_one_row
from paddle_vl_sp.attention.shares import check_share, shares_of_group
from paddle_vl_sp.attention.visible import Boundaries, VisibleRows, row_bounds, visible_by_indices, visible_rows
from paddle_vl_sp.autograd import differentiable_once
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.gather import collect_rows, sum_rows
from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.gathered import rows_in_order


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SeqLayout,
    group: Group | None,
    causal: bool = True,
    scale: float | None = None,
    boundaries: Boundaries | None = None,
    startend_row_indices: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries with the keys of the whole sequence: [B, S_local, heads, D] in and out.

    q            [B, S_local, Hq, D]; k [B, S_local, Hk, D] and v [B, S_local, Hk, Dv], where Hk divides Hq
    layout       any cut
    group        all ranks of the layout, in the order of cp_rank * sp_size + sp_rank; or its cp ranks, where the sp cut
                 is undone before. None is one process that holds the whole sequence
    boundaries   of packed segments, in the whole sequence: one list for all rows of the batch, or one for each. What
                 follows the last is a segment by itself: padding. None: the layout's cu_seqlens. So the layout can be
                 cut over the whole row, and no segment needs padding
    startend_row_indices   int [B, 1, S, 1] in their place, as for flashmask_attention: for each key of the whole
                 sequence the row from which it is no longer seen. Causal only, any mask; a row without keys gets 0

    Equivalent, on the whole sequence, to softmax(q @ k.T * scale + mask) @ v; scale = 1 / sqrt(D) unless given.

    Keys and values are gathered in one collective, and again in the backward instead of being kept; their gradients
    are summed over the group to their owners, in fp32. A rank holds one layer's whole keys and values at a time.

    >>> q, k, v = (paddle.randn([1, 8, 4, 16]) for _ in range(3))
    >>> list(gather_attention(q, k, v, layout=SeqLayout(8), group=None, boundaries=(0, 3, 8)).shape)
    [1, 8, 4, 16]
    """
    group = group_or_alone(group)
    check_heads(q, k, v)
    check_one_row(layout, q)
    shares = shares_of_group(layout, group)
    share = shares[group.rank]
    check_share(q.shape[1], share)
    if startend_row_indices is None:
        bounds = row_bounds(layout.cu_seqlens if boundaries is None else boundaries, q.shape[0], share.seq_len)
        visible = visible_rows(share, causal, bounds, q.place)
    else:
        _check_indices(startend_row_indices, q.shape[0], share.seq_len, causal, boundaries)
        visible = visible_by_indices(share, startend_row_indices)
    scale = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    kernel: Kernel = by_rows
    if flashmask.can_run(q, v):
        check_backward(q, k, v, "flash")
        kernel = flashmask
    out: Tensor = _GatherAttention.apply(q, k, v, _Call(visible, rows_in_order(shares), group, kernel, scale))
    return out


class Kernel(Protocol):
    """The modules by_rows and flashmask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: VisibleRows, scale: float) -> tuple[Tensor, Tensor]: ...
    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        visible: VisibleRows,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class _Call:
    """The constants of one call."""

    visible: VisibleRows
    rows: UnevenRows
    group: Group
    kernel: Kernel
    scale: float

    def whole(self, *shares: Tensor) -> list[Tensor]:
        """[B, S_local, H, D] of every rank -> [B, S, H, D], in the order of the sequence."""
        return [x.moveaxis(0, 1) for x in collect_rows([x.moveaxis(1, 0) for x in shares], self.rows, self.group)]

    def own_sum(self, *wholes: Tensor) -> list[Tensor]:
        """[B, S, H, D], partial on every rank -> their sum, of this rank's positions: [B, S_local, H, D]."""
        return [x.moveaxis(0, 1) for x in sum_rows([x.moveaxis(1, 0) for x in wholes], self.rows, self.group)]


class _GatherAttention(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        with paddle.amp.auto_cast(enable=False):
            keys, values = call.whole(k, v)
            out, lse = call.kernel.forward(q, keys, values, call.visible, call.scale)
        result = out.astype(q.dtype)
        ctx.call = call
        ctx.needed = [not x.stop_gradient for x in (q, k, v)]
        ctx.save_for_backward(q, k, v, result.detach(), lse)  # not detached, it would keep its own graph: a leak
        return result

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensor()
        call: _Call = ctx.call
        with paddle.amp.auto_cast(enable=False), paddle.no_grad():
            keys, values = call.whole(k, v)
            grad_q, *partial = call.kernel.backward(grad, q, keys, values, out, lse, call.visible, call.scale)
            grads = [grad_q, *call.own_sum(*partial)]
        return tuple(g.astype(q.dtype) if needed else None for g, needed in zip(grads, ctx.needed, strict=True))


def _check_indices(indices: Tensor, batch: int, length: int, causal: bool, boundaries: Boundaries | None) -> None:
    if not causal or boundaries is not None:
        raise ValueError(
            f"startend_row_indices stand for causal attention and in place of boundaries, got causal={causal} and "
            f"boundaries={boundaries}: leave one of them out"
        )
    if list(indices.shape) != [batch, 1, length, 1]:
        raise ValueError(
            f"startend_row_indices must be {[batch, 1, length, 1]}, one row for each key of the whole padded sequence, "
            f"got {list(indices.shape)}"
        )
