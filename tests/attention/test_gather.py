"""Attention over gathered keys on one process: the rows at a time, the flashmask path on a double, refusals."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle.base import core

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import by_rows, flashmask, gather, gather_attention
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.visible import row_bounds, visible_rows
from paddle_vl_sp.testing import FakeGroup

TWO = FakeGroup(1, 2)
HALF = SeqLayout(8, cp_size=2, cp_rank=1)


def arrays(batch=2, length=37, heads=6, kv_heads=2, width=8, value_width=5, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width)]
    values = [scale * rng.standard_normal((batch, length, *shape)).astype("float32") for shape in shapes]
    return [paddle.to_tensor(value, stop_gradient=False) for value in values]


def out_and_grads(attention, inputs):
    out = attention(*inputs)
    weight = paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype("float32"))
    return [out, *paddle.grad((out.astype("float32") * weight).sum(), inputs)]


def check_close(got, expected, bar=1e-5):
    for x, y in zip(got, expected, strict=True):
        x = x.astype("float32").numpy()
        np.testing.assert_allclose(x, y.numpy(), atol=bar * float(y.abs().max()))


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, (0, 1, 18, 37), (0, 18)], ids=["one", "packed", "tail"])
def test_rows_at_a_time_equal_full_attention(bounds, causal, rows, monkeypatch):
    """fp32: 1e-5 relative, output and gradients, B 2, key heads shared, for chunks that do not divide the length."""
    monkeypatch.setattr(by_rows, "MOST_ROWS", rows)
    inputs = arrays()
    whole = (*bounds, 37) if bounds == (0, 18) else bounds
    got = out_and_grads(
        partial(gather_attention, layout=SeqLayout(37), group=None, causal=causal, boundaries=bounds), inputs
    )
    check_close(got, out_and_grads(partial(full_attention, causal=causal, cu_seqlens=whole), inputs))


@pytest.mark.parametrize("limit", [1, 37 * 6 * 2 * 5])
def test_scores_in_memory_are_bounded(limit, monkeypatch):
    """Exact: as few rows at a time as the limit says, at least one; all rows in order."""
    monkeypatch.setattr(by_rows, "SCORES", limit)
    q = arrays()[0]
    chunks = list(by_rows._chunks(visible_rows(SeqLayout(37), True, None, q.place), q))
    step = 1 if limit == 1 else 5
    assert [(c.rows.start, c.rows.stop) for c in chunks] == [(i, min(i + step, 37)) for i in range(0, 37, step)]
    assert all(c.keys == slice(0, c.rows.stop) for c in chunks)


def test_keys_that_no_row_of_a_chunk_sees_are_not_computed():
    """Exact: queries of the last segment multiply with its keys alone."""
    q = arrays(1, 512)[0]
    chunks = list(by_rows._chunks(visible_rows(SeqLayout(512), True, ((0, 256, 512),), q.place), q))
    assert [c.keys for c in chunks] == [slice(0, 256), slice(256, 512)]


def test_worked_example():
    """The example of the docstring."""
    visible = visible_rows(SeqLayout(8, cp_size=2, cp_rank=1), True, ((0, 4, 8),), paddle.CPUPlace())
    assert visible.begin.tolist() == [[0, 0, 0, 1, 2, 3, 4, 4]]
    assert visible.end.tolist() == [[2, 2, 2, 2, 4, 4, 4, 4]]


def test_large_scores_do_not_overflow():
    """Scores of some hundreds, far over what exp holds in fp32: 1e-4 relative, no NaN."""
    inputs = arrays(scale=12.0)
    got = out_and_grads(partial(gather_attention, layout=SeqLayout(37), group=None), inputs)
    check_close(got, out_and_grads(full_attention, inputs), 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    """One rounding of the fp32 result: 2e-2 of the largest value covers bf16's 2^-8."""
    low = [x.astype(dtype).detach() for x in arrays()]
    exact = [x.astype("float32") for x in low]
    for x in (*low, *exact):
        x.stop_gradient = False
    got = out_and_grads(partial(gather_attention, layout=SeqLayout(37), group=None), low)
    assert all(str(x.dtype).endswith(dtype) for x in got)
    check_close(got, out_and_grads(full_attention, exact), 2e-2)


@pytest.mark.parametrize("needing", ["v", "q", "kv", ""])
def test_only_those_that_need_a_gradient_get_one(needing):
    """Exact: which gradients exist."""
    inputs = dict(zip("qkv", arrays(), strict=True))
    for name, x in inputs.items():
        x.stop_gradient = name not in needing
    out = gather_attention(*inputs.values(), layout=SeqLayout(37), group=None)
    assert out.stop_gradient == (not needing)
    if needing:
        out.sum().backward()
    assert [name for name, x in inputs.items() if x.grad is not None] == [n for n in "qkv" if n in needing]


def test_a_second_gradient_is_refused():
    """By the name of the layer, before anything is sent."""
    inputs = arrays()
    out = gather_attention(*inputs, layout=SeqLayout(37), group=None)
    with pytest.raises(OSError, match="GatherAttention has no second gradient"):
        paddle.grad((out * out).sum(), inputs, create_graph=True)


def test_a_graph_dropped_without_backward_is_freed():
    """Exact: forward again and again, as in evaluation with gradients on, keeps no memory."""
    inputs, held = arrays(), []
    for _ in range(4):
        gather_attention(*(x * 1 for x in inputs), layout=SeqLayout(37), group=None)
        held.append(paddle.base.core.host_memory_stat_current_value("Allocated", 0))
    assert held[1:] == [held[0]] * 3


class Flashmask:
    """paddle.nn.functional.flashmask_attention by its documentation, in plain Paddle: a dense mask, full softmax."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, startend_row_indices, *, causal):
        assert not causal
        batch, length, heads, width = key.shape
        assert startend_row_indices.dtype == paddle.int32
        assert startend_row_indices.shape == [batch, 1, length, 2]
        assert all(x.is_contiguous() for x in (query, key, value, startend_row_indices))
        self.calls += 1
        mask = np.zeros([batch, 1, query.shape[1], length], "float32")
        for b, row in enumerate(startend_row_indices.numpy()[:, 0]):
            for j, (lower_begin, upper_end) in enumerate(row):
                mask[b, 0, lower_begin:, j] = -1e30
                mask[b, 0, :upper_end, j] = -1e30
        key, value = (paddle.repeat_interleave(x, query.shape[2] // heads, axis=2) for x in (key, value))
        scores = paddle.einsum("bqhd,bkhd->bhqk", query, key) * width**-0.5 + paddle.to_tensor(mask)
        sees = paddle.to_tensor((mask == 0).any(axis=-1, keepdims=True).astype("float32"))  # else 0, as flashmask
        return paddle.einsum("bhqk,bkhd->bqhd", paddle.nn.functional.softmax(scores, -1) * sees, value)


MASKS = {
    "one sequence": {},
    "packed": {"boundaries": (0, 5, 16)},
    "own boundaries": {"boundaries": [(0, 5, 16), (0, 11)]},
    "not causal": {"boundaries": (0, 5, 16), "causal": False},
    "scale": {"scale": 0.7},
    "any mask": {"startend_row_indices": paddle.to_tensor([[16] * 4 + [9] * 5 + [16] * 7, [3] * 16], "int32")},
}


@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize("name", MASKS)
def test_the_flashmask_path_on_a_double(name, rank, monkeypatch):
    """What a GPU would run, in fp32, equals the plain path to 1e-5: on one process, and a rank's half of the queries.

    The double refuses what flashmask would. The real one is not run here.
    """
    options = {"causal": True, "scale": None} | MASKS[name]
    if "startend_row_indices" in options:
        options["startend_row_indices"] = options["startend_row_indices"].reshape([2, 1, 16, 1])
    layout = SeqLayout(16) if rank is None else SeqLayout(16, cp_size=2, cp_rank=rank)
    whole = arrays(length=16, value_width=8)
    mine = paddle.to_tensor(layout.positions())

    def attend(q, k, v):
        """This rank's queries with all keys, as after the gather."""
        monkeypatch.setattr(gather._Call, "whole", lambda _, *shares: [k.detach(), v.detach()])
        monkeypatch.setattr(gather._Call, "own_sum", lambda _, *grads: [paddle.gather(x, mine, axis=1) for x in grads])
        share = [paddle.gather(x, mine, axis=1) for x in (q, k, v)]
        return gather_attention(*share, layout=layout, group=rank if rank is None else FakeGroup(rank, 2), **options)

    expected = out_and_grads(attend, whole)
    double = Flashmask()
    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", double)
    monkeypatch.setattr(flashmask, "can_run", lambda *_: True)
    check_close(out_and_grads(attend, whole), [x.astype("float32") for x in expected])
    assert double.calls == 2  # forward, and once more in the backward


def qkv(rows=4, batch=1):
    return [paddle.zeros([batch, rows, heads, 8]) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": FakeGroup(0, 2)}, "cut is that of rank 1 of 2 .*, but the group says rank 0 of 2"),
        ({"group": None}, "cut is that of rank 1 of 2 .*, but the group says rank 0 of 1"),
        ({"layout": SeqLayout(16, cp_size=2, cp_rank=1)}, "q has 4 rows, the layout's share of this rank is 8"),
        ({"boundaries": [(0, 8)] * 2}, "boundaries of 2 rows for a batch of 1"),
        ({"boundaries": (0, 5, 9)}, "cu_seqlens ends at 9, but seq_len is 8"),
        ({"boundaries": (1, 8)}, "cu_seqlens must start at 0"),
        ({"boundaries": ()}, "cu_seqlens must start at 0, got"),
        ({"startend_row_indices": paddle.zeros([1, 1, 4, 1], "int32")}, r"must be \[1, 1, 8, 1\].*got \[1, 1, 4, 1\]"),
        (
            {"startend_row_indices": paddle.zeros([1, 1, 8, 1], "int32"), "causal": False},
            "stand for causal attention and in place of boundaries, got causal=False",
        ),
    ],
)  # fmt: skip
def test_refusals(options, words):
    """Before anything is sent: FakeGroup cannot send. The message names what was got and what was expected."""
    with pytest.raises(ValueError, match=words):
        gather_attention(*qkv(), **({"layout": HALF, "group": TWO} | options))


def test_a_packed_layout_is_one_row():
    """Refused with the batch size, as by the ring."""
    packed = SeqLayout(8, cp_size=2, cp_rank=1, cu_seqlens=(0, 4, 8))
    with pytest.raises(ValueError, match="one packed row, B = 1, got B = 2"):
        gather_attention(*qkv(batch=2), layout=packed, group=TWO)


def test_boundaries_of_rows():
    """Exact: one list for all rows or one for each, numpy's integers too; what follows the last is a segment."""
    assert row_bounds(None, 2, 8) is None
    assert row_bounds((0, 3, 8), 2, 8) == ((0, 3, 8),)
    assert row_bounds(np.array([0, 3]), 2, 8) == ((0, 3, 8),)
    assert row_bounds([(0, 3), np.array([0, 8])], 2, 8) == ((0, 3, 8), (0, 8))


def test_masks_on_the_host_cannot_be_captured(monkeypatch):
    """Refused with what to do, on a GPU alone."""
    q = SimpleNamespace(place=SimpleNamespace(is_gpu_place=lambda: True), dtype=paddle.float32, shape=[1, 8, 4, 8])
    monkeypatch.setattr(core, "is_cuda_graph_capturing", lambda: True)
    visible = visible_rows(SeqLayout(8), True, None, paddle.CPUPlace())
    with pytest.raises(ValueError, match=r"gather_attention of paddle\.float32, heads of 8, has its mask on the host"):
        list(by_rows._chunks(visible, q))
    assert list(by_rows._chunks(visible, paddle.zeros(q.shape)))


def test_flashmask_is_not_called_without_queries(monkeypatch):
    """Exact: a rank without positions has an empty output and zeros as gradients of all keys and values."""
    monkeypatch.setattr(paddle.nn.functional, "flashmask_attention", None)
    q, k, v = (paddle.rand([2, length, 2, 8]) for length in (0, 5, 5))
    layout = SeqLayout(5, cp_size=6, cp_rank=5, cp_mode="contiguous", remainder="front")
    visible = visible_rows(layout, True, None, q.place)
    out, lse = flashmask.forward(q, k, v, visible, 0.5)
    assert out.shape == [2, 0, 2, 8]
    grads = flashmask.backward(out, q, k, v, out, lse, visible, 0.5)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
    assert not any(x.abs().sum() for x in grads[1:])
