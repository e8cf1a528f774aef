"""Paddle's flash attention in parts, on a GPU: against full attention in fp32. Skipped where there is none."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp.attention import packed_attention
from paddle_vl_sp.attention.kernels import choose_kernel
from paddle_vl_sp.attention.reference import full_attention

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
@pytest.mark.parametrize("bounds", [(0, 128, 512), (0, 1, 131, 512)])
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
