"""Who attends to whom: every visible pair exactly once, the work balanced; the ring walked without processes."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_double import FlashDouble
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import padded_layout
from paddle_vl_sp.attention.blocks import Blockwise
from paddle_vl_sp.attention.flash import Flash
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.schedule import Block, num_pairs, ring_schedule, ring_share, tiles

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@st.composite
def layouts(draw):
    """A layout for rank 0, the real length of each segment, and whether it is causal."""
    lengths, size = draw(LENGTHS), draw(st.integers(1, 4))
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    kind = draw(st.sampled_from(["zigzag", "contiguous", "front"]))
    if kind == "front":
        layout = SeqLayout(bounds[-1], cp_size=size, cp_mode="contiguous", cu_seqlens=bounds, remainder="front")
    else:
        sp_size = draw(st.integers(1, 2))
        layout = padded_layout(bounds[-1], cu_seqlens=bounds, cp_size=size, cp_mode=kind, sp_size=sp_size)
    return layout, tuple(lengths), draw(st.booleans())


def covered(layout, lengths, causal):
    """How often each (query, key) pair is computed, over all ranks and steps: [S, S], by global position."""
    count = np.zeros((layout.seq_len, layout.seq_len), dtype=int)
    for rank in range(layout.cp_size):
        queries = ring_share(layout, rank).positions()
        schedule = ring_schedule(ring_share(layout, rank), causal, lengths)
        for source, blocks in enumerate(schedule):
            keys = ring_share(layout, source).positions()
            for block in blocks:
                rows, cols = np.meshgrid(range(block.q_len), range(block.k_len), indexing="ij")
                kept = (rows >= cols) if block.causal else np.ones_like(rows, bool)
                at = queries[block.q_start + rows[kept]], keys[block.k_start + cols[kept]]
                np.add.at(count, at, 1)
                assert kept.sum() == block.num_pairs
    return count


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_every_visible_pair_is_computed_once(case):
    """Exact: same segment, not later, not padding; for every rank, cut, padding and packing."""
    layout, lengths, causal = case
    segment = np.repeat(np.arange(len(lengths)), layout.segments()[:, 1])
    position = np.arange(layout.seq_len)
    end = (layout.segments()[:, 0] + np.array(lengths))[segment]
    expected = segment[:, None] == segment[None]
    real = position < end
    if causal:
        expected &= position[:, None] >= position[None]
    got = covered(layout, lengths, causal)
    np.testing.assert_array_equal(got[real], (expected & real[None])[real])
    assert got.max(initial=0) <= 1


def test_worked_example():
    """The example of the docstring."""
    layout = SeqLayout(8, cp_size=2, cp_rank=1, cu_seqlens=(0, 4, 8))
    assert ring_schedule(layout, True) == (
        (Block(0, 2, 0, 1, False), Block(2, 2, 2, 1, False)),
        (Block(0, 2, 0, 2, True), Block(2, 2, 2, 2, True)),
    )
    assert num_pairs(ring_schedule(layout, True)) == [4, 6]


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("lengths", [[64], [1, 1, 62], [5, 7, 52]])
def test_zigzag_gives_every_rank_the_same_work_at_every_step(size, lengths):
    """Exact: the same number of pairs on all ranks, at each step; contiguous leaves the first rank almost idle."""
    bounds = tuple(np.cumsum([0, *(2 * size * n for n in lengths)]).tolist())

    def work(mode):
        ranks = [SeqLayout(bounds[-1], cp_size=size, cp_rank=r, cp_mode=mode, cu_seqlens=bounds) for r in range(size)]
        steps = [num_pairs(ring_schedule(layout, True)) for layout in ranks]
        return np.array([[pairs[(r - step) % size] for step in range(size)] for r, pairs in enumerate(steps)])

    zigzag, contiguous = work("zigzag"), work("contiguous")
    assert (zigzag == zigzag[0]).all()
    assert zigzag.sum() == contiguous.sum()
    assert contiguous.sum(axis=1).max() > (1.4 if size == 2 else 1.7) * contiguous.sum(axis=1).mean()
    assert contiguous.sum(axis=1).min() < 0.6 * contiguous.sum(axis=1).mean()


def test_what_the_mask_empties_is_skipped():
    """Contiguous: a rank has no block with those after it. Zigzag: no more pairs than are visible."""
    layout = SeqLayout(32, cp_size=4, cp_rank=1, cp_mode="contiguous")
    assert [len(blocks) for blocks in ring_schedule(layout, True)] == [1, 1, 0, 0]
    total = sum(sum(num_pairs(ring_schedule(SeqLayout(32, cp_size=4, cp_rank=r), True))) for r in range(4))
    assert total == 32 * 33 // 2


@pytest.mark.parametrize("block", [Block(2, 13, 5, 13, True), Block(0, 13, 1, 9, False), Block(3, 4, 0, 20, False)])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_tiles_cover_a_block_once(block, size):
    """Exact: the same pairs, none twice, no piece larger than asked."""
    count = np.zeros((40, 40), dtype=int)
    for tile in tiles(block, size):
        assert max(tile.q_len, tile.k_len) <= size
        rows, cols = np.ogrid[: tile.q_len, : tile.k_len]
        kept = (rows >= cols) if tile.causal else np.ones((tile.q_len, tile.k_len), bool)
        count[tile.q_start : tile.q_start + tile.q_len, tile.k_start : tile.k_start + tile.k_len] += kept
    rows, cols = np.ogrid[: block.q_len, : block.k_len]
    expected = np.zeros_like(count)
    whole = (rows >= cols) if block.causal else np.ones((block.q_len, block.k_len), bool)
    expected[block.q_start : block.q_start + block.q_len, block.k_start : block.k_start + block.k_len] = whole
    np.testing.assert_array_equal(count, expected)


@settings(max_examples=50, deadline=None)
@given(layouts(), st.sampled_from(["blockwise", "flash", "flash, padded log-sum-exp"]))
def test_the_ring_walked_by_hand_equals_full_attention(case, name):
    """Forward and backward, 1e-5: each rank's blocks, source after source, with what each source holds.

    Flash is on a double of Paddle's operators.
    """
    if name == "blockwise":
        return walk(case, Blockwise(), 6)
    with FlashDouble(has_padded_lse="padded" in name):
        return walk(case, Flash(), 8)


def walk(case, kernel, width):
    layout, lengths, causal = case
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    real = np.concatenate([s + np.arange(n) for s, n in zip(layout.segments()[:, 0], lengths, strict=True)])
    rng = np.random.default_rng(0)
    shapes = [(4, width), (2, width), (2, width), (4, width)]
    padded = [np.full((1, layout.seq_len, *shape), 9.0, "float32") for shape in shapes]
    for x in padded:
        x[:, real] = rng.standard_normal(x[:, real].shape)
    padded[3][:, np.setdiff1d(np.arange(layout.seq_len), real)] = 0  # the weights of the loss
    whole = [paddle.to_tensor(x[:, real], stop_gradient=False) for x in padded]
    expected = full_attention(*whole[:3], causal=causal, cu_seqlens=bounds)
    expected_grads = paddle.grad((expected * whole[3]).sum(), whole[:3])

    grads = [np.zeros_like(x) for x in padded[:3]]
    outs = np.full_like(padded[0], np.nan)
    for rank in range(layout.cp_size):
        mine = ring_share(layout, rank)
        at = mine.positions()
        q, weight = paddle.to_tensor(padded[0][:, at]), paddle.to_tensor(padded[3][:, at])
        q, weight = kernel.load(q, 2), kernel.load(weight, 2)
        part, grad_q = None, None
        sources = [ring_share(layout, source).positions() for source in range(layout.cp_size)]
        steps = list(zip(sources, ring_schedule(mine, causal, lengths), strict=True))
        for keys, blocks in steps:
            k, v = (kernel.load(paddle.to_tensor(x[:, keys]), 2) for x in padded[1:3])
            part = kernel.forward(part, q, k, v, blocks, width**-0.5)
        out, lse = part or kernel.nothing(q, width)
        outs[:, at] = kernel.store(out).numpy()
        shared = kernel.shared(weight, out)
        for keys, blocks in steps:
            k, v = (kernel.load(paddle.to_tensor(x[:, keys]), 2) for x in padded[1:3])
            grad_q, *parts = kernel.backward(grad_q, weight, q, k, v, shared, lse, blocks, width**-0.5)
            for grad, part in zip(grads[1:], parts, strict=True):
                grad[:, keys] += kernel.store(part).numpy()
        if grad_q is not None:
            grads[0][:, at] = kernel.store(grad_q).numpy()
    np.testing.assert_allclose(outs[:, real], expected.numpy(), atol=1e-5, rtol=1e-4)
    for grad, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad[:, real], want.numpy(), atol=2e-5, rtol=1e-4)


def test_lengths_are_held_against_the_layout():
    """Refused with both numbers."""
    layout = SeqLayout(16, cp_size=2, cu_seqlens=(0, 8, 16))
    with pytest.raises(ValueError, match="lengths names 1 segments, the layout has 2"):
        ring_schedule(layout, True, (5,))
    with pytest.raises(ValueError, match=r"lengths\[1\] is 9, but segment 1 of the layout holds 1 to 8"):
        ring_schedule(layout, True, (5, 9))
