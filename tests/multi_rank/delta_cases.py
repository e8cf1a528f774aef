"""Gated DeltaNet over shares of any cut, by both methods, against the slow way on the whole sequence."""

from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed.fleet.utils import recompute

from cut_arrays import bounds_of, close, cut, rows_of, same_as_whole, whole
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import delta, gated_delta_net_sp, padded_layout
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import recurrent_delta_rule
from paddle_vl_sp.comm import collectives

NAMES = ["q", "k", "v", "g", "beta"]
TAPS = 4
PADDING = -0.7  # a decay must not be positive


def arrays_of(length, batch, heads):
    key_heads, value_heads = heads
    shapes = [(key_heads, 6), (key_heads, 6), (value_heads, 5), (value_heads,), (value_heads,)]
    arrays = [whole(seed, batch, length, *shape) for seed, shape in enumerate(shapes)]
    arrays[3], arrays[4] = -np.log1p(np.exp(arrays[3])) / 4, 1 / (1 + np.exp(-arrays[4]))
    return arrays, whole(8, batch, length, value_heads, 5)


def slow_way(q, k, v, g, beta, weight=None, cu_seqlens=None):
    if weight is not None:
        sizes = [x.shape[2] * x.shape[3] for x in (q, k, v)]
        parts = [w.reshape([*x.shape[2:], TAPS]) for x, w in zip((q, k, v), weight.split(sizes), strict=True)]
        q, k, v = (causal_conv(x, w, cu_seqlens) for x, w in zip((q, k, v), parts, strict=True))
    return recurrent_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens)


def case(
    lengths,
    *,
    method="state",
    cut_by="zigzag",
    cuts_segments=False,
    batch=1,
    heads=(3, 3),
    conv=True,
    again=False,
    chunk=3,
):
    """cut_by: a zigzag or contiguous cp cut, "sp", or "both"; at the segments' boundaries too if cuts_segments."""
    group, length = dist.get_group(0), sum(lengths)
    size, rank, bounds = group.nranks, group.rank, bounds_of(lengths)
    if cut_by == "sp":
        layout = SeqLayout(length, sp_size=size, sp_rank=rank, cu_seqlens=bounds, remainder="front")
    elif cut_by == "both":
        cuts = {"cp_size": size // 2, "cp_rank": rank // 2, "sp_size": 2, "sp_rank": rank % 2}
        layout = padded_layout(length, cu_seqlens=bounds, **cuts)
    else:
        cu_seqlens = bounds if cuts_segments else None
        layout = padded_layout(length, cu_seqlens=cu_seqlens, cp_size=size, cp_rank=rank, cp_mode=cut_by)
    rows = rows_of(layout, lengths if layout.cu_seqlens else [length])
    given = None if layout.cu_seqlens else (*bounds, *([layout.seq_len] if layout.seq_len > length else []))
    arrays, weighting = arrays_of(length, batch, heads)
    channels = heads[0] * 12 + heads[1] * 5
    kernels = [paddle.to_tensor(whole(9, channels, TAPS), stop_gradient=False) if conv else None for _ in range(2)]

    attend = partial(
        gated_delta_net_sp, group=group, conv_weight=kernels[1], layout=layout, cu_seqlens=given, method=method
    )
    attend = (lambda *x: recompute(lambda *y: run(*y) * 1.0, *x)) if again and (run := attend) else attend
    expected = partial(slow_way, weight=kernels[0], cu_seqlens=bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "CHUNK", 3)
        same_as_whole(attend, expected, arrays, rows, weighting, NAMES, PADDING)
        if conv and not again:
            (wanted,) = paddle.grad(
                (expected(*map(paddle.to_tensor, arrays)) * paddle.to_tensor(weighting)).sum(), kernels[0]
            )
            local = [cut(x, rows, 0.0) for x in arrays]
            (got,) = paddle.grad((attend(*local) * cut(weighting, rows, 0.0)).sum(), kernels[1])
            dist.all_reduce(got)
            close(got, wanted, "conv weight, summed over the group")


def collectives_are_alike():
    """Every rank does the same ones in the same order: also the first, which uses no state, and the last, which sends
    none. Two in the forward, two in the backward."""
    group = dist.get_group(0)
    layout = SeqLayout(4 * group.nranks, sp_size=group.nranks, sp_rank=group.rank)
    arrays, weighting = arrays_of(layout.seq_len, 1, (2, 2))
    weight = paddle.to_tensor(whole(9, 2 * 12 + 2 * 5, TAPS), stop_gradient=False)
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce_sum"):
            original = getattr(collectives, name)
            patch.setattr(
                collectives, name,
                lambda x, g, name=name, original=original: sent.append((name, x.shape[-1])) or original(x, g),
            )  # fmt: skip
        local = [cut(x, layout.positions()) for x in arrays]
        out = gated_delta_net_sp(*local, group=group, conv_weight=weight, layout=layout, method="state")
        (out * cut(weighting, layout.positions())).sum().backward()
    channels, states = 2 * 12 + 2 * 5, 2 * 6 * (6 + 5)
    assert sent == [
        ("all_gather", channels), ("all_gather", states), ("all_reduce_sum", states), ("all_reduce_sum", channels)
    ]  # fmt: skip


def nothing_crosses():
    """Where every segment is on one rank nothing is sent at all."""
    group = dist.get_group(0)
    size = group.nranks
    layout = SeqLayout(6 * size, sp_size=size, sp_rank=group.rank, cu_seqlens=tuple(range(0, 6 * size + 1, 3)))
    arrays, _ = arrays_of(layout.seq_len, 1, (2, 2))
    local = [cut(x, layout.positions()) for x in arrays]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "all_gather", None)
        weight = paddle.to_tensor(whole(9, 2 * 12 + 2 * 5, TAPS))
        out = gated_delta_net_sp(*local, group=group, conv_weight=weight, layout=layout, method="state")
    expected = slow_way(*map(paddle.to_tensor, arrays), weight=weight, cu_seqlens=layout.cu_seqlens)
    close(out, expected.numpy()[:, layout.positions()], "out")


def half_precision(method):
    """bf16, which the CPU has few kernels for: 3e-2 relative, output and gradients, against fp32 on the whole."""
    group = dist.get_group(0)
    layout = padded_layout(24, cp_size=group.nranks, cp_rank=group.rank)
    arrays, weighting = arrays_of(24, 1, (12, 12))
    weight = paddle.to_tensor(whole(9, 12 * 12 + 12 * 5, TAPS)).astype("bfloat16")
    rows = rows_of(layout, [24])
    local = [cut(x, rows, PADDING).detach().astype("bfloat16") for x in arrays]
    exact = [paddle.to_tensor(x).astype("bfloat16").astype("float32") for x in arrays]
    for x in (*local, *exact):
        x.stop_gradient = False
    out = gated_delta_net_sp(*local, group=group, conv_weight=weight, layout=layout, method=method)
    expected = slow_way(*exact, weight=weight.astype("float32"))
    grads = paddle.grad((out.astype("float32") * cut(weighting, rows)).sum(), local)
    wanted = paddle.grad((expected * paddle.to_tensor(weighting)).sum(), exact)
    for got, want in zip([out, *grads], [expected, *wanted], strict=True):
        assert got.dtype == paddle.bfloat16
        want = want.numpy()
        error = np.abs(got.astype("float32").numpy() - want[:, rows]).max() / np.abs(want).max()
        assert error < 3e-2, error


CASES = {
    "states, bf16": partial(half_precision, "state"),
    "Ulysses, bf16": partial(half_precision, "ulysses"),
    "states, zigzag, B 2": partial(case, [24], batch=2),
    "states, contiguous, B 2": partial(case, [24], cut_by="contiguous", batch=2),
    "states, without convolution": partial(case, [24], conv=False),
    "states, heads of two kinds": partial(case, [24], heads=(1, 3)),
    "states, padded": partial(case, [29]),
    "states, packed, the row is cut": partial(case, [6, 10, 3]),
    "states, packed, each segment is cut": partial(case, [6, 10, 3], cuts_segments=True),
    "states, packed, contiguous, the row is cut": partial(case, [6, 10, 3, 5], cut_by="contiguous"),
    "states, packed, contiguous, each segment is cut": partial(case, [5, 7], cut_by="contiguous", cuts_segments=True),
    "states, packed, sp, uneven": partial(case, [6, 10, 3], cut_by="sp"),
    "states, one long segment among short ones": partial(case, [1, 1, 20, 1, 1], cut_by="sp"),
    "states, pieces shorter than the taps": partial(case, [9]),
    "states, fewer positions than ranks": partial(case, [2], cut_by="sp"),
    "states under recompute": partial(case, [6, 10, 3], again=True),
    "states, the same collectives on every rank": collectives_are_alike,
    "states, nothing crosses": nothing_crosses,
    "Ulysses, zigzag": partial(case, [24], method="ulysses", heads=(12, 12), batch=2),
    "Ulysses, packed, each segment is cut": partial(
        case, [6, 10, 3], method="ulysses", heads=(12, 12), cuts_segments=True
    ),
    "Ulysses, packed, the row is cut": partial(case, [6, 10, 3], method="ulysses", heads=(12, 12)),
}
FOUR = {
    "states, both": partial(case, [6, 10, 3], cut_by="both"),
    "Ulysses, both": partial(case, [6, 10, 3], cut_by="both", method="ulysses", heads=(4, 4)),
}
