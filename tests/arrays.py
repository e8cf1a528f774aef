"""Tensors drawn at random, and comparison by bits."""

import numpy as np
import paddle


def drawn(shape, dtype="float32", seed=0, stop_gradient=True):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    tensor = paddle.to_tensor(x).astype(dtype)
    tensor.stop_gradient = stop_gradient
    return tensor


def leaf(x):
    x.stop_gradient = False
    return x


def same_bits(a, b):
    """Arrays, tensors, numbers, and containers of them: the same dtypes, shapes and bytes; NaN equals the same NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
