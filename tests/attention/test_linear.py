"""The gated delta rule and the causal convolution on one process, against the slow way."""

import numpy as np
import paddle
import pytest

from paddle_vl_sp.attention import delta, gated_delta_net_sp, gated_delta_rule
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import recurrent_delta_rule
from paddle_vl_sp.testing import FakeGroup


def arrays(length, batch=1, key_heads=2, value_heads=4):
    rng = np.random.default_rng(0)
    shapes = [(key_heads, 8), (key_heads, 8), (value_heads, 6), (value_heads,), (value_heads,)]
    values = [rng.standard_normal((batch, length, *shape)).astype("float32") for shape in shapes]
    values[3], values[4] = -np.log1p(np.exp(values[3])), 1 / (1 + np.exp(-values[4]))
    return [paddle.to_tensor(value, stop_gradient=False) for value in values]


def out_and_grads(rule, inputs, **options):
    out = rule(*inputs, **options)
    weight = paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype("float32"))
    return [out, *paddle.grad((out * weight).sum(), inputs)]


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("bounds", [None, (0, 5, 6, 29), (0, 29)])
def test_chunked_equals_position_by_position(chunk, bounds, monkeypatch):
    """fp32: 1e-5 relative, output and all five gradients, for chunks that do not divide the segments."""
    monkeypatch.setattr(delta, "CHUNK", chunk)
    inputs = arrays(29, batch=1 if bounds else 2)
    got = out_and_grads(gated_delta_rule, inputs, cu_seqlens=bounds)
    for x, y in zip(got, out_and_grads(recurrent_delta_rule, inputs, cu_seqlens=bounds), strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-5 * float(y.abs().max()))


def by_hand(q, k, v, g, beta, normalize, scale):
    """The docstring's rule in numpy, [S, H, ..] of one sample."""
    if normalize:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    state, outs = np.zeros((v.shape[1], k.shape[-1], v.shape[-1])), []
    for t in range(len(q)):
        state = np.exp(g[t])[:, None, None] * state
        read = np.einsum("hd,hde->he", k[t], state)
        state = state + np.einsum("hd,he->hde", k[t], beta[t][:, None] * (v[t] - read))
        outs.append(scale * np.einsum("hd,hde->he", q[t], state))
    return np.stack(outs)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_options_of_the_delta_rule(normalize, scale):
    """1e-5 absolute, against numpy: unit length or not, the default scale or another; so is the slow rule's default."""
    inputs = [0.2 * x.detach() if i < 2 else x.detach() for i, x in enumerate(arrays(9, key_heads=4))]
    want = by_hand(*(x.numpy()[0] for x in inputs), normalize, 8**-0.5 if scale is None else scale)
    got = [gated_delta_rule(*inputs, normalize=normalize, scale=scale)]
    got += [recurrent_delta_rule(*inputs)] if normalize and scale is None else []
    for out in got:
        np.testing.assert_allclose(out.numpy()[0], want, atol=1e-5)


def test_strong_decay_does_not_overflow():
    """Decays of e^-30 a step: finite; output and gradients within 1e-5 relative or 1e-6 absolute."""
    inputs = arrays(40)
    inputs[3] = paddle.to_tensor(inputs[3].numpy() * 30, stop_gradient=False)
    got, expected = (out_and_grads(rule, inputs) for rule in (gated_delta_rule, recurrent_delta_rule))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y.numpy(), atol=max(1e-5 * float(y.abs().max()), 1e-6))


def test_convolution_is_causal_within_its_segment():
    """1e-6: against a loop over positions and taps."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 9, 2, 3)).astype("float32"), rng.standard_normal((2, 3, 4)).astype("float32")
    for bounds in (None, (0, 1, 3, 9)):
        expected = np.zeros_like(x)
        for t in range(9):
            begin = 0 if bounds is None else max(b for b in bounds if b <= t)
            for back in range(4):
                if t - back >= begin:
                    expected[:, t] += weight[..., 3 - back] * x[:, t - back]
        expected = expected / (1 + np.exp(-expected))
        got = causal_conv(paddle.to_tensor(x), paddle.to_tensor(weight), bounds)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_convolution_in_half_precision(dtype):
    """Output and gradients are those of fp32, from the same numbers, rounded once: exact bits."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 9, 2, 3)), rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 9, 2, 3))
    *inputs, weighting = (paddle.to_tensor(value.astype("float32")).astype(dtype) for value in values)
    exact = [x.astype("float32").detach() for x in inputs]
    results = []
    for x, weight in (inputs, exact):
        x.stop_gradient = weight.stop_gradient = False
        out = causal_conv(x, weight, (0, 1, 3, 9))
        results.append([out, *paddle.grad((out.astype("float32") * weighting.astype("float32")).sum(), [x, weight])])
    for got, want in zip(*results, strict=True):
        assert str(got.dtype).endswith(dtype)
        np.testing.assert_array_equal(got.numpy(), want.astype(dtype).numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["ulysses", "state"])
def test_half_precision_with_rows_of_their_own(method, dtype):
    """2e-2 relative against fp32, output and all gradients; each row of the batch with boundaries of its own."""
    bounds, rng = [(0, 5, 24), (0, 24)], np.random.default_rng(2)
    low = [x.detach().astype(dtype) for x in arrays(24, batch=2)]
    low.append(paddle.to_tensor(rng.standard_normal((56, 4)).astype("float32")).astype(dtype))
    exact = [x.astype("float32") for x in low]

    def attend(q, k, v, g, beta, weight):
        out = gated_delta_net_sp(q, k, v, g, beta, group=None, conv_weight=weight, cu_seqlens=bounds, method=method)
        return out.astype("float32")

    for x in (*low, *exact):
        x.stop_gradient = False
    for x, y in zip(out_and_grads(attend, low), out_and_grads(attend, exact), strict=True):
        np.testing.assert_allclose(x.astype("float32").numpy(), y.numpy(), atol=2e-2 * float(y.abs().max()))


def test_any_delta_rule_is_called_with_the_boundaries():
    """On a group of one nothing moves: the rule sees exactly what was given."""
    inputs, seen = arrays(6), {}

    def rule(q, k, v, g, beta, *, cu_seqlens):
        seen.update(arrays=(q, k, v, g, beta), cu_seqlens=cu_seqlens)
        return v * 2

    out = gated_delta_net_sp(*inputs, group=FakeGroup(0, 1), delta_rule=rule, cu_seqlens=(0, 2, 6))
    assert seen["cu_seqlens"] == (0, 2, 6)
    for got, given in zip(seen["arrays"], inputs, strict=True):
        np.testing.assert_array_equal(got.numpy(), given.numpy())
    np.testing.assert_array_equal(out.numpy(), 2 * inputs[2].numpy())


def test_the_models_own_weight_shape():
    """[channels, 1, K], as a convolution layer holds it, gives the same bits as [channels, K]."""
    inputs = arrays(7)
    weight = paddle.to_tensor(np.random.default_rng(2).standard_normal((2 * 16 + 24, 4)).astype("float32"))
    outs = [gated_delta_net_sp(*inputs, group=FakeGroup(0, 1), conv_weight=w) for w in (weight, weight.unsqueeze(1))]
    np.testing.assert_array_equal(outs[0].numpy(), outs[1].numpy())
