"""Linear attention (Gated DeltaNet) over a cut sequence, convolution and delta rule: by Ulysses or by states."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import Tensor

from paddle_vl_sp.attention.delta import causal_conv, gated_delta_rule
from paddle_vl_sp.attention.groups import group_or_alone
from paddle_vl_sp.attention.shares import Chain, chain, check_share, shares_of_group
from paddle_vl_sp.attention.state import conv_of_share, delta_rule_of_share
from paddle_vl_sp.attention.ulysses import heads_to_sequence, sequence_to_heads
from paddle_vl_sp.attention.visible import Boundaries, each_row
from paddle_vl_sp.autograd import concat, via_float32
from paddle_vl_sp.comm.collectives import Group, warn_of_no_group
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.gathered import rows_in_order
from paddle_vl_sp.settings import check_choice

METHODS = ("ulysses", "state")


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
    cu_seqlens: Boundaries | None = None,
    layout: SeqLayout | None = None,
    method: str = "ulysses",
) -> Tensor:
    """Gated DeltaNet between its projections, over a sequence that ranks share: -> [B, S_local, Hv, Dv].

    q, k         [B, S_local, Hk, Dk], v [B, S_local, Hv, Dv]
    g, beta      [B, S_local, Hv]
    group        all ranks of the layout, in the order of cp_rank * sp_size + sp_rank; or its cp ranks, where the sp cut
                 is undone before. None is one process that holds the whole sequence
    conv_weight  [2 * Hk * Dk + Hv * Dv, K] (or [.., 1, K]), depthwise, for q, then k, then v; whole on every rank. The
                 causal convolution and silu run first; no tap is lost at a cut. The gradient is partial, of this rank's
                 heads or positions: sum it over the group
    delta_rule   delta_rule(q, k, v, g, beta, cu_seqlens=...), called with the whole sequence and part of the heads
    cu_seqlens   the boundaries of packed sequences, for all rows of the batch or a list of each row's; neither the
                 convolution nor the state crosses them. None: the layout's
    layout       any cut; None: contiguous shares as long as this rank's
    method       "ulysses": an all-to-all to the whole sequence with part of the heads, and back; nranks divides Hk and
                 Hv. "state": every rank computes its own positions, and only the states between ranks travel, as many
                 bytes for any length; any number of heads, the built-in rule

    >>> q, k, v = (paddle.randn([1, 6, 2, 4]) for _ in range(3))
    >>> g, beta = -paddle.ones([1, 6, 2]), paddle.full([1, 6, 2], 0.5)
    >>> list(gated_delta_net_sp(q, k, v, g, beta, group=None, cu_seqlens=(0, 2, 6)).shape)
    [1, 6, 2, 4]
    """
    check_choice("method", method, METHODS)
    if layout is None:
        warn_of_no_group(group, "gated_delta_net_sp", "this rank's share is the whole sequence")
    group = group_or_alone(group)
    _check_shapes(q, k, v, g, beta)
    if layout is None:
        layout = SeqLayout(q.shape[1] * group.nranks, sp_size=group.nranks, sp_rank=group.rank)
    shares = shares_of_group(layout, group)
    check_share(q.shape[1], shares[group.rank])
    cu_seqlens = layout.cu_seqlens if cu_seqlens is None else cu_seqlens
    rows = [None] if cu_seqlens is None else each_row(cu_seqlens, q.shape[0])
    bounds = [SeqLayout(layout.seq_len, cu_seqlens=row).cu_seqlens for row in rows]  # raises before anything is sent
    if method == "state":
        _check_rule(delta_rule)
        links = chain(shares, group.rank, tuple(tuple(row or (0, layout.seq_len)) for row in bounds))
        return _by_states(q, k, v, g, beta, conv_weight, links, group)
    return _by_heads(q, k, v, g, beta, conv_weight, delta_rule, bounds, shares, group)


def _by_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    conv_weight: Tensor | None,
    delta_rule: Callable[..., Tensor],
    bounds: Sequence[Sequence[int] | None],
    shares: tuple[SeqLayout, ...],
    group: Group,
) -> Tensor:
    """Ulysses: the whole sequence with part of the heads, in order, whatever the cut."""
    _check_heads(q.shape[2], v.shape[2], group.nranks)
    weights = None if conv_weight is None else _weights_of_heads((q, k, v), conv_weight, group)
    rows = rows_in_order(shares)

    def to_heads(x: Tensor) -> Tensor:
        return _ordered(sequence_to_heads(x, rows.counts, group), rows.in_order)

    q, k = to_heads(concat([q, k], axis=-1)).split(2, axis=-1)
    v = to_heads(v)
    g, beta = to_heads(paddle.stack([g, beta.astype(g.dtype)], axis=-1)).unbind(-1)
    outs = []
    for i, cu_seqlens in enumerate(bounds):
        row = [x if len(bounds) == 1 else x[i : i + 1] for x in (q, k, v, g, beta)]
        if weights is not None:
            row[:3] = [causal_conv(x, weight, cu_seqlens) for x, weight in zip(row, weights, strict=False)]
        outs.append(delta_rule(*row, cu_seqlens=cu_seqlens))
    out = outs[0] if len(outs) == 1 else concat(outs)
    return heads_to_sequence(_ordered(out, rows.back), rows.counts, group)


def _by_states(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, conv_weight: Tensor | None, links: Chain, group: Group
) -> Tensor:
    """Rows of the batch with boundaries of their own are computed as one row, one after the other."""
    shape = v.shape
    if len(links.bounds) > 1:
        q, k, v, g, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta))
    if conv_weight is not None:
        sizes = _channels((q, k, v), conv_weight)
        rows = concat([x.flatten(2) for x in (q, k, v)], axis=-1)  # [B, S_local, C]
        rows = conv_of_share(rows, conv_weight.reshape([sum(sizes), -1]), links, group)
        parts = rows.split(sizes, axis=-1)
        q, k, v = (part.reshape(x.shape) for part, x in zip(parts, (q, k, v), strict=True))
    return delta_rule_of_share(q, k, v, g, beta, links, group).reshape(shape)


def _ordered(x: Tensor, order: Resident) -> Tensor:
    """x[:, order], a permutation; x itself where it is in order."""
    if order.stretch is not None:
        return x
    at = order.on(x.place)
    return via_float32(lambda y: paddle.gather(y, at, axis=1), x)


def _weights_of_heads(shares: Sequence[Tensor], weight: Tensor, group: Group) -> list[Tensor]:
    """This rank's part of the convolution's weight, for q, k and v: [heads / nranks, D, K] each."""
    sizes = _channels(shares, weight)
    parts = weight.reshape([weight.shape[0], -1]).split(sizes, axis=0)
    mine = []
    for x, part in zip(shares, parts, strict=True):
        count = x.shape[2] // group.nranks
        own = slice(group.rank * count, (group.rank + 1) * count)
        mine.append(part.reshape([x.shape[2], x.shape[3], -1])[own])
    return mine


def _channels(parts: Sequence[Tensor], weight: Tensor) -> list[int]:
    sizes = [x.shape[2] * x.shape[3] for x in parts]
    if weight.shape[0] != sum(sizes):
        raise ValueError(
            f"conv_weight has {weight.shape[0]} channels, q, k and v have {sizes}, together {sum(sizes)}: pass the "
            "weight of all heads, on every rank"
        )
    return sizes


def _check_rule(delta_rule: Callable[..., Tensor]) -> None:
    if delta_rule is not gated_delta_rule:
        raise ValueError(
            'method="state" has a delta rule of its own, which starts from a state and says what becomes of any: leave '
            'delta_rule out, or method="ulysses"'
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
            f"{key_heads} key heads and {value_heads} value heads do not divide over {nranks} ranks: use "
            'method="state", or a group whose size divides both'
        )
