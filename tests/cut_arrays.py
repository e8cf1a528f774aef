"""Arrays of a whole sequence, their shares, and the comparison of a share's results with those of the whole."""

import numpy as np
import paddle

TOLERANCE = 1e-5  # fp32, relative to the largest value of each array
GARBAGE = 30.0  # what padding holds: an output that saw it is far off


def bounds_of(lengths):
    return tuple(np.cumsum([0, *lengths]).tolist())


def whole(seed, *shape):
    """The same array on every rank."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def rows_of(layout, lengths):
    """For every local position its place in the sequence before padding, -1 for padding: the slow way."""
    places = {}
    for (start, _), real, first in zip(layout.segments().tolist(), lengths, bounds_of(lengths), strict=False):
        places |= {start + i: first + i for i in range(real)}
    return np.array([places.get(int(p), -1) for p in layout.positions()], dtype=np.int64)


def cut(x, rows, fill=GARBAGE):
    """This rank's share of x [B, S, ...], as a leaf."""
    share = np.where((rows >= 0).reshape([1, -1] + [1] * (x.ndim - 2)), x[:, np.maximum(rows, 0)], np.float32(fill))
    return paddle.to_tensor(share, stop_gradient=False)


def close(got, expected, what):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: {got.shape} against {expected.shape}"
    if not expected.size:
        return
    assert not np.isnan(got).any(), f"{what}: NaN"
    error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-3)
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def same_as_whole(attend, expected_of, arrays, rows, weight, names, padding=GARBAGE):
    """Output and gradients of the local rows against the same rows of the whole."""
    leaves = [paddle.to_tensor(x, stop_gradient=False) for x in arrays]
    expected = expected_of(*leaves)
    expected_grads = paddle.grad((expected * paddle.to_tensor(weight)).sum(), leaves)
    local = [cut(x, rows, padding) for x in arrays]
    out = attend(*local)
    grads = paddle.grad((out * cut(weight, rows, 0.0)).sum(), local)
    real = np.flatnonzero(rows >= 0)
    for name, got, want in zip(["out", *names], [out, *grads], [expected, *expected_grads], strict=True):
        close(got.numpy()[:, real], want.numpy()[:, rows[real]], name)
    for name, grad in zip(names, grads, strict=True):
        seen = np.abs(grad.numpy()[:, rows < 0]).max(initial=0)
        assert seen < 1e-30 or name == "q", f"padding got a gradient of {seen} in {name}"


def attention_arrays(batch, length, heads, kv_heads, width=8, value_width=8):
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    return [whole(seed, batch, length, *shape) for seed, shape in enumerate(shapes)]
