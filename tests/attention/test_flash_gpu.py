"""Paddle's flash attention in parts, on a GPU: against full attention in fp32. Skipped where there is none."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp.attention import packed_attention
from paddle_vl_sp.attention.flash import Flash
from paddle_vl_sp.attention.kernels import choose_kernel
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.schedule import Block

WITHOUT = "needs a Paddle built for CUDA, and a GPU"
HAS_GPU = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


@pytest.fixture
def on_gpu():
    before = paddle.device.get_device()
    paddle.set_device("gpu:0")
    yield
    paddle.set_device(before)


@pytest.mark.skipif(not HAS_GPU, reason=WITHOUT)
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("dtype", "bar"), [("float16", 1e-2), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [(0, 128, 512), (0, 1, 131, 512), tuple(range(0, 513, 16))])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_flash_equals_full_attention(dtype, bar, causal, bounds, scale):
    """fp16 1e-2, bf16 5e-2, relative to the largest value; output and gradients, key heads shared."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((1, 512, heads, 64)).astype("float32") for heads in (8, 2, 2, 8)]
    *low, weight = (paddle.to_tensor(x).astype(dtype) for x in values)
    exact = [x.astype("float32") for x in low]
    for x in (*low, *exact):
        x.stop_gradient = False
    assert choose_kernel(low[0], low[2]).kernel.name == "flash"
    results = []
    for attention, inputs in ((packed_attention, low), (full_attention, exact)):
        out = attention(*inputs, causal=causal, cu_seqlens=bounds, scale=scale)
        results.append([out, *paddle.grad((out * weight.astype(out.dtype)).sum(), inputs)])
    for got, expected in zip(*results, strict=True):
        error = (got.astype("float32") - expected).abs().max() / expected.abs().max()
        assert float(error) < bar


def heads_on_gpu(length=256):
    rng = np.random.default_rng(0)
    shapes = [(1, length, heads, 64) for heads in (8, 2, 2)]
    return [paddle.to_tensor(rng.standard_normal(shape).astype("float32")).astype("bfloat16") for shape in shapes]


@pytest.mark.skipif(not HAS_GPU, reason=WITHOUT)
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("rows", [256, 100])
def test_two_steps_are_one(rows):
    """bf16 2e-2, log-sum-exp 1e-3: keys in two parts, merged by the operator's log-sum-exp; the first rows see both."""
    q, k, v = heads_on_gpu()
    kernel = Flash()
    whole, lse = kernel.forward(None, q, k, v, (Block(0, rows, 0, 256, False),), 0.125)
    part = kernel.forward(None, q, k[:, :96], v[:, :96], (Block(0, rows, 0, 96, False),), 0.125)
    out, joined = kernel.forward(part, q, k[:, 96:], v[:, 96:], (Block(0, rows, 0, 160, False),), 0.125)
    for got, expected, bar in ((out, whole, 2e-2), (joined, lse, 1e-3)):
        error = (got - expected).astype("float32")[:, :rows].abs().max() / expected[:, :rows].abs().max()
        assert float(error) < bar


@pytest.mark.skipif(not HAS_GPU, reason=WITHOUT)
@pytest.mark.usefixtures("on_gpu")
def test_a_forward_is_captured():
    """The same bits from a CUDA graph, after a forward outside it; refused with boundaries that did not run before."""
    from paddle.device.cuda.graphs import CUDAGraph

    q, k, v = heads_on_gpu()
    with paddle.no_grad():
        expected = packed_attention(q, k, v, cu_seqlens=(0, 100, 256))
        graph = CUDAGraph()
        graph.capture_begin()
        out = packed_attention(q, k, v, cu_seqlens=(0, 100, 256))
        with pytest.raises(ValueError, match="a CUDA graph is being captured"):
            packed_attention(q, k, v, cu_seqlens=(0, 101, 256))
        graph.capture_end()
        graph.replay()
    np.testing.assert_array_equal(out.astype("float32").numpy(), expected.astype("float32").numpy())
