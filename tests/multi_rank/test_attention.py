"""Real processes: attention, linear attention, loss and batches cut over 2 and 4 ranks equal the whole on one."""

import itertools
from functools import partial
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import recompute

from cut_arrays import attention_arrays, bounds_of, close, cut, rows_of, same_as_whole, whole
from flash_double import FlashDouble
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import (
    gated_delta_net_sp,
    gathered_losses,
    groups_from_fleet,
    packed_attention,
    padded_layout,
    ring_attention,
    sequence_parallel_loss,
    shard_batch,
    token_losses,
    ulysses_attention,
    unshard,
)
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import full_attention, recurrent_delta_rule
from paddle_vl_sp.comm import exchange
from paddle_vl_sp.comm.exchange import all_to_all
from paddle_vl_sp.testing.subgroup import SubGroup
from rank_cases import hold, pairs

# ring


def ring_case(
    lengths, *, causal=True, mode="zigzag", packed=True, batch=1, heads=(4, 2), front=False, value_width=5, **options
):
    group = dist.get_group(0)
    size, rank = group.nranks, group.rank
    cu_seqlens = bounds_of(lengths) if packed else None
    cp = {"cp_size": size, "cp_rank": rank, "cp_mode": mode}
    if front:
        layout = SeqLayout(sum(lengths), cu_seqlens=cu_seqlens, remainder="front", **cp)
    else:
        layout = padded_layout(sum(lengths), cu_seqlens=cu_seqlens, **cp)
    *arrays, weight = attention_arrays(batch, sum(lengths), *heads, value_width=value_width)
    same_as_whole(
        partial(ring_attention, layout=layout, group=group, causal=causal, lengths=lengths, **options),
        partial(full_attention, causal=causal, cu_seqlens=cu_seqlens, **options),
        arrays,
        rows_of(layout, lengths),
        weight,
        "qkv",
    )


def ring_recompute():
    """Recompute runs the ring a second time and must see the same keys."""
    group = dist.get_group(0)
    layout = SeqLayout(16, cp_size=group.nranks, cp_rank=group.rank)
    *arrays, weight = attention_arrays(1, 16, 4, 2)
    attend = partial(ring_attention, layout=layout, group=group)
    same_as_whole(
        lambda q, k, v: recompute(lambda *x: attend(*x) * 1.0, q, k, v),
        full_attention, arrays, layout.positions(), weight[..., :8], "qkv",
    )  # fmt: skip


def ring_memory():
    """Four ranks against two, as long a share each: the buffers of a gradient that travels, and nothing of length S."""
    me = dist.get_rank()
    peaks = []
    for group in (SubGroup([me & 2, (me & 2) + 1]), dist.get_group(0)):
        layout = SeqLayout(256 * group.nranks, cp_size=group.nranks, cp_rank=group.rank)
        q, k, v = (paddle.to_tensor(whole(seed, 1, 256, 2, 16), stop_gradient=False) for seed in range(3))
        before = paddle.base.core.host_memory_stat_current_value("Allocated", 0)
        paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
        ring_attention(q, k, v, layout=layout, group=group).sum().backward()
        peaks.append(paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - before)
    share = 2 * 256 * 2 * 16 * 4  # bytes of k and v of one rank
    assert peaks[0] > share
    assert peaks[1] - peaks[0] < 3.5 * share, f"{peaks[1]} bytes with four ranks, {peaks[0]} with two; a share {share}"


# Ulysses


def ulysses_case(lengths, *, causal=True, packed=True, batch=1, heads=(4, 4), told=True, value_width=5, **options):
    group = dist.get_group(0)
    cu_seqlens = bounds_of(lengths) if packed else None
    layout = SeqLayout(sum(lengths), sp_size=group.nranks, sp_rank=group.rank, cu_seqlens=cu_seqlens, remainder="front")
    *arrays, weight = attention_arrays(batch, sum(lengths), *heads, value_width=value_width)
    how = {"layout": layout} if told else {"cu_seqlens": cu_seqlens}
    same_as_whole(
        partial(ulysses_attention, group=group, causal=causal, **how, **options),
        partial(full_attention, causal=causal, cu_seqlens=cu_seqlens, **options),
        arrays,
        layout.positions(),
        weight,
        "qkv",
    )


def ulysses_any_attention():
    """The inner attention is any callable, and sees the whole sequence with a share of the heads."""
    group = dist.get_group(0)
    seen = []

    def inner(q, k, v, *, causal, scale):
        seen.append((q.shape, k.shape))
        return full_attention(q, k, v, causal=causal, scale=scale)

    layout = SeqLayout(8, sp_size=group.nranks, sp_rank=group.rank)
    *arrays, weight = attention_arrays(2, 8, 8, 4)
    same_as_whole(
        partial(ulysses_attention, group=group, attention=inner),
        full_attention, arrays, layout.positions(), weight, "qkv",
    )  # fmt: skip
    assert seen == [([2, 8, 8 // group.nranks, 8], [2, 8, 4 // group.nranks, 8])]


def ulysses_contiguous_cp():
    group = dist.get_group(0)
    layout = SeqLayout(8, cp_size=group.nranks, cp_rank=group.rank, cp_mode="contiguous")
    *arrays, weight = attention_arrays(2, 8, 4, 4)
    same_as_whole(
        partial(ulysses_attention, group=group, layout=layout),
        full_attention, arrays, layout.positions(), weight, "qkv",
    )  # fmt: skip


def both_case(lengths, *, causal=True, packed=True, batch=1):
    """Ring x Ulysses on four ranks: cp cuts for the ring, sp cuts the result for Ulysses."""
    me = dist.get_rank()
    cp_rank, sp_rank = divmod(me, 2)
    ulysses, ring = SubGroup([2 * cp_rank, 2 * cp_rank + 1]), SubGroup([sp_rank, 2 + sp_rank])
    cu_seqlens = bounds_of(lengths) if packed else None
    layout = padded_layout(sum(lengths), cu_seqlens=cu_seqlens, cp_size=2, cp_rank=cp_rank, sp_size=2, sp_rank=sp_rank)
    *arrays, weight = attention_arrays(batch, sum(lengths), 6, 2)
    inner = partial(ring_attention, layout=layout, group=ring, lengths=lengths)
    same_as_whole(
        partial(ulysses_attention, group=ulysses, attention=inner, causal=causal, layout=layout),
        partial(full_attention, causal=causal, cu_seqlens=cu_seqlens),
        arrays,
        rows_of(layout, lengths),
        weight,
        "qkv",
    )


# linear attention


def linear_case(lengths, *, packed=True, batch=1, conv=True, told=True):
    group = dist.get_group(0)
    cu_seqlens = bounds_of(lengths) if packed else None
    length = sum(lengths)
    layout = SeqLayout(length, sp_size=group.nranks, sp_rank=group.rank, cu_seqlens=cu_seqlens, remainder="front")
    shapes = [(4, 6), (4, 6), (8, 5), (8,), (8,)]
    arrays = [whole(seed, batch, length, *shape) for seed, shape in enumerate(shapes)]
    arrays[3], arrays[4] = -np.log1p(np.exp(arrays[3])), 1 / (1 + np.exp(-arrays[4]))
    kernels = [paddle.to_tensor(whole(9, 4 * 6 * 2 + 8 * 5, 4), stop_gradient=False) for _ in range(2)]

    def expected(q, k, v, g, beta):
        if conv:
            parts = kernels[0].split([24, 24, 40])
            q, k, v = (
                causal_conv(x, w.reshape([*x.shape[2:], 4]), cu_seqlens) for x, w in zip((q, k, v), parts, strict=True)
            )
        return recurrent_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens)

    how = {"layout": layout} if told else {"cu_seqlens": cu_seqlens}
    attend = partial(gated_delta_net_sp, group=group, conv_weight=kernels[1] if conv else None, **how)
    weight = whole(8, batch, length, 8, 5)
    same_as_whole(attend, expected, arrays, layout.positions(), weight, ["q", "k", "v", "g", "beta"])
    if conv:
        (wanted,) = paddle.grad((expected(*map(paddle.to_tensor, arrays)) * paddle.to_tensor(weight)).sum(), kernels[0])
        local = [cut(x, layout.positions()) for x in arrays]
        (got,) = paddle.grad((attend(*local) * cut(weight, layout.positions())).sum(), kernels[1])
        dist.all_reduce(got)
        close(got, wanted, "conv weight, summed over the group")


# batches and the loss


def batch_round_trip():
    """Cut, then joined: bit-exact, in every dtype and for mRoPE positions on their last axis.

    What is cut is also compared with the slow way's, so that a cut and a join that are wrong alike do not pass. The
    gradient of what was padding is zero.
    """
    group = dist.get_group(0)
    for lengths in ([5, 7], [6, 10, 3], [1]):
        length, bounds = sum(lengths), bounds_of(lengths)
        layout = padded_layout(length, cu_seqlens=bounds, cp_size=group.nranks, cp_rank=group.rank)
        ids = np.arange(1, length + 1)[None]
        batch = {"input_ids": ids, "position_ids": np.stack([ids, 10 * ids, 100 * ids]), "loss_weights": ids / 7}
        share, rows = shard_batch(batch, layout, cu_seqlens=bounds), rows_of(layout, lengths)
        for name, axis in (("input_ids", 1), ("position_ids", 2), ("loss_weights", 1)):
            np.testing.assert_array_equal(share[name], np.where(rows >= 0, batch[name][..., rows], 0))
            joined = unshard(paddle.to_tensor(share[name]), layout, group, axis=axis, cu_seqlens=bounds)
            np.testing.assert_array_equal(joined.numpy(), batch[name])
        for grad, factor in (("partial", sum(range(1, group.nranks + 1))), ("whole", 1)):
            local = cut(ids.astype("float32"), rows)
            joined = unshard(local, layout, group, axis=1, cu_seqlens=bounds, grad=grad)
            weight = paddle.to_tensor(ids.astype("float32")) * (group.rank + 1 if grad == "partial" else 1)
            (got,) = paddle.grad((joined * weight).sum(), local)
            np.testing.assert_array_equal(got.numpy(), np.where(rows >= 0, factor * ids[:, rows], 0))


def unshard_gradients(front):
    """Gradients: summed over the ranks, then cut ("partial"); or cut only ("whole"). Small integers: exact."""
    group = dist.get_group(0)
    size = group.nranks
    cp = {"cp_mode": "contiguous", "remainder": "front"} if front else {}
    layout = SeqLayout(2 * size + 1 if front else 4 * size, cp_size=size, cp_rank=group.rank, **cp)
    x = whole(0, 2, layout.seq_len, 3)
    weight = np.arange(layout.seq_len, dtype="float32").reshape([1, -1, 1])
    for grad, factor in (("partial", sum(range(1, size + 1))), ("whole", 1)):
        local = cut(x, layout.positions())
        joined = unshard(local, layout, group, axis=1, grad=grad)
        np.testing.assert_array_equal(joined.numpy(), x)
        mine = weight * (group.rank + 1 if grad == "partial" else 1)
        kept = []
        joined.register_hook(kept.append)
        (got,) = paddle.grad((joined * paddle.to_tensor(mine)).sum(), local)
        np.testing.assert_array_equal(got.numpy(), np.broadcast_to(factor * weight, x.shape)[:, layout.positions()])
        np.testing.assert_array_equal(
            kept[0].numpy(), np.broadcast_to(mine, x.shape)
        )  # autograd's own, not summed into


def float16_movement():
    """Shares joined, with both gradients, and key heads repeated: exact in float16, which the CPU cannot gather."""
    group = dist.get_group(0)
    layout = SeqLayout(4 * group.nranks, cp_size=group.nranks, cp_rank=group.rank)
    x = whole(0, 2, layout.seq_len, 3).astype("float16")
    for grad, factor in (("partial", group.nranks), ("whole", 1)):
        local = paddle.to_tensor(x[:, layout.positions()], stop_gradient=False)
        joined = unshard(local, layout, group, axis=1, grad=grad)
        np.testing.assert_array_equal(joined.numpy(), x)
        assert np.unique(paddle.grad((joined * 2).sum(), local)[0].numpy()).tolist() == [2 * factor]

    layout = SeqLayout(8, sp_size=group.nranks, sp_rank=group.rank)
    arrays = [each.astype("float16") for each in attention_arrays(1, 8, 4, 1)[:3]]
    results = []
    for share, attend in ((layout, partial(ulysses_attention, group=group)), (SeqLayout(8), packed_attention)):
        leaves = [paddle.to_tensor(each[:, share.positions()], stop_gradient=False) for each in arrays]
        out = attend(*leaves)
        results.append([each.numpy() for each in (out, paddle.grad(out.sum(), leaves)[0])])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got, expected[:, layout.positions()], atol=1e-3)


def second_gradients():
    """Refused on every rank, before anything is sent."""
    group = dist.get_group(0)
    cp = SeqLayout(8, cp_size=group.nranks, cp_rank=group.rank)
    functions = {
        "RingAttention": lambda x: ring_attention(x, x, x, layout=cp, group=group),
        "HeadsToSequence": lambda x: ulysses_attention(x, x, x, group=group),
        "GatherRows": lambda x: unshard(x, cp, group, axis=1),
    }
    for name, function in functions.items():
        x = cut(whole(0, 1, 8, 4, 8), cp.positions())
        out = function(x)
        with pytest.raises(OSError, match=f"{name} has no second gradient"):
            paddle.grad((out * out).sum(), [x], create_graph=True)


def search_for_nan():
    """FLAGS_check_nan_inf ends the process at infinite numbers, also at those in memory that nobody has written yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paddle, "empty", lambda shape, dtype: paddle.full(shape, float("nan"), dtype))
        paddle.set_flags({"FLAGS_check_nan_inf": 1})
        try:
            ring_case([5, 7], causal=False)
            ulysses_case([5, 8])
            loss_on_some_ranks_only()
        finally:
            paddle.set_flags({"FLAGS_check_nan_inf": 0})


def unshard_both():
    """cp rank after cp rank, sp rank after sp rank, on four ranks."""
    group = dist.get_group(0)
    cp_rank, sp_rank = divmod(group.rank, 2)
    layout = SeqLayout(16, cp_size=2, cp_rank=cp_rank, sp_size=2, sp_rank=sp_rank)
    x = whole(0, 2, 16)
    joined = unshard(paddle.to_tensor(x[:, layout.positions()]), layout, group, axis=-1)
    np.testing.assert_array_equal(joined.numpy(), x)


def loss_case(lengths, *, weighted=False, num_tokens=None, as_tensor=False, averaged=False):
    """Loss, gradients of the own logits, and parameter gradients summed (or averaged) over the group."""
    group = dist.get_group(0)
    length, bounds, vocabulary = sum(lengths), bounds_of(lengths), 11
    layout = padded_layout(length, cu_seqlens=bounds, cp_size=group.nranks, cp_rank=group.rank)
    hidden, matrix = whole(0, 1, length, 6), whole(1, 6, vocabulary)
    ids = np.random.default_rng(2).integers(0, vocabulary, (1, length))
    weights = (
        np.random.default_rng(3).random((1, length)).astype("float32") if weighted else np.ones((1, length), "float32")
    )
    labels, shifted = np.full_like(ids, -100), np.zeros_like(weights)
    for first, end in itertools.pairwise(bounds):
        labels[0, first : end - 1] = ids[0, first + 1 : end]
        shifted[0, first : end - 1] = weights[0, first + 1 : end]

    expected_matrix = paddle.to_tensor(matrix, stop_gradient=False)
    logits = paddle.matmul(paddle.to_tensor(hidden), expected_matrix)
    losses = paddle.nn.functional.cross_entropy(logits, paddle.to_tensor(labels), reduction="none", axis=-1).reshape(
        [1, -1]
    )
    valid = paddle.to_tensor(shifted, stop_gradient=False)
    counted = valid * paddle.to_tensor((labels != -100).astype("float32"))
    expected = (losses * counted).sum() / (num_tokens or counted.sum())
    expected_grad, expected_of_weights = (x.numpy() for x in paddle.grad(expected, [expected_matrix, valid]))

    batch = {"labels": ids, "loss_weights": weights}
    share = shard_batch(batch, layout, cu_seqlens=bounds, shift_labels=True)
    rows = rows_of(layout, lengths)
    parameter = paddle.to_tensor(matrix, stop_gradient=False)
    local = paddle.matmul(cut(hidden, rows), parameter)
    own_weights = paddle.to_tensor(share["loss_weights"], stop_gradient=not weighted)
    loss = sequence_parallel_loss(
        local, paddle.to_tensor(share["labels"]), group=group,
        num_tokens=paddle.to_tensor(num_tokens) if as_tensor else num_tokens,
        weights=own_weights if weighted else None, averaged_gradients=averaged,
    )  # fmt: skip
    grad, *of_weights = paddle.grad(loss, [parameter, own_weights] if weighted else [parameter])
    dist.all_reduce(grad)
    close(loss, expected, "loss")
    close(grad.numpy() / (group.nranks if averaged else 1), expected_grad, "parameter gradient")
    if weighted:
        of_weights = of_weights[0].numpy()[:, rows >= 0] / (group.nranks if averaged else 1)
        close(of_weights, expected_of_weights[:, rows[rows >= 0]], "gradient of the weights")
    metric = gathered_losses(token_losses(local, paddle.to_tensor(share["labels"])), layout=layout, group=group)
    segments = layout.segments()[:, 0]
    real = np.concatenate([start + np.arange(n) for start, n in zip(segments, lengths, strict=False)])
    close(metric.numpy()[:, real], (losses.numpy() * (labels != -100)), "token losses")


def loss_on_some_ranks_only():
    """A rank without valid tokens takes part; a group without any has loss 0 and gradient 0."""
    group = dist.get_group(0)
    for valid_ranks in ([0], []):
        logits = paddle.to_tensor(whole(group.rank, 1, 3, 5), stop_gradient=False)
        labels = paddle.to_tensor([[1, 2, -100]] if group.rank in valid_ranks else [[-100] * 3])
        loss = sequence_parallel_loss(logits, labels, group=group)
        grad = paddle.grad(loss, [logits])[0]
        assert bool(grad.abs().sum() > 0) == (group.rank in valid_ranks)
        assert bool(loss > 0) == bool(valid_ranks)
        assert not np.isnan(loss.item())


# what is sent


def all_to_all_equals_gather():
    """Pure movement, unequal and empty parts: bit-exact against gathering everything."""
    group = dist.get_group(0)
    size, me = group.nranks, group.rank
    lengths = np.array([[(3 * src + dst) % 4 for dst in range(size)] for src in range(size)])
    everything = [[whole(100 * src + dst, int(lengths[src, dst]), 3) for dst in range(size)] for src in range(size)]
    parts = [paddle.to_tensor(part) for part in everything[me]]
    got = all_to_all(parts, [[int(lengths[src, me]), 3] for src in range(size)], group)
    for src in range(size):
        np.testing.assert_array_equal(got[src].numpy(), everything[src][me])


def as_on_nccl():
    """The calls made where a backend has all of them, served by doubles over gloo: the same results."""
    group = dist.get_group(0)
    used = set()

    def batch_isend_irecv(operations):
        used.add("batch_isend_irecv")
        assert all(operation.tensor.size for operation in operations)
        sends, expects = (
            [(group.get_group_rank(o.peer), o.tensor) for o in operations if o.op is op]
            for op in (dist.isend, dist.irecv)
        )
        exchange._exchange_on_gloo(sends, expects, group)
        return []

    def alltoall_single(out_tensor, in_tensor, sends, receives, group):
        used.add("alltoall_single" if len({*sends, *receives}) == 1 else "alltoall_single, unequal")
        assert in_tensor.is_contiguous()
        assert [in_tensor.shape[0], out_tensor.shape[0]] == [sum(sends), sum(receives)]
        ends = np.cumsum(sends).tolist()
        parts = [in_tensor[end - count : end] for end, count in zip(ends, sends, strict=True)]
        shapes = [[count, *in_tensor.shape[1:]] for count in receives]
        with mock.patch.object(exchange, "is_gloo", return_value=True):
            paddle.assign(paddle.concat(exchange.all_to_all(parts, shapes, group)), output=out_tensor)

    doubles = {(exchange, "is_gloo"): lambda _: False, (dist, "alltoall_single"): alltoall_single}
    doubles[(dist, "batch_isend_irecv")] = batch_isend_irecv
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), double in doubles.items():
            patch.setattr(module, name, double)
        ring_case([6, 10, 3])
        ulysses_case([16], packed=False, batch=2, told=False)
        ulysses_case([16 * group.nranks], heads=(2 * group.nranks, group.nranks))
        linear_case([16], packed=False, told=False)
        all_to_all_equals_gather()
        assert "batch_isend_irecv" in used
        used.discard("batch_isend_irecv")
        ulysses_case([5, 8 * group.nranks])
        ulysses_case([6, 10, 3], causal=False)
        ulysses_case([1])
        ulysses_case([4 * group.nranks + 1], packed=False, batch=2)
    assert used == {"alltoall_single", "alltoall_single, unequal"}


def on_flash_attention_in_bfloat16():
    """In bf16, 2e-2. What travels has one dtype on all ranks, also where a rank has no keys."""
    group = dist.get_group(0)
    cut_by = {"cp_size": group.nranks, "cp_rank": group.rank}
    for lengths, causal, mode in (
        ([16] * 5, True, "zigzag"), ([6, 10, 3], True, "zigzag"), ([32], False, "zigzag"), ([8, 24], True, "contiguous")
    ):  # fmt: skip
        layout = padded_layout(sum(lengths), cu_seqlens=bounds_of(lengths), cp_mode=mode, **cut_by)
        *arrays, weight = attention_arrays(1, sum(lengths), 4, 2)
        rows = rows_of(layout, lengths)
        local = [cut(x, rows).detach().astype("bfloat16") for x in arrays]
        exact = [paddle.to_tensor(x).astype("bfloat16").astype("float32") for x in arrays]
        for x in (*local, *exact):
            x.stop_gradient = False
        with FlashDouble():
            out = ring_attention(*local, layout=layout, group=group, causal=causal, lengths=lengths)
            grads = paddle.grad((out.astype("float32") * cut(weight, rows, 0.0)).sum(), local)
        expected = full_attention(*exact, causal=causal, cu_seqlens=bounds_of(lengths))
        wanted = paddle.grad((expected * paddle.to_tensor(weight)).sum(), exact)
        real = np.flatnonzero(rows >= 0)
        for got, want in zip([out, *grads], [expected, *wanted], strict=True):
            assert got.dtype == paddle.bfloat16
            want = want.numpy()
            error = np.abs(got.astype("float32").numpy()[:, real] - want[:, rows[real]]).max() / np.abs(want).max()
            assert error < 2e-2, error


def on_flash_attention():
    """The kernel that a GPU uses, on a double of Paddle's operators: the same results, 1e-5; one call a step."""
    size = dist.get_world_size()
    for has_padded_lse in (False, True):
        with FlashDouble(has_padded_lse) as double:
            ring = partial(ring_case, value_width=8)
            ring([32], packed=False, batch=2)
            assert double.calls["flash_attn_unpadded_grad"] == double.calls["flash_attn_unpadded"]
            ring([16] * 5)
            ring([6, 10, 3], scale=0.7)
            ring([6, 10, 3], causal=False)
            ring([13], packed=False, mode="contiguous", front=True)
            ring([1], mode="contiguous", front=True)
            ring([1, 9, 1], causal=False, heads=(6, 2))
            ring_recompute()
            double.calls.clear()
            ulysses_case([5, 8], value_width=8)
            assert double.calls["flash_attn_unpadded"] == 1
            ulysses_case([16], packed=False, batch=2, causal=False, value_width=8)
            if size == 4:
                both_case([6, 10, 3])
                both_case([32], packed=False, batch=2)


def emulated_groups():
    """Every collective that the package asks of a group, on rows and columns of the world."""
    size, me = dist.get_world_size(), dist.get_rank()
    pairs = [[r, r ^ 1] for r in range(size)] if size == 2 else [[me ^ 1, me], [me, me ^ 2]]
    for members in [sorted(pairs[me])] if size == 2 else [sorted(pair) for pair in pairs]:
        group = SubGroup(members)
        x = paddle.to_tensor([float(me), 1.0])
        dist.all_reduce(x, group=group)
        np.testing.assert_array_equal(x.numpy(), [sum(members), 2.0])
        shares = []
        dist.all_gather(shares, paddle.to_tensor([me]), group=group)
        assert [int(share) for share in shares] == members
        joined = paddle.empty([2], "int64")
        dist.stream.all_gather(joined, paddle.to_tensor([me]), group=group)
        assert joined.tolist() == members
        objects = []
        dist.all_gather_object(objects, {"rank": me}, group=group)
        assert [each["rank"] for each in objects] == members
        word = paddle.to_tensor([me])
        dist.broadcast(word, src=members[1], group=group)
        assert int(word) == members[1]
        dist.barrier(group)


def groups_of_fleet():
    """fleet's own topology with a sep axis of two: Ulysses over it, around a ring of one."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sep_degree": 2}
    fleet.init(is_collective=True, strategy=strategy)
    groups = groups_from_fleet(fleet.get_hybrid_communicate_group())
    assert (groups.ulysses.nranks, groups.ring.nranks, groups.ring.ranks) == (2, 1, [dist.get_rank()])
    layout = SeqLayout(8, sp_size=2, sp_rank=groups.ulysses.rank, cu_seqlens=(0, 3, 8))
    *arrays, weight = attention_arrays(1, 8, 4, 2)
    same_as_whole(
        partial(
            ulysses_attention,
            group=groups.ulysses,
            attention=partial(ring_attention, layout=layout, group=groups.ring),
            layout=layout,
        ),
        partial(full_attention, cu_seqlens=(0, 3, 8)),
        arrays,
        layout.positions(),
        weight,
        "qkv",
    )


CASES = {
    "ring, one sequence, B 2, GQA": partial(ring_case, [32], packed=False, batch=2),
    "ring, not causal": partial(ring_case, [32], packed=False, batch=2, causal=False),
    "ring, padded, not causal": partial(ring_case, [29], packed=False, causal=False),
    "ring, odd heads, scale": partial(ring_case, [16], packed=False, heads=(3, 1), scale=0.7),
    "ring, contiguous": partial(ring_case, [16], packed=False, mode="contiguous"),
    "ring, contiguous, not causal": partial(ring_case, [16], packed=False, mode="contiguous", causal=False),
    "ring, contiguous, uneven": partial(ring_case, [13], packed=False, mode="contiguous", front=True),
    "ring, packed [5, 7]": partial(ring_case, [5, 7]),
    "ring, packed [5, 8]": partial(ring_case, [5, 8], heads=(3, 3)),
    "ring, packed [6, 10, 3]": partial(ring_case, [6, 10, 3]),
    "ring, packed [5, 7], not causal": partial(ring_case, [5, 7], causal=False),
    "ring, packed [6, 10, 3], not causal": partial(ring_case, [6, 10, 3], causal=False),
    "ring, packed [16, 16, 32]": partial(ring_case, [16, 16, 32]),
    "ring, packed, contiguous [5, 7]": partial(ring_case, [5, 7], mode="contiguous"),
    "ring, one token": partial(ring_case, [1]),
    "ring, one token of many": partial(ring_case, [1, 9, 1], causal=False),
    "ring, empty last rank": partial(ring_case, [1], mode="contiguous", front=True),
    "ring, empty last rank, not causal": partial(ring_case, [1, 1], mode="contiguous", front=True, causal=False),
    "ring under recompute": ring_recompute,
    "ulysses, B 2": partial(ulysses_case, [16], packed=False, batch=2, told=False),
    "ulysses, not causal": partial(ulysses_case, [16], packed=False, batch=2, causal=False),
    "ulysses, key heads repeated": partial(ulysses_case, [16], packed=False, heads=(8, 1), told=False),
    "ulysses, key heads repeated, B 2": partial(ulysses_case, [8], packed=False, batch=2, heads=(8, 2), scale=0.3),
    "ulysses, odd heads to each": partial(ulysses_case, [8], packed=False, heads=(12, 4)),
    "ulysses, packed [5, 7]": partial(ulysses_case, [5, 7], told=False),
    "ulysses, packed [5, 8], uneven": partial(ulysses_case, [5, 8]),
    "ulysses, packed [6, 10, 3], not causal": partial(ulysses_case, [6, 10, 3], causal=False),
    "ulysses, empty last rank": partial(ulysses_case, [1]),
    "ulysses, B 2, uneven": partial(ulysses_case, [13], packed=False, batch=2),
    "ulysses, B 2, empty last rank": partial(ulysses_case, [1], packed=False, batch=2),
    "ulysses, any inner attention": ulysses_any_attention,
    "ulysses, contiguous cp": ulysses_contiguous_cp,
    "linear, B 2": partial(linear_case, [16], packed=False, batch=2, told=False),
    "linear, without convolution": partial(linear_case, [16], packed=False, conv=False),
    "linear, packed [5, 7]": partial(linear_case, [5, 7], told=False),
    "linear, packed [6, 10, 3], uneven": partial(linear_case, [6, 10, 3]),
    "linear, one token": partial(linear_case, [1]),
    "batch, round trip": batch_round_trip,
    "unshard, gradients": partial(unshard_gradients, front=False),
    "unshard, gradients, uneven": partial(unshard_gradients, front=True),
    "float16": float16_movement,
    "second gradients": second_gradients,
    "FLAGS_check_nan_inf": search_for_nan,
    "loss": partial(loss_case, [6, 10, 3]),
    "loss, weighted": partial(loss_case, [5, 7], weighted=True),
    "loss, given number of tokens": partial(loss_case, [5, 8], num_tokens=40),
    "loss, given number as a tensor": partial(loss_case, [5, 8], num_tokens=40, as_tensor=True),
    "loss, averaged gradients": partial(loss_case, [5, 8], averaged=True),
    "loss, weighted, averaged gradients": partial(loss_case, [5, 7], weighted=True, averaged=True),
    "loss, ranks without valid tokens": loss_on_some_ranks_only,
    "all-to-all": all_to_all_equals_gather,
    "as on NCCL": as_on_nccl,
    "on flash attention": on_flash_attention,
    "on flash attention, bf16": on_flash_attention_in_bfloat16,
    "emulated groups": emulated_groups,
}
TWO_RANKS = {"groups of fleet": groups_of_fleet}
FOUR_RANKS = {
    "ring, memory": ring_memory,
    "both, B 2": partial(both_case, [32], packed=False, batch=2),
    "both, packed [6, 10, 3]": partial(both_case, [6, 10, 3]),
    "both, packed [5, 7], not causal": partial(both_case, [5, 7], causal=False),
    "unshard, cp and sp": unshard_both,
}


THREE_RANKS = ("ring, packed [6, 10, 3]", "loss", "all-to-all")
LAUNCHES = {2: CASES | TWO_RANKS, 3: {name: CASES[name] for name in THREE_RANKS}, 4: CASES | FOUR_RANKS}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_equals_the_whole(nranks, case):
    """Outputs and gradients on every rank within 1e-5 of those of the whole sequence (fp32); movement bit-exact."""
    hold(__name__, nranks, case)
