"""Linear attention (Gated DeltaNet) over a cut sequence: Ulysses around the causal convolution and the delta rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.delta import causal_conv, gated_delta_rule
from paddle_vl_sp.attention.groups import group_or_alone
from paddle_vl_sp.attention.ulysses import heads_to_sequence, sequence_to_heads, share_lengths
from paddle_vl_sp.comm.collectives import Group, warn_of_no_group
from paddle_vl_sp.layout import SeqLayout


def gated_delta_net_sp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    group: Group | None,
    conv_weight: Tensor | None = None,
    delta_rule: Callable[..., Tensor] = gated_delta_rule,
    cu_seqlens: Sequence[int] | None = None,
    layout: SeqLayout | None = None,
) -> Tensor:
    """Gated DeltaNet between its projections, over a sequence cut for Ulysses: -> [B, S_local, Hv, Dv].

    q, k         [B, S_local, Hk, Dk], v [B, S_local, Hv, Dv]
    g, beta      [B, S_local, Hv]
    group        nranks divides Hk and Hv; None is one process that holds the whole sequence
    conv_weight  [2 * Hk * Dk + Hv * Dv, K] (or [.., 1, K]), depthwise, for q, then k, then v; whole on every rank. The
                 causal convolution and silu run after the exchange, on the whole sequence and this rank's heads, so
                 that no tap is lost at a cut. The gradient covers this rank's heads: sum it over the group
    delta_rule   delta_rule(q, k, v, g, beta, cu_seqlens=...), called with the whole sequence and part of the heads
    cu_seqlens   the boundaries of packed sequences; neither the convolution nor the state crosses them
    layout       needed only where ranks hold unequal shares; its cu_seqlens are used

    There is no ring for it: the state runs through the sequence in order.
    """
    if layout is None:
        warn_of_no_group(group, "gated_delta_net_sp", "this rank's share is the whole sequence")
    group = group_or_alone(group)
    _refuse_ring(layout, group)
    _check_shapes(q, k, v, g, beta)
    _check_heads(q.shape[2], v.shape[2], group.nranks)
    if layout is not None and cu_seqlens is None:
        cu_seqlens = layout.cu_seqlens
    lengths = share_lengths(q, layout, group)
    cu_seqlens = SeqLayout(sum(lengths), cu_seqlens=cu_seqlens).cu_seqlens  # raises before anything is sent
    weights = None if conv_weight is None else _weights_of_heads((q, k, v), conv_weight, group)
    q, k = sequence_to_heads(paddle.concat([q, k], axis=-1), lengths, group).split(2, axis=-1)
    v = sequence_to_heads(v, lengths, group)
    g, beta = sequence_to_heads(paddle.stack([g, beta.astype(g.dtype)], axis=-1), lengths, group).unbind(-1)
    if weights is not None:
        q, k, v = (causal_conv(x, weight, cu_seqlens) for x, weight in zip((q, k, v), weights, strict=True))
    return heads_to_sequence(delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens), lengths, group)


def _weights_of_heads(shares: Sequence[Tensor], weight: Tensor, group: Group) -> list[Tensor]:
    """This rank's part of the convolution's weight, for q, k and v: [heads / nranks, D, K] each."""
    sizes = [x.shape[2] * x.shape[3] for x in shares]
    if weight.shape[0] != sum(sizes):
        raise ValueError(
            f"conv_weight has {weight.shape[0]} channels, q, k and v have {sizes}, together {sum(sizes)}: pass the "
            "weight of all heads, on every rank"
        )
    parts = weight.reshape([weight.shape[0], -1]).split(sizes, axis=0)
    mine = []
    for x, part in zip(shares, parts, strict=True):
        count = x.shape[2] // group.nranks
        own = slice(group.rank * count, (group.rank + 1) * count)
        mine.append(part.reshape([x.shape[2], x.shape[3], -1])[own].astype(x.dtype))
    return mine


def _refuse_ring(layout: SeqLayout | None, group: Group) -> None:
    if layout is None or layout.cp_size == 1:
        return
    if layout.cp_mode == "zigzag" or layout.sp_size > 1:
        raise ValueError(
            f"linear attention cannot run on a ring, and this layout is cut for one ({layout.cp_mode}, cp_size "
            f"{layout.cp_size}, for a group of {group.nranks}): its state runs through the sequence in order; cut with "
            "sp_size alone (Ulysses)"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in named.items())
    same_places = list(q.shape) == list(k.shape) and list(q.shape[:2]) == list(v.shape[:2])
    if len(q.shape) != 4 or len(v.shape) != 4 or not same_places:
        raise ValueError(f"q and k must be [B, S_local, Hk, Dk] and v [B, S_local, Hv, Dv], got {shapes}")
    if list(g.shape) != list(v.shape[:3]) or list(beta.shape) != list(v.shape[:3]):
        raise ValueError(f"g and beta must be [B, S_local, Hv], got {shapes}")


def _check_heads(key_heads: int, value_heads: int, nranks: int) -> None:
    if value_heads % key_heads:
        raise ValueError(f"{key_heads} key heads must divide {value_heads} value heads")
    if key_heads % nranks or value_heads % nranks:
        raise ValueError(
            f"{key_heads} key heads and {value_heads} value heads do not divide over {nranks} ranks: linear attention "
            "has no ring to take the rest; use a group whose size divides both"
        )
