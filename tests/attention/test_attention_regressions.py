"""Mistakes that sequence parallelism has made elsewhere, one test each; with more ranks in tests/multi_rank."""

import numpy as np
import paddle
from paddle.distributed.fleet.utils import recompute

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import packed_attention, padded_layout, ring_attention, shard_batch
from paddle_vl_sp.attention.blocks import Blockwise
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.schedule import ring_schedule
from paddle_vl_sp.testing import FakeGroup


def ring_outputs(x, bounds, size):
    """Attention of x [1, S, H, D] with itself over a ring of `size`, padded, cut, walked, and put together again."""
    layouts = [padded_layout(x.shape[1], cu_seqlens=bounds, cp_size=size, cp_rank=rank) for rank in range(size)]
    whole = SeqLayout(layouts[0].seq_len, cu_seqlens=layouts[0].cu_seqlens)
    padded = shard_batch({"x": x.transpose([0, 2, 3, 1])}, whole, cu_seqlens=bounds, padding={"x": 50.0})["x"]
    padded = padded.numpy().transpose([0, 3, 1, 2])
    result, kernel, heads = np.full(padded.shape, np.nan, "float32"), Blockwise(), x.shape[2]
    for layout in layouts:
        q = kernel.load(paddle.to_tensor(padded[:, layout.positions()]), heads)
        part = None
        for source, blocks in zip(layouts, ring_schedule(layout, True), strict=True):
            keys = kernel.load(paddle.to_tensor(padded[:, source.positions()]), heads)
            part = kernel.forward(part, q, keys, keys, blocks, q.shape[-1] ** -0.5)
        result[:, layout.positions()] = kernel.store(part.out).numpy()
    starts = layouts[0].segments()[:, 0]
    real = np.concatenate([s + np.arange(n) for s, n in zip(starts, np.diff(bounds), strict=True)])
    return result[:, real]


def test_packed_ring_with_lengths_that_need_padding():
    """1e-5. Boundaries before and after padding mixed up: [5, 7] crashed, [5, 8] was silently wrong."""
    for lengths in ([5, 7], [5, 8], [6, 10, 3], [1]):
        for size in (2, 4):
            bounds = tuple(np.cumsum([0, *lengths]).tolist())
            x = paddle.to_tensor(np.random.default_rng(0).standard_normal((1, bounds[-1], 2, 4)).astype("float32"))
            expected = full_attention(x, x, x, cu_seqlens=bounds)
            np.testing.assert_allclose(ring_outputs(x, bounds, size), expected.numpy(), atol=1e-5)


def test_no_token_is_dropped_where_the_length_does_not_divide():
    """Exact. A length that the group does not divide lost its tail, or was refused: every id has exactly one owner."""
    for length in (1, 5, 13, 17):
        ids = np.arange(1, length + 1)[None]
        for size in (2, 3, 4):
            padded = [padded_layout(length, cp_size=size, cp_rank=r) for r in range(size)]
            uneven = [SeqLayout(length, sp_size=size, sp_rank=r, remainder="front") for r in range(size)]
            for layouts in (padded, uneven):
                owned = np.concatenate([shard_batch({"input_ids": ids}, each)["input_ids"][0] for each in layouts])
                assert sorted(owned[owned > 0]) == list(range(1, length + 1))


def test_labels_are_shifted_before_the_cut_and_not_over_boundaries():
    """Exact. Shifting inside a share takes a wrong label at every cut; over the whole row, at every boundary."""
    ids = np.array([[10, 11, 12, 13, 14, 20, 21, 22]])
    bounds = (0, 5, 8)
    following = {10: 11, 11: 12, 12: 13, 13: 14, 14: -100, 20: 21, 21: 22, 22: -100, 0: -100}
    for size in (1, 2, 4):
        for rank in range(size):
            layout = padded_layout(8, cu_seqlens=bounds, cp_size=size, cp_rank=rank)
            share = shard_batch({"input_ids": ids, "labels": ids}, layout, cu_seqlens=bounds, shift_labels=True)
            assert share["labels"][0].tolist() == [following[token] for token in share["input_ids"][0].tolist()]
            kept = shard_batch({"labels": ids}, layout, cu_seqlens=bounds)  # shifted already: cut only
            assert np.array_equal(kept["labels"] == -100, share["input_ids"] == 0)


def test_recompute_sees_the_same_tensors_the_second_time():
    """The same bits with and without recompute, output and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (
        paddle.to_tensor(rng.standard_normal((1, 12, 2, 4)).astype("float32"), stop_gradient=False) for _ in "qkv"
    )
    layout = SeqLayout(12, cu_seqlens=(0, 5, 12))

    def attend_doubled(q, k, v):
        return ring_attention(q, k * 2, v, layout=layout, group=FakeGroup(0, 1)) * 3

    results = []
    for out in (attend_doubled(q, k, v), recompute(attend_doubled, q, k, v)):
        results.append([out, *paddle.grad((out * out).sum(), [q, k, v])])
    for plain, recomputed in zip(*results, strict=True):
        np.testing.assert_array_equal(plain.numpy(), recomputed.numpy())


def test_mrope_positions_are_cut_along_the_sequence():
    """Exact, also where the batch is 3, so that [3, B, S] could be taken for [B, ..]: the last axis is the sequence."""
    position_ids = np.arange(3 * 3 * 8).reshape(3, 3, 8)
    for rank in range(2):
        layout = SeqLayout(8, cp_size=2, cp_rank=rank)
        share = shard_batch({"position_ids": position_ids, "input_ids": np.zeros((3, 8), int)}, layout)
        np.testing.assert_array_equal(share["position_ids"], position_ids[:, :, layout.positions()])


def test_attention_does_not_cross_segments():
    """Exact: what another segment holds changes nothing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 9, 2, 4)).astype("float32")
    other = x.copy()
    other[:, :4] = 100.0
    outs = [packed_attention(*[paddle.to_tensor(each)] * 3, causal=False, cu_seqlens=(0, 4, 9)) for each in (x, other)]
    np.testing.assert_array_equal(outs[0][:, 4:].numpy(), outs[1][:, 4:].numpy())
