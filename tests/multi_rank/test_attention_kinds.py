"""Real processes: gathered attention, the kinds of ContextParallel, states of Gated DeltaNet, on 2, 3 and 4 ranks."""

from functools import partial

import delta_cases
import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import recompute

from cut_arrays import attention_arrays, bounds_of, cut, rows_of, same_as_whole, whole
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import ContextParallel, SequenceGroups, gather_attention, padded_layout
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.testing.subgroup import SubGroup
from rank_cases import hold, pairs

# gathered keys and values


def gather_case(lengths, *, segments="layout", batch=1, heads=(4, 2), causal=True, mode="zigzag", front=False, **more):
    """segments: cut by the "layout", or at the "boundaries" of the mask alone; None is one sequence."""
    group, length, bounds = dist.get_group(0), sum(lengths), bounds_of(lengths)
    cp = {"cp_size": group.nranks, "cp_rank": group.rank, "cp_mode": mode}
    cu_seqlens = bounds if segments == "layout" else None
    make = partial(SeqLayout, remainder="front") if front else padded_layout
    layout = make(length, cu_seqlens=cu_seqlens, **cp)
    if segments == "boundaries":
        more["boundaries"] = bounds
    elif segments is None and layout.seq_len > length and not causal:
        more["boundaries"] = (0, length)
    *arrays, weight = attention_arrays(batch, length, *heads, value_width=5)
    scale = {"scale": more["scale"]} if "scale" in more else {}
    same_as_whole(
        partial(gather_attention, layout=layout, group=group, causal=causal, **more),
        partial(full_attention, causal=causal, cu_seqlens=bounds if segments else None, **scale),
        arrays,
        rows_of(layout, lengths if segments == "layout" else [length]),
        weight,
        "qkv",
    )


ROWS = ([6, 10, 3], [19], [1, 7])  # the last ends before the others: padding


def of_each_row(q, k, v):
    """Full attention of each row by itself, with its boundaries."""
    outs = []
    for row, lengths in enumerate(ROWS):
        bounds = bounds_of(lengths)
        bounds = bounds if bounds[-1] == q.shape[1] else (*bounds, q.shape[1])
        outs.append(full_attention(*(x[row : row + 1] for x in (q, k, v)), cu_seqlens=bounds))
    return paddle.concat(outs)


def rows_with_boundaries_of_their_own(kind="gather"):
    group = dist.get_group(0)
    chosen = ContextParallel(kind, group=group).choose(4, 4, 19, batch=3)
    layout = chosen.layout(19)
    *arrays, weight = attention_arrays(3, 19, 4, 4)
    bounds = [bounds_of(lengths) for lengths in ROWS]
    same_as_whole(
        partial(chosen.attend, layout=layout, boundaries=bounds),
        of_each_row, arrays, rows_of(layout, [19]), weight, "qkv",
    )  # fmt: skip


def any_mask(kind="gather"):
    """A shared question, seen by two answers that do not see each other; and a position that sees nothing."""
    group, length = dist.get_group(0), 24
    until = np.array([24] * 6 + [15] * 9 + [24] * 9)
    until[20] = 20  # not even by itself; its own row still sees earlier keys
    until[:1] = 1
    position = np.arange(length)
    seen = (position[:, None] >= position) & (position[:, None] < until)  # [S, S]
    seen[0] = False  # row 0 sees nothing: its output is 0
    until[0] = 0

    def expected(q, k, v):
        scores = paddle.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
        weights = paddle.nn.functional.softmax(scores + paddle.to_tensor(np.where(seen, 0, -1e30).astype("float32")))
        weights = weights * paddle.to_tensor(seen.any(axis=1, keepdims=True).astype("float32"))
        return paddle.einsum("bhqk,bkhd->bqhd", weights, v)

    indices = paddle.to_tensor(np.broadcast_to(until, (2, 24)).astype("int32")).reshape([2, 1, 24, 1])
    chosen = ContextParallel(kind, group=group).choose(4, 4, length, batch=2, any_mask=True)
    layout = chosen.layout(length)
    *arrays, weight = attention_arrays(2, length, 4, 4)
    attend = partial(chosen.attend, layout=layout, startend_row_indices=indices)
    same_as_whole(attend, expected, arrays, layout.positions(), weight, "qkv")


def gather_cut_by_sp():
    """A contiguous sp cut is undone like a cp cut; unequal shares."""
    group = dist.get_group(0)
    layout = SeqLayout(13, sp_size=group.nranks, sp_rank=group.rank, cu_seqlens=(0, 5, 13), remainder="front")
    *arrays, weight = attention_arrays(1, 13, 4, 2)
    same_as_whole(
        partial(gather_attention, layout=layout, group=group),
        partial(full_attention, cu_seqlens=(0, 5, 13)), arrays, layout.positions(), weight, "qkv",
    )  # fmt: skip


def gather_recompute():
    """Recompute gathers a second time and must see the same keys."""
    group = dist.get_group(0)
    layout = padded_layout(24, cp_size=group.nranks, cp_rank=group.rank)
    *arrays, weight = attention_arrays(1, 24, 4, 2)
    attend = partial(gather_attention, layout=layout, group=group)
    same_as_whole(
        lambda q, k, v: recompute(lambda *x: attend(*x) * 1.0, q, k, v),
        full_attention, arrays, rows_of(layout, [24]), weight, "qkv",
    )  # fmt: skip


def gather_collectives():
    """One collective for k and v forward; one for them and one for both gradients backward."""
    group = dist.get_group(0)
    layout = padded_layout(24, cp_size=group.nranks, cp_rank=group.rank)
    q, k, v = (cut(x, rows_of(layout, [24])) for x in attention_arrays(1, 24, 4, 2)[:3])
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce_sum"):
            original = getattr(collectives, name)
            patch.setattr(
                collectives, name, lambda x, g, name=name, original=original: sent.append(name) or original(x, g)
            )
        out = gather_attention(q, k, v, layout=layout, group=group)
        assert sent == ["all_gather"]
        out.sum().backward()
    assert sent == ["all_gather", "all_gather", "all_reduce_sum"]


def gather_memory():
    """Kept for the backward is nothing of length S: on four ranks as much as on two, for as long a share."""
    me, kept = dist.get_rank(), []
    for group in (SubGroup([me & 2, (me & 2) + 1]), dist.get_group(0)):
        layout = SeqLayout(256 * group.nranks, cp_size=group.nranks, cp_rank=group.rank)
        q, k, v = (paddle.to_tensor(whole(seed, 1, 256, 2, 16), stop_gradient=False) for seed in range(3))
        gather_attention(q, k, v, layout=layout, group=group)  # what is kept for this layout, is
        before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
        out = gather_attention(q, k, v, layout=layout, group=group)
        kept.append(paddle.base.core.host_memory_stat_current_value("Allocated", 0) - before)
        out.sum().backward()
        del out
    assert kept[0] == kept[1], f"{kept[0]} bytes with two ranks, {kept[1]} with four"


# the kinds of ContextParallel


def kind_case(kind, lengths, *, packed=True, batch=1, causal=True, sp=1, groups=None, heads=(6, 6)):
    """What a model does: choose, cut, attend, with one set of arguments for every kind."""
    group, length = dist.get_group(0), sum(lengths)
    cu_seqlens = bounds_of(lengths) if packed else None
    cp = ContextParallel(kind, group=group, groups=groups() if groups else None)
    chosen = cp.choose(*heads, length, batch=batch)
    layout = chosen.layout(length, cu_seqlens, sp_size=sp)
    shown = layout if sp == 1 else chosen.layout(layout.seq_len, layout.cu_seqlens)  # what attention sees
    assert shown.seq_len == layout.seq_len
    real = chosen.bounds_of_batch(length, cu_seqlens)
    boundaries = cu_seqlens if packed else (0, length)
    *arrays, weight = attention_arrays(batch, length, *heads, value_width=5)
    same_as_whole(
        partial(chosen.attend, layout=layout, causal=causal, boundaries=boundaries),
        partial(full_attention, causal=causal, cu_seqlens=cu_seqlens),
        arrays,
        rows_of(shown, np.diff(real).tolist()),
        weight,
        "qkv",
    )


def linear_of(kind, *, heads=(1, 3), sp=1, own_boundaries=False, groups=None):
    """A Gated DeltaNet layer between attention layers of any kind, with the layout of that kind."""
    group, length, rows = dist.get_group(0), 19, ROWS if own_boundaries else ([6, 10, 3],)
    chosen = ContextParallel(kind, group=group, groups=groups() if groups else None).choose(12, 12, length)
    cu_seqlens = bounds_of(rows[0])
    layout = chosen.layout(length, cu_seqlens, sp_size=sp)
    shown = layout if sp == 1 else chosen.layout(layout.seq_len, layout.cu_seqlens)
    arrays, weighting = delta_cases.arrays_of(length, len(rows), heads)
    weight = paddle.to_tensor(whole(9, heads[0] * 12 + heads[1] * 5, delta_cases.TAPS))
    boundaries = [bounds_of(each) for each in rows] if own_boundaries else cu_seqlens

    def expected(*inputs):
        outs = []
        for row, lengths in enumerate(rows):
            ends = bounds_of([*lengths, length - sum(lengths)] if sum(lengths) < length else lengths)
            outs.append(delta_cases.slow_way(*(x[row : row + 1] for x in inputs), weight=weight, cu_seqlens=ends))
        return paddle.concat(outs)

    same_as_whole(
        partial(chosen.gated_delta_net, layout=layout, conv_weight=weight, boundaries=boundaries),
        expected,
        arrays,
        rows_of(shown, np.diff(chosen.bounds_of_batch(length, cu_seqlens)).tolist()),
        weighting,
        delta_cases.NAMES,
        delta_cases.PADDING,
    )


def two_by_two():
    cp_rank, sp_rank = divmod(dist.get_rank(), 2)
    return SequenceGroups(ulysses=SubGroup([2 * cp_rank, 2 * cp_rank + 1]), ring=SubGroup([sp_rank, 2 + sp_rank]))


def group_of_fleet():
    """The sep axis of fleet, looked up when it is first used, not when the setting is made."""
    cp = ContextParallel()
    with pytest.raises(ValueError, match="fleet has no hybrid topology yet"):
        cp.choose(4, 2, 24)
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sep_degree": 2}
    fleet.init(is_collective=True, strategy=strategy)
    chosen = cp.choose(4, 2, 24)
    assert (chosen.group.nranks, chosen.group.rank) == (2, dist.get_rank())
    layout = chosen.layout(24)
    *arrays, weight = attention_arrays(2, 24, 4, 2)
    same_as_whole(partial(chosen.attend, layout=layout), full_attention, arrays, rows_of(layout, [24]), weight, "qkv")


CASES = {
    "gather, B 2, GQA": partial(gather_case, [24], segments=None, batch=2),
    "gather, not causal": partial(gather_case, [24], segments=None, batch=2, causal=False),
    "gather, padded": partial(gather_case, [29], segments=None, batch=2),
    "gather, padded, not causal": partial(gather_case, [29], segments=None, batch=2, causal=False),
    "gather, odd heads, scale": partial(gather_case, [24], segments=None, heads=(3, 1), scale=0.7),
    "gather, contiguous": partial(gather_case, [24], segments=None, mode="contiguous"),
    "gather, contiguous, uneven": partial(gather_case, [13], segments=None, mode="contiguous", front=True),
    "gather, packed by layout": partial(gather_case, [6, 10, 3]),
    "gather, packed by layout, not causal, whole": partial(gather_case, [24, 48], causal=False),
    "gather, packed by boundaries": partial(gather_case, [6, 10, 3], segments="boundaries"),
    "gather, packed by boundaries, B 2": partial(gather_case, [1, 17, 6], segments="boundaries", batch=2),
    "gather, packed by boundaries, not causal": partial(gather_case, [6, 10, 3], segments="boundaries", causal=False),
    "gather, two tokens": partial(gather_case, [2], segments=None, causal=False),
    "gather, fewer tokens than ranks": partial(
        gather_case, [2], segments=None, causal=False, mode="contiguous", front=True
    ),
    "gather, own boundaries of each row": rows_with_boundaries_of_their_own,
    "gather, any mask": any_mask,
    "gather, sp cut, uneven": gather_cut_by_sp,
    "gather under recompute": gather_recompute,
    "gather, collectives": gather_collectives,
}  # fmt: skip
for _kind in ("auto", "gather", "ring", "ulysses"):
    CASES |= {
        f"{_kind}, B 2": partial(kind_case, _kind, [29], packed=False, batch=2),
        f"{_kind}, packed [6, 10, 3]": partial(kind_case, _kind, [6, 10, 3]),
        f"{_kind}, packed, not causal": partial(kind_case, _kind, [6, 10, 3], causal=False),
        f"{_kind}, tensor parallel too": partial(kind_case, _kind, [12, 9], sp=2),
        f"{_kind}, Gated DeltaNet by states": partial(linear_of, _kind),
        f"{_kind}, Gated DeltaNet by Ulysses": partial(linear_of, _kind, heads=(12, 12)),
    }
DIVIDING = {
    "ulysses, own boundaries of each row": partial(rows_with_boundaries_of_their_own, "ulysses"),
    "ulysses, any mask": partial(any_mask, "ulysses"),
}
FOUR = {
    "gather, memory": gather_memory,
    "both, B 2": partial(kind_case, "both", [29], packed=False, batch=2, groups=two_by_two, heads=(6, 2)),
    "both, packed": partial(kind_case, "both", [6, 10, 3], groups=two_by_two, heads=(6, 2)),
    "both, Gated DeltaNet": partial(linear_of, "both", groups=two_by_two),
    "both, packed, not causal": partial(kind_case, "both", [6, 10, 3], causal=False, groups=two_by_two, heads=(6, 2)),
}
CASES |= delta_cases.CASES | {
    "gather, Gated DeltaNet, tensor parallel too": partial(linear_of, "gather", sp=2),
    "gather, Gated DeltaNet, own boundaries of each row": partial(linear_of, "gather", own_boundaries=True),
    "Ulysses, Gated DeltaNet, own boundaries of each row": partial(
        linear_of, "gather", own_boundaries=True, heads=(12, 12)
    ),
}
SIX_HEADS = ("ulysses, B 2", "ulysses, packed", "ulysses, tensor")
WITHOUT_FOUR = {name: case for name, case in CASES.items() if not name.startswith(SIX_HEADS)}
LAUNCHES = {
    2: CASES | DIVIDING | {"group of fleet": group_of_fleet},
    3: CASES,
    4: WITHOUT_FOUR | DIVIDING | FOUR | delta_cases.FOUR,
}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_equals_the_whole(nranks, case):
    """Outputs and gradients on every rank within 1e-5 of those of the whole sequence (fp32)."""
    hold(__name__, nranks, case)
