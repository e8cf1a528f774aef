"""A double of Paddle 3.3's flash attention operators, in numpy: what a GPU would run, on a CPU, with what it refuses.

In place of the functions of paddle._C_ops, inside `with FlashDouble() as double`. Names and order of the arguments are
those of the installed Paddle (test_flash_double.py reads its headers). What the operators leave unwritten is NaN here.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import paddle
import pytest

SEED = np.array([7, 9], dtype=np.int64)  # of dropout, which nothing here uses


class FlashDouble:
    def __init__(self, has_padded_lse=False):
        self.calls, self.seen = Counter(), []
        self._has_padded_lse, self._patch = has_padded_lse, pytest.MonkeyPatch()

    def __enter__(self):
        from paddle_vl_sp.attention import kernels

        for name in ("flash_attn", "flash_attn_grad", "flash_attn_unpadded", "flash_attn_unpadded_grad"):
            self._patch.setattr(paddle._C_ops, name, self._counted(name, getattr(self, name)), raising=True)
        self._patch.setattr(kernels, "_flash_obstacles", lambda *_: [])
        return self

    def __exit__(self, *_):
        self._patch.undo()

    def _counted(self, name, operator):
        def call(*args, **kwargs):
            self.calls[name] += 1
            self.seen.append((name, args))
            with not_counted():
                return operator(*args, **kwargs)

        return call

    def flash_attn(
        self, q, k, v, fixed_seed_offset, attn_mask, dropout, causal, return_softmax, is_test, rng_name
    ):  # fmt: skip
        """q [B, Sq, Hq, D] -> out, softmax, softmax_lse [B, Hq, Sq], seed_offset"""
        check_options(fixed_seed_offset, attn_mask, dropout, return_softmax)
        bounds = [np.arange(q.shape[0] + 1) * x.shape[1] for x in (q, k)]
        out, lse = forward(*(flat(x) for x in (q, k, v)), *bounds, q.shape[-1] ** -0.5, causal)
        lse = lse.reshape([q.shape[2], q.shape[0], q.shape[1]]).transpose([1, 0, 2])
        return like(out, q).reshape(q.shape), None, like(lse), on_host()

    def flash_attn_grad(
        self, q, k, v, out, softmax_lse, seed_offset, attn_mask, out_grad, dropout, causal
    ):  # fmt: skip
        check_options(None, attn_mask, dropout)
        check_seed(seed_offset)
        batch, rows, heads, width = q.shape
        assert softmax_lse.shape == [batch, heads, rows]
        bounds = [np.arange(batch + 1) * x.shape[1] for x in (q, k)]
        lse = number(softmax_lse).transpose([1, 0, 2]).reshape([heads, -1])
        flats = [flat(x) for x in (q, k, v, out, out_grad)]
        grads = backward(*flats, lse, *bounds, width**-0.5, causal, q.dtype)
        return tuple(like(grad, q).reshape(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))

    def flash_attn_unpadded(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, fixed_seed_offset, attn_mask, max_seqlen_q, max_seqlen_k,
        scale, dropout, causal, return_softmax, is_test, rng_name, *, out=None,
    ):  # fmt: skip
        """q [rows, Hq, D] -> out, softmax. lse [Hq, rows] and seed_offset only go into the tensors of `out`."""
        check_options(fixed_seed_offset, attn_mask, dropout, return_softmax)
        bounds = check_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        result, lse = forward(number(q), number(k), number(v), *bounds, scale, causal)
        lse = padded(lse, bounds[0], max_seqlen_q) if self._has_padded_lse else lse
        result = like(result, q)
        if out is not None:
            assert len(out) == 4
            for tensor, value in zip(out, (result, None, like(lse), on_host()), strict=True):
                if value is not None:
                    tensor.get_tensor()._share_data_with(value.get_tensor())
        return result, None

    def flash_attn_unpadded_grad(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, out, softmax_lse, seed_offset, attn_mask, out_grad,
        max_seqlen_q, max_seqlen_k, scale, dropout, causal,
    ):  # fmt: skip
        check_options(None, attn_mask, dropout)
        check_seed(seed_offset)
        bounds = check_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert softmax_lse.dtype == paddle.float32
        assert softmax_lse.is_contiguous()
        assert out.shape == out_grad.shape == q.shape
        assert out.dtype == out_grad.dtype == q.dtype
        lse = number(softmax_lse)
        if self._has_padded_lse:
            assert lse.shape == (len(bounds[0]) - 1, q.shape[1], max_seqlen_q)
            lse = np.concatenate([x[:, :n] for x, n in zip(lse, np.diff(bounds[0]), strict=True)], axis=1)
        assert lse.shape == (q.shape[1], q.shape[0])
        grads = backward(*(number(x) for x in (q, k, v, out, out_grad)), lse, *bounds, scale, causal, q.dtype)
        return tuple(like(grad, q) for grad in grads)


def forward(q, k, v, bounds_q, bounds_k, scale, causal):
    """q [rows, Hq, D], k and v [keys, Hk, D] -> out [rows, Hq, D] and lse [Hq, rows]; float64."""
    out, lse = np.full(q.shape, np.nan), np.full((q.shape[1], q.shape[0]), np.nan)
    for rows, cols in segments(bounds_q, bounds_k):
        if cols.stop == cols.start:
            continue
        scores = masked_scores(q[rows], k[cols], scale, causal)
        with np.errstate(divide="ignore", invalid="ignore"):
            top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), -1e300)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            of_heads = np.einsum("hqk,khd->qhd", weights / np.where(total == 0, 1, total), of_queries(v[cols], q))
            out[rows] = of_heads
            lse[:, rows] = np.where(total == 0, np.inf, top + np.log(total))[..., 0]
    return out, lse


def backward(q, k, v, out, grad, lse, bounds_q, bounds_k, scale, causal, dtype):
    """The gradients of q, k and v, float64; those of k and v summed over heads that share them, each rounded before."""
    grad_q, grad_k, grad_v = (np.full(x.shape, np.nan) for x in (q, k, v))
    for rows, cols in segments(bounds_q, bounds_k):
        if rows.stop == rows.start or cols.stop == cols.start:
            continue
        weights = np.exp(masked_scores(q[rows], k[cols], scale, causal) - lse[:, rows, None])  # [Hq, rows, keys]
        shared = (grad[rows] * out[rows]).sum(-1).T[..., None]  # [Hq, rows, 1]
        grad_weights = np.einsum("qhd,khd->hqk", grad[rows], of_queries(v[cols], q))
        grad_scores = weights * (grad_weights - shared) * scale
        grad_q[rows] = np.einsum("hqk,khd->qhd", grad_scores, of_queries(k[cols], q))
        grad_k[cols] = summed(np.einsum("hqk,qhd->khd", grad_scores, q[rows]), k.shape[1], dtype)
        grad_v[cols] = summed(np.einsum("hqk,qhd->khd", weights, grad[rows]), k.shape[1], dtype)
    return grad_q, grad_k, grad_v


def segments(bounds_q, bounds_k):
    for i in range(len(bounds_q) - 1):
        yield slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])


def masked_scores(q, k, scale, causal):
    """[Hq, rows, keys]; causal is bottom-right: the last query sees all keys."""
    scores = np.einsum("qhd,khd->hqk", q, of_queries(k, q)) * scale
    if causal:
        row, col = np.ogrid[: q.shape[0], : k.shape[0]]
        scores[:, col - row > k.shape[0] - q.shape[0]] = -np.inf
    return scores


def of_queries(x, q):
    return np.repeat(x, q.shape[1] // x.shape[1], axis=1)


def summed(x, kv_heads, dtype):
    return number(like(x, dtype)).reshape([x.shape[0], kv_heads, -1, x.shape[2]]).sum(axis=2)


def padded(lse, bounds, longest):
    """[Hq, rows] -> [segments, Hq, longest], NaN where a segment is shorter"""
    result = np.full((len(bounds) - 1, lse.shape[0], longest), np.nan)
    for i, (begin, end) in enumerate(pairwise(bounds)):
        result[i, :, : end - begin] = lse[:, begin:end]
    return result


def check_options(fixed_seed_offset, attn_mask, dropout, return_softmax=False):
    assert fixed_seed_offset is None
    assert attn_mask is None
    assert dropout == 0.0
    assert not return_softmax  # only with dropout


def check_seed(seed_offset):
    """It is read on the host."""
    assert seed_offset.place.is_cpu_place()
    assert (seed_offset.shape, seed_offset.dtype) == ([2], paddle.int64)


def check_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert all(x.ndim == 3 and x.is_contiguous() and x.dtype == q.dtype for x in (q, k, v))
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    assert q.shape[1] % k.shape[1] == 0
    bounds = []
    for x, edges, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert edges.dtype == paddle.int32
        assert isinstance(longest, int)
        edges = edges.numpy().astype(np.int64)
        assert (edges[0], edges[-1]) == (0, x.shape[0])
        assert np.diff(edges).max() <= longest
        bounds.append(edges)
    assert len(bounds[0]) == len(bounds[1]) > 1
    return bounds


def flat(x):
    assert x.is_contiguous()
    return number(x).reshape([-1, *x.shape[2:]])


def number(x):
    return x.astype("float32").numpy().astype(np.float64)


def like(value, x=paddle.float32):
    """A tensor of x's dtype."""
    dtype = x.dtype if isinstance(x, paddle.Tensor) else x
    return paddle.to_tensor(value.astype("float32")).astype(dtype)


def on_host():
    return paddle.to_tensor(SEED, place=paddle.CPUPlace())


class counted_operators:  # noqa: N801
    """Paddle operators called inside, with their names, without views. On a GPU each is at least one launch."""

    VIEWS = (
        "reshape",
        "reshape2",
        "transpose2",
        "slice",
        "squeeze2",
        "unsqueeze2",
        "flatten",
        "split",
        "empty",
        "unbind",
    )

    def __enter__(self):
        paddle.set_flags({"FLAGS_low_precision_op_list": 1})
        paddle.base.core.clear_low_precision_op_list()
        self.names = {}
        return self

    def __exit__(self, *_):
        found = paddle.base.core.get_low_precision_op_list()
        self.names = {name: sum(int(number) for number in counts.split(",")) for name, counts in found.items()}
        paddle.set_flags({"FLAGS_low_precision_op_list": 0})

    @property
    def total(self):
        return sum(number for name, number in self.names.items() if name not in self.VIEWS)


class not_counted:  # noqa: N801
    def __enter__(self):
        self._flag = paddle.get_flags("FLAGS_low_precision_op_list")
        paddle.set_flags({"FLAGS_low_precision_op_list": 0})

    def __exit__(self, *_):
        paddle.set_flags(self._flag)
