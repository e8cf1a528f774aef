"""Gated DeltaNet across ranks without an all-to-all: each computes its own positions, and only states travel.

Over a stretch of positions the delta rule is an affine map of the state that it begins with. So every rank finds the
maps of its pieces, all ranks gather them, and each composes those before a piece to the state that the piece begins
with. The causal convolution reads the few rows before each piece, which are gathered in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.attention.delta import causal_conv, chunked, delta_inputs, outputs_from, state_map
from paddle_vl_sp.attention.shares import Chain, Piece, halo
from paddle_vl_sp.autograd import concat, differentiable_once
from paddle_vl_sp.comm.collectives import Group
from paddle_vl_sp.comm.gather import gather_rows, needs_grad, take_rows
from paddle_vl_sp.comm.uneven import rank_after_rank


def conv_of_share(x: Tensor, weight: Tensor, links: Chain, group: Group) -> Tensor:
    """`causal_conv` of this rank's rows, with those before them on other ranks: x [B, S_local, C], weight [C, K]."""
    edge = halo(links, weight.shape[-1])
    rows = x.moveaxis(1, 0)  # [S_local, B, C]
    sources = [rows, rows.new_zeros([1, *rows.shape[1:]])]
    if sum(edge.counts):
        sources.insert(1, _gathered(take_rows(rows, edge.sent), edge.counts, group, needs_grad([x])))
    extended = take_rows(concat(sources), edge.source).moveaxis(0, 1)  # [B, E, C]
    one_head = extended.unsqueeze(2), weight.unsqueeze(0)
    out = causal_conv(*one_head, edge.bounds if extended.shape[1] else None).squeeze(2)
    return take_rows(out.moveaxis(1, 0), edge.kept).moveaxis(0, 1)


def delta_rule_of_share(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, links: Chain, group: Group) -> Tensor:
    """`gated_delta_rule` of this rank's positions, with the states of those before: -> [B, S_local, Hv, Dv]."""
    wants_grad = needs_grad([q, k, v, g, beta])
    with paddle.amp.auto_cast(enable=False):
        inputs = delta_inputs(q, k, v, g, beta)
        pieces = {p: chunked(*(x[:, p.row : p.row + p.length] for x in inputs)) for p in links.own}
        shape = [v.shape[0], v.shape[2], q.shape[3], v.shape[3] + q.shape[3]]  # B, Hv, Dk, Dv + Dk
        maps, start = None, v.new_zeros([*shape[:3], v.shape[3]], dtype="float32")
        if links.passing:
            own = [state_map(pieces[p]) for p in links.own_passing]
            maps = _gathered(_stacked(own, shape, inputs), links.counts(), group, wants_grad)  # [P, B, Hv, Dk, Dv + Dk]
        states = _states(maps, links, start)
        outs = [outputs_from(pieces[p], states.get(p, start)) for p in links.own]
        out = paddle.concat(outs, axis=1) if outs else inputs[2]  # [B, S_local, Hv, Dv]
        return (out if maps is None else _AfterGather.apply(out, maps)).astype(v.dtype)


def _states(maps: Tensor | None, links: Chain, start: Tensor) -> dict[Piece, Tensor]:
    """The state that each of this rank's pieces begins with, by the maps of those before it in its segment."""
    states: dict[Piece, Tensor] = {}
    if maps is None:
        return states
    row = {piece: i for i, piece in enumerate(links.passing)}
    last = {piece.segment: piece for piece in links.own}  # of each segment: what comes later is not needed
    state, width, segment = start, start.shape[-1], -1
    for piece in links.pieces:
        if piece.segment not in last or piece.start > last[piece.segment].start:
            continue
        state = start if piece.segment != segment else state
        segment = piece.segment
        states |= {piece: state} if piece.rank == links.rank else {}
        if piece in row:
            step = maps[row[piece]]
            state = paddle.matmul(step[..., width:], state) + step[..., :width]
    return states


def _stacked(own: Sequence[Tensor], shape: list[int], inputs: Sequence[Tensor]) -> Tensor:
    """[P, *shape]; without any, P = 0, still of the graph, so that backward comes to this gather before an earlier."""
    if own:
        return paddle.stack(list(own))
    nothing = paddle.concat([x.flatten()[:0] for x in inputs])
    return nothing.reshape([0, *shape])


def _gathered(rows: Tensor, counts: Sequence[int], group: Group, wants_grad: bool) -> Tensor:
    (whole,) = gather_rows([rows], rank_after_rank(tuple(counts)), group, "max", "partial", wants_grad)
    return whole


class _AfterGather(PyLayer):  # type: ignore[misc]
    """x, in a graph that contains the gather: a rank that uses none of the states takes part in its backward, too."""

    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, gathered: Tensor) -> Tensor:
        ctx.shape = gathered.shape
        return x.unsqueeze(0).squeeze(0)

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.clone(), grad.new_zeros(ctx.shape, dtype="float32")
