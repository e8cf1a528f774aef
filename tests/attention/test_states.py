"""Pieces of a sequence that pass states on: who sends what, what each reads, in which order ranks communicate."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle.autograd import PyLayer

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import delta, gated_delta_net_sp, padded_layout, state
from paddle_vl_sp.attention.delta import chunked, delta_inputs, outputs_from, state_map
from paddle_vl_sp.attention.shares import Chain, Piece, halo, pieces, shares_of_group
from paddle_vl_sp.layout import layouts_of_all_ranks
from paddle_vl_sp.sequence.gathered import rows_in_order
from paddle_vl_sp.testing import FakeGroup


def shares_of(length, **cut):
    return tuple(layouts_of_all_ranks(SeqLayout(length, **cut)))


def test_worked_examples():
    """The examples of the docstrings."""
    shares = shares_of(8, cp_size=2)
    links = [Chain(rank, shares, ((0, 5, 8),)) for rank in (0, 1)]
    assert pieces(shares, (0, 5, 8)) == [
        Piece(0, 0, 0, 0, 2), Piece(1, 0, 0, 2, 3), Piece(1, 1, 3, 5, 1), Piece(0, 1, 2, 6, 2)
    ]  # fmt: skip
    assert links[0].passing == [Piece(0, 0, 0, 0, 2), Piece(1, 1, 3, 5, 1)]
    assert [each.own_passing for each in links] == [[Piece(0, 0, 0, 0, 2)], [Piece(1, 1, 3, 5, 1)]]
    assert links[0].counts() == (1, 1)
    edge = halo(links[1], 3)  # what is before: positions 0 1 for rows 2 3 4, zeros for row 5
    assert (edge.sent.array.tolist(), edge.counts, edge.bounds) == ([3], (2, 1), (0, 5, 8))
    assert edge.source.array.tolist() == [4, 5, 0, 1, 2, 7, 7, 3]
    assert edge.kept.array.tolist() == [2, 3, 4, 7]
    two_rows = Chain(1, shares, ((0, 5, 8), (0, 8)))  # the second row, one segment, follows the first
    assert two_rows.own == [Piece(1, 0, 0, 2, 3), Piece(1, 1, 3, 5, 1), Piece(1, 2, 4, 10, 4)]
    assert (two_rows.edges, two_rows.local_len) == ([0, 5, 8, 16], 8)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 4),
    st.sampled_from(["zigzag", "contiguous", "sp"]),
    st.integers(1, 5), st.booleans(),
)  # fmt: skip
def test_a_piece_reads_what_is_before_it_in_its_segment(lengths, size, kind, taps, packed):
    """Exact, for every rank, cut and number of taps: positions instead of rows, -1 where there is none."""
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    cut = {"sp_size": size} if kind == "sp" else {"cp_size": size, "cp_mode": kind}
    layout = padded_layout(bounds[-1], cu_seqlens=bounds if packed else None, **cut)
    shares = tuple(layouts_of_all_ranks(layout))
    bounds = layout.cu_seqlens or (bounds if bounds[-1] == layout.seq_len else (*bounds, layout.seq_len))
    halos = [halo(Chain(rank, shares, (bounds,)), taps) for rank in range(size)]
    sent = np.concatenate([share.positions()[edge.sent.array] for share, edge in zip(shares, halos, strict=True)])
    for rank, (share, edge) in enumerate(zip(shares, halos, strict=True)):
        own = share.positions()
        assert edge.counts[rank] == edge.sent.array.size
        found = np.concatenate([own, sent, [-1]])[edge.source.array]
        np.testing.assert_array_equal(found[edge.kept.array], own)
        for position, at in zip(own, edge.kept.array, strict=True):
            begin = max(bound for bound in bounds if bound <= position)
            for back in range(1, taps):
                expected = position - back if position - back >= begin else -1
                assert found[at - back] == expected
        assert all(end - begin >= taps - 1 for begin, end in zip(edge.bounds, edge.bounds[1:], strict=False))


@pytest.mark.parametrize("length", [1, 7, 12])
def test_a_stretch_is_an_affine_map_of_the_state(length, monkeypatch):
    """fp32, 1e-5: two stretches composed are the whole, outputs and last state, by the map and by the scan."""
    monkeypatch.setattr(delta, "CHUNK", 4)
    rng = np.random.default_rng(0)
    shapes = [(2, 5), (2, 5), (4, 6), (4,), (4,)]
    q, k, v, g, beta = (rng.standard_normal((1, 2 * length, *shape)).astype("float32") for shape in shapes)
    inputs = delta_inputs(*map(paddle.to_tensor, (q, k, v, -np.abs(g), np.abs(beta) / 3)))
    first, second, both = (chunked(*(x[:, part] for x in inputs)) for part in (
        slice(0, length), slice(length, None), slice(None)))  # fmt: skip
    start = paddle.to_tensor(rng.standard_normal((1, 4, 5, 6)).astype("float32"))

    def after(chunks, before):
        step = state_map(chunks)
        return paddle.matmul(step[..., 6:], before) + step[..., :6]

    middle = after(first, start)
    np.testing.assert_allclose(after(second, middle).numpy(), after(both, start).numpy(), atol=1e-5)
    parts = paddle.concat([outputs_from(first, start), outputs_from(second, middle)], axis=1)
    np.testing.assert_allclose(parts.numpy(), outputs_from(both, start).numpy(), atol=1e-5)


class Gather(PyLayer):
    """A gather of zeros that says when its backward runs."""

    @staticmethod
    def forward(ctx, rows, total, width, said):
        ctx.said, ctx.shape, ctx.width = said, rows.shape, width
        return paddle.zeros([total, *rows.shape[1:]])

    @staticmethod
    def backward(ctx, grad):
        ctx.said.append(ctx.width)
        return paddle.zeros(ctx.shape)


@pytest.mark.parametrize("rank", [0, 1, 62, 63])
def test_ranks_communicate_in_one_order(rank, monkeypatch):
    """Exact: in the backward of every rank the states come before the convolution's rows.

    The last of many ranks sends no state and composes a long chain of them; the first uses none.
    """
    size, said = 64, []

    def gather_rows(xs, rows, group, mode, grad, wants_grad):
        assert wants_grad
        (x,) = xs
        return [Gather.apply(x, rows.total, x.shape[-1], said)]

    monkeypatch.setattr(state, "gather_rows", gather_rows)
    layout = SeqLayout(4 * size, sp_size=size, sp_rank=rank)
    q, v, g = (paddle.rand([1, 4, *shape]) for shape in ((2, 8), (2, 6), (2,)))
    for x in (q, v, g):
        x.stop_gradient = False
    weight = paddle.rand([2 * 16 + 12, 4])
    out = gated_delta_net_sp(
        q, q, v, -g, g, group=FakeGroup(rank, size), layout=layout, conv_weight=weight, method="state"
    )
    out.sum().backward()
    assert said == [6 + 8, 2 * 16 + 12]


def test_shares_of_a_group():
    """Exact: of all ranks, or of the cp ranks with the sp cut undone; the order of their rows."""
    layout = SeqLayout(16, cp_size=2, cp_rank=1, sp_size=2)
    assert [share.local_len for share in shares_of_group(layout, FakeGroup(2, 4))] == [4] * 4
    undone = shares_of_group(layout, FakeGroup(1, 2))
    assert [share.positions().tolist() for share in undone] == [[0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12))]
    assert rows_in_order(undone).in_order.array.tolist() == [0, 1, 2, 3, *range(8, 16), 4, 5, 6, 7]
    with pytest.raises(ValueError, match=r"rank 2 of 4 \(cp_size 2, sp_size 2\), but the group says rank 0 of 4"):
        shares_of_group(layout, FakeGroup(0, 4))
