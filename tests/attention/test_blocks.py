"""Attention in parts: the kernels, how parts are merged, and which kernel serves."""

import re

import numpy as np
import paddle
import pytest

from paddle_vl_sp.attention import blocks, kernels, packed_attention
from paddle_vl_sp.attention.blocks import Blockwise, merge
from paddle_vl_sp.attention.flash import Flash
from paddle_vl_sp.attention.kernels import choose_kernel
from paddle_vl_sp.attention.reference import full_attention


def arrays(length, heads, kv_heads, width=8, value_width=8, batch=1, scale=1.0, dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = [(batch, length, heads, width), (batch, length, kv_heads, width), (batch, length, kv_heads, value_width)]
    tensors = [paddle.to_tensor(scale * rng.standard_normal(shape).astype("float32")).astype(dtype) for shape in shapes]
    for x in tensors:
        x.stop_gradient = False
    return tensors


def out_and_grads(attention, inputs, **options):
    out = attention(*inputs, **options)
    weight = paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype("float32"))
    return [out, *paddle.grad((out.astype("float32") * weight).sum(), inputs)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 18, 37)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_blockwise_equals_full_attention(causal, cu_seqlens, heads, monkeypatch):
    """fp32: 1e-5 relative, output and gradients, with tiles that do not divide the length."""
    monkeypatch.setattr(blocks, "TILE", 16)
    inputs = arrays(37, *heads, value_width=5, batch=1 if cu_seqlens else 2)
    got = out_and_grads(packed_attention, inputs, causal=causal, cu_seqlens=cu_seqlens)
    expected = out_and_grads(full_attention, inputs, causal=causal, cu_seqlens=cu_seqlens)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-5 * float(y.abs().max()))


def test_large_scores_do_not_overflow(monkeypatch):
    """Scores of some hundreds, far over what exp holds in fp32: 1e-4 relative, no NaN, over many tiles."""
    monkeypatch.setattr(blocks, "TILE", 8)
    inputs = arrays(40, 2, 2, scale=12.0)
    got, expected = (out_and_grads(f, inputs) for f in (packed_attention, full_attention))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-4 * float(y.abs().max()))


def test_bfloat16_in_and_out_computed_in_float32():
    """bf16: one rounding of the fp32 result (2^-8 relative)."""
    inputs = arrays(24, 4, 2, dtype="bfloat16")
    got = out_and_grads(packed_attention, inputs)
    exact = [x.astype("float32").detach() for x in inputs]
    for x in exact:
        x.stop_gradient = False
    for x, y in zip(got, out_and_grads(full_attention, exact), strict=True):
        assert x.dtype == paddle.bfloat16
        np.testing.assert_allclose(x.astype("float32").numpy(), y.numpy(), atol=2e-2 * float(y.abs().max()))


def test_merging_is_softmax_over_both():
    """1e-6: in either order, and into nothing."""
    rng = np.random.default_rng(0)
    scores = paddle.to_tensor(3 * rng.standard_normal((2, 5, 4, 12)).astype("float32"))  # [B, Sq, H, Sk]
    values = paddle.to_tensor(rng.standard_normal((12, 6)).astype("float32"))
    expected = paddle.matmul(paddle.nn.functional.softmax(scores, -1), values)
    parts = [
        (
            paddle.matmul(paddle.nn.functional.softmax(scores[..., cols], -1), values[cols]),
            scores[..., cols].logsumexp(-1, keepdim=True),
        )
        for cols in (slice(0, 5), slice(5, 6), slice(6, 12))
    ]
    for order in ([0, 1, 2], [2, 0, 1]):
        out, lse = paddle.zeros([2, 5, 4, 6]), paddle.full([2, 5, 4, 1], blocks.NO_KEY)
        for i in order:
            out, lse = merge(out, lse, *parts[i])
        np.testing.assert_allclose(out.numpy(), expected.numpy(), atol=1e-6)
        np.testing.assert_allclose(lse.numpy(), scores.logsumexp(-1, keepdim=True).numpy(), atol=1e-5)


class Described:
    """A tensor as the choice of kernel sees it."""

    def __init__(self, width=128, dtype=paddle.bfloat16, gpu=True):
        self.shape, self.dtype, self.place = [1, 256, 8, width], dtype, Place(gpu)


class Place:
    def __init__(self, gpu):
        self.is_gpu_place = lambda: gpu
        self.text = "Place(gpu:0)" if gpu else "Place(cpu)"

    def __str__(self):
        return self.text


def test_flash_serves_where_it_can(monkeypatch):
    """The choice and the reason for it, by descriptions of tensors: no GPU is needed."""
    monkeypatch.setattr(kernels, "_capability", lambda _: (9, 0))
    chosen = choose_kernel(Described(), Described())
    assert isinstance(chosen.kernel, Flash)
    assert str(chosen).startswith("flash: paddle.bfloat16 on Place(gpu:0), heads of 128")


@pytest.mark.parametrize(
    ("q", "v", "reason"),
    [
        (Described(gpu=False), Described(), "Place.cpu., flash attention needs a GPU"),
        (Described(), Described(), r"the GPU is older than compute capability 8\.0"),
        (Described(dtype=paddle.float32), Described(), "dtype is float32, flash attention needs float16 or"),
        (Described(), Described(width=64), "heads are 128 wide in q and k, 64 in v"),
        (Described(width=288), Described(width=288), "heads are 288 wide: flash takes multiples of 8 up to 256"),
    ],
)
def test_blockwise_serves_elsewhere_and_says_why(q, v, reason, monkeypatch):
    """The choice and the reason for it, one for each obstacle."""
    monkeypatch.setattr(kernels, "_capability", lambda _: (7, 5) if "capability" in reason else (9, 0))
    chosen = choose_kernel(q, v)
    assert isinstance(chosen.kernel, Blockwise)
    assert re.search(reason, str(chosen))


@pytest.mark.parametrize("needing", ["v", "q", "kv", ""])
def test_only_those_that_need_a_gradient_get_one(needing):
    """The same bits as where all need one; without any, and under no_grad, there is no graph."""
    inputs = arrays(12, 4, 2)
    expected = dict(zip("qkv", out_and_grads(packed_attention, inputs)[1:], strict=True))
    for name, x in zip("qkv", inputs, strict=True):
        x.stop_gradient = name not in needing
    out = packed_attention(*inputs)
    assert out.stop_gradient == (not needing)
    if needing:
        weight = paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype("float32"))
        (out * weight).sum().backward()
    for name, x in zip("qkv", inputs, strict=True):
        assert (x.grad is not None) == (name in needing)
        if name in needing:
            np.testing.assert_array_equal(x.grad.numpy(), expected[name].numpy())
    with paddle.no_grad():
        assert packed_attention(*inputs).stop_gradient


def test_a_graph_dropped_without_backward_is_freed():
    """Exact: forward again and again, as in evaluation with gradients on, keeps no memory."""
    inputs = arrays(64, 4, 2)
    held = []
    for _ in range(4):
        packed_attention(*(x * 1 for x in inputs))
        held.append(paddle.base.core.host_memory_stat_current_value("Allocated", 0))
    assert held[1:] == [held[0]] * 3
