"""Ulysses: an all-to-all turns part of the sequence with all heads into the whole sequence with part of the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer, PyLayerContext

from paddle_vl_sp.attention.groups import group_or_alone
from paddle_vl_sp.attention.ring import check_heads, check_one_row, packed_attention
from paddle_vl_sp.autograd import differentiable_once, via_float32
from paddle_vl_sp.comm.collectives import Group, warn_of_no_group
from paddle_vl_sp.comm.exchange import all_to_all_rows
from paddle_vl_sp.layout import SeqLayout


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group | None,
    attention: Callable[..., Tensor] | None = None,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
    layout: SeqLayout | None = None,
) -> Tensor:
    """Attention of this rank's queries with the keys of the whole sequence: [B, S_local, heads, D] in and out.

    q           [B, S_local, Hq, D], k and v [B, S_local, Hk, D]: rank r holds the r-th stretch of the sequence
    group       nranks divides Hq, and Hk is a multiple of nranks or divides it; if it divides it, key heads are
                repeated. None is one process that holds the whole sequence
    attention   called with the whole sequence and Hq / nranks heads: attention(q, k, v, causal=..., scale=...);
                None is attention over the segments of cu_seqlens. For ring x Ulysses, where this group is the sp cut:
                functools.partial(ring_attention, layout=layout, group=ring_group). For packed sequences it needs the
                boundaries too: bound to it with functools.partial, or in the layout of its ring
    layout      needed only where ranks hold unequal shares; its cu_seqlens are used, its cut is checked with the group

    Two ranks, two heads, four positions; a letter is one position of one head::

        rank 0   A0 A1 | B0 B1          rank 0   A0 A1 A2 A3
        rank 1   A2 A3 | B2 B3    ->    rank 1   B0 B1 B2 B3    -> attention -> and back
    """
    if layout is None:
        warn_of_no_group(group, "ulysses_attention", "this rank's share is the whole sequence")
    group = group_or_alone(group)
    check_heads(q, k, v)
    if layout is not None and attention is None and cu_seqlens is None:
        cu_seqlens = layout.cu_seqlens
    inner = _inner_attention(attention, cu_seqlens, layout, group)
    lengths = share_lengths(q, layout, group)
    check_one_row(SeqLayout(sum(lengths), cu_seqlens=cu_seqlens), q)  # raises before anything is sent
    _check_query_heads(q.shape[2], group.nranks)
    k, v = (_repeat_key_heads(x, group.nranks) for x in (k, v))
    q, k, v = (sequence_to_heads(x, lengths, group) for x in (q, k, v))
    return heads_to_sequence(inner(q, k, v, causal=causal, scale=scale), lengths, group)


def sequence_to_heads(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """[B, lengths[rank], H, D] -> [B, sum(lengths), H / nranks, D]"""
    if group.nranks == 1:
        return x
    result: Tensor = _SequenceToHeads.apply(x, tuple(lengths), group)
    return result


def heads_to_sequence(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """[B, sum(lengths), H / nranks, D] -> [B, lengths[rank], H, D]"""
    if group.nranks == 1:
        return x
    result: Tensor = _HeadsToSequence.apply(x, tuple(lengths), group)
    return result


def share_lengths(x: Tensor, layout: SeqLayout | None, group: Group) -> list[int]:
    """How many positions each rank of the group holds: by the layout; without one, as many as this rank."""
    if layout is None:
        return [int(x.shape[1])] * group.nranks
    shares = _shares(layout, group)
    lengths = [share.local_len for share in shares]
    if x.shape[1] != lengths[group.rank]:
        raise ValueError(
            f"q has {x.shape[1]} rows, the layout says {lengths[group.rank]} for rank {group.rank} of {lengths}: pass "
            "the rank's own share of the sequence"
        )
    check_one_row(layout, x)
    return lengths


def _shares(layout: SeqLayout, group: Group) -> list[SeqLayout]:
    """The layouts of the group's ranks, whose shares are consecutive in the sequence (or in the cp rank's share)."""
    size_and_rank = (group.nranks, group.rank)
    if (layout.sp_size, layout.sp_rank) == size_and_rank:
        return [replace(layout, sp_rank=rank) for rank in range(group.nranks)]
    contiguous = layout.cp_mode == "contiguous" and layout.sp_size == 1
    if contiguous and (layout.cp_size, layout.cp_rank) == size_and_rank:
        if layout.cu_seqlens is not None:
            raise ValueError(
                "a cp cut cuts every segment of cu_seqlens by itself, so the ranks' shares are not consecutive and "
                f"Ulysses cannot join them: cut with sp_size={layout.cp_size}, or use ring_attention"
            )
        return [replace(layout, cp_rank=rank) for rank in range(group.nranks)]
    raise ValueError(
        f"Ulysses joins consecutive stretches of the sequence: the layout's sp cut (rank {layout.sp_rank} of "
        f"{layout.sp_size}) or a contiguous cp cut (here {layout.cp_mode}, rank {layout.cp_rank} of {layout.cp_size}) "
        f"must be that of the group, rank {group.rank} of {group.nranks}: cut with sp_size={group.nranks}, "
        f"sp_rank={group.rank}"
    )


def _inner_attention(
    attention: Callable[..., Tensor] | None, cu_seqlens: Sequence[int] | None, layout: SeqLayout | None, group: Group
) -> Callable[..., Tensor]:
    if attention is None:
        if layout is not None and layout.cp_size > 1 and layout.sp_size == group.nranks:
            raise ValueError(
                f"the layout has a cp cut over {layout.cp_size} ranks that Ulysses does not join: pass "
                "attention=functools.partial(ring_attention, layout=layout, group=ring_group)"
            )
        return partial(packed_attention, cu_seqlens=cu_seqlens)
    # with cp_size > 1 the attention is a ring, whose own layout says where segments end
    packed = layout is not None and layout.cp_size == 1 and layout.cu_seqlens is not None
    if cu_seqlens is not None or (packed and not _has_boundaries(attention)):
        raise ValueError(
            "cu_seqlens is for the built-in attention: bind it to your own, "
            "attention=functools.partial(yours, cu_seqlens=...), or give ring_attention a layout with cu_seqlens; an "
            "attention that knows the boundaries some other way goes with a layout without cu_seqlens"
        )
    return attention


def _has_boundaries(attention: Callable[..., Tensor]) -> bool:
    """Whether boundaries, or a layout that has them, are bound to the attention."""
    bound: dict[str, object] = getattr(attention, "keywords", {})
    named = any(name.startswith("cu_seqlens") and value is not None for name, value in bound.items())
    return named or getattr(bound.get("layout"), "cu_seqlens", None) is not None


def _check_query_heads(heads: int, nranks: int) -> None:
    if heads % nranks:
        raise ValueError(
            f"{heads} query heads do not divide over {nranks} ranks: Ulysses gives every rank the same number; use a "
            "group whose size divides the heads, and the ring for the rest (choose_degrees)"
        )


def _repeat_key_heads(x: Tensor, nranks: int) -> Tensor:
    """Repeats key heads where there are fewer than ranks, so that query head i still gets its own key head."""
    heads = x.shape[2]
    if heads % nranks == 0:
        return x
    if nranks % heads:
        raise ValueError(
            f"{heads} key heads and {nranks} ranks: one must be a multiple of the other; use a group whose size "
            "divides the key heads, and the ring for the rest (choose_degrees)"
        )
    return via_float32(lambda y: paddle.repeat_interleave(y, nranks // heads, axis=2), x)


class _SequenceToHeads(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        return _to_heads(x, lengths, group)

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        return _to_sequence(grad, ctx.lengths, ctx.group)


class _HeadsToSequence(PyLayer):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: PyLayerContext, x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        return _to_sequence(x, lengths, group)

    @staticmethod
    @differentiable_once
    def backward(ctx: PyLayerContext, grad: Tensor) -> Tensor:
        return _to_heads(grad, ctx.lengths, ctx.group)


def _to_heads(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """[B, lengths[rank], H, D] -> [B, sum(lengths), H / nranks, D]"""
    batch, own, heads, width = x.shape
    share = heads // group.nranks
    sent = x.reshape([batch, own, group.nranks, share, width]).transpose([2, 0, 1, 3, 4])
    rows = [batch * length for length in lengths]
    sent = sent.reshape([group.nranks * batch * own, share * width])  # for rank after rank
    arrived = all_to_all_rows(sent, [batch * own] * group.nranks, rows, group)  # [B * sum(lengths), share * D]
    if batch == 1:
        return arrived.reshape([1, sum(lengths), share, width])
    ends = accumulate(rows)
    parts = [arrived[end - n : end].reshape([batch, -1, share, width]) for end, n in zip(ends, rows, strict=True) if n]
    return paddle.concat(parts, axis=1)


def _to_sequence(x: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
    """[B, sum(lengths), H / nranks, D] -> [B, lengths[rank], H, D]"""
    batch, _, share, width = x.shape
    own = lengths[group.rank]
    if batch > 1:  # for rank after rank: its stretch of every row of the batch
        ends = zip(accumulate(lengths), lengths, strict=True)
        x = paddle.concat([x[:, end - n : end].reshape([batch * n, -1]) for end, n in ends if n])
    sent = x.reshape([batch * sum(lengths), share * width])
    arrived = all_to_all_rows(sent, [batch * n for n in lengths], [batch * own] * group.nranks, group)
    arrived = arrived.reshape([group.nranks, batch, own, share, width]).transpose([1, 2, 0, 3, 4])
    return arrived.reshape([batch, own, group.nranks * share, width])
