"""The GPU branches of attention on a double of Paddle's flash attention: results, arguments, launches, refusals."""

import re
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_double import FlashDouble, backward, counted_operators, forward
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import flash, gather_attention, kernels, packed_attention, ring, ring_attention
from paddle_vl_sp.attention.flash import Flash
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.schedule import Block
from paddle_vl_sp.attention.spans import ROOM, ROUNDED, spans
from paddle_vl_sp.backends import copies
from paddle_vl_sp.testing import FakeGroup

HEADERS = Path(paddle.sysconfig.get_include()) / "paddle"


def arrays(length, heads=4, kv_heads=2, batch=1, width=8, dtype="float32"):
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((batch, length, n, width)).astype("float32") for n in (heads, kv_heads, kv_heads)]
    tensors = [paddle.to_tensor(value).astype(dtype) for value in values]
    for x in tensors:
        x.stop_gradient = False
    return tensors


def out_and_grads(attention, inputs):
    out = attention(*inputs)
    weight = paddle.to_tensor(np.random.default_rng(1).standard_normal(out.shape).astype("float32"))
    return [out, *paddle.grad((out.astype("float32") * weight).sum(), inputs)]


def check_close(got, expected, bar):
    for x, y in zip(got, expected, strict=True):
        x, y = x.astype("float32").numpy(), y.astype("float32").numpy()
        np.testing.assert_allclose(x, y, atol=bar * np.abs(y).max())


# the double


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_the_double_is_attention(heads, causal):
    """1e-6 in float64, output, log-sum-exp and gradients; two segments, by the fixed operator and the varlen one."""
    q, k, v = arrays(5, *heads, batch=2)
    exact = out_and_grads(partial(full_attention, causal=causal), [q, k, v])
    weight = np.random.default_rng(1).standard_normal(q.shape).astype("float32")
    bounds = np.array([0, 5, 10])
    flat = [x.numpy().reshape([10, *x.shape[2:]]).astype("float64") for x in (q, k, v)]
    out, lse = forward(*flat, bounds, bounds, 8**-0.5, causal)
    grads = backward(*flat, out, weight.reshape(out.shape), lse, bounds, bounds, 8**-0.5, causal, paddle.float32)
    for got, want in zip([out, *grads], exact, strict=True):
        np.testing.assert_allclose(got, want.numpy().reshape(got.shape), atol=1e-5)
    with FlashDouble():
        result, _, fixed_lse, seed = paddle._C_ops.flash_attn(q, k, v, None, None, 0.0, causal, False, True, "")
        fixed = paddle._C_ops.flash_attn_grad(
            q, k, v, result, fixed_lse, seed, None, paddle.to_tensor(weight), 0.0, causal
        )
    np.testing.assert_allclose(fixed_lse.numpy()[1], lse[:, 5:], atol=1e-6)
    check_close([result, *fixed], exact, 1e-5)


def test_the_double_is_causal_from_the_last_key():
    """Exact: of 2 queries and 4 keys the first sees 3, the last all; 4 queries and 2 keys: the first two see none."""
    rng = np.random.default_rng(0)
    long, short = rng.standard_normal((4, 1, 8)), rng.standard_normal((2, 1, 8))
    out, _ = forward(short, long, long, [0, 2], [0, 4], 1.0, True)
    first, _ = forward(short[:1], long[:3], long[:3], [0, 1], [0, 3], 1.0, False)
    np.testing.assert_allclose(out[:1], first)
    out, lse = forward(long, short, short, [0, 4], [0, 2], 1.0, True)
    assert np.isposinf(lse[0]).tolist() == [True, True, False, False]
    assert not out[:2].any()


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_grad", "flash_attn_unpadded", "flash_attn_unpadded_grad"])
def test_the_double_takes_paddles_arguments(name):
    """Exact: the names and their order, as the installed Paddle's headers have them."""
    words = "".join(word.capitalize() for word in name.split("_"))
    header = (HEADERS / "fluid/pir/dialect/operator/ir/pd_op.h").read_text()
    built = re.search(rf"class\s+{words}Op .*?void Build\((.*?)\);", header, re.DOTALL)[1]
    expected = [re.split(r"[\s&]+", each.split("=")[0].strip())[-1].rstrip("_") for each in built.split(",")[2:]]
    own = getattr(FlashDouble, name).__code__
    assert list(own.co_varnames[1 : own.co_argcount]) == expected


def test_the_forms_of_the_log_sum_exp_are_paddles():
    """Exact: the two forms in the installed Paddle's header, by segments padded or not."""
    header = (HEADERS / "phi/kernels/gpu/flash_attn_utils.h").read_text()
    line = re.sub(r"\s+", " ", re.search(r"softmax_lse_dims = .*?;", header, re.DOTALL)[0])
    assert "unpadded_lse ? std::vector<int64_t>{num_heads, total_q}" in line
    assert "{ batch_size, num_heads, max_seqlen_q}" in line


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="the operators run here")
def test_paddle_takes_the_kernels_arguments():
    """Paddle's own binding reads all that the kernel passes, and misses nothing but the GPU's code."""
    inputs = arrays(16)
    with FlashDouble() as double:
        out_and_grads(packed_attention, inputs)
    (_, args), (_, gradient) = double.seen
    results = tuple(paddle.empty([0]) for _ in range(4))
    with pytest.raises(RuntimeError, match="kernel `flash_attn_unpadded` is not registered"):
        paddle._C_ops.flash_attn_unpadded(*args, out=results)
    with pytest.raises(RuntimeError, match="kernel `flash_attn_unpadded_grad` is not registered"):
        paddle._C_ops.flash_attn_unpadded_grad(*gradient)
    with pytest.raises(ValueError, match="out argument must be a tuple with 4 elements"):
        paddle._C_ops.flash_attn_unpadded(*args, out=results[:2])


def test_out_gets_the_results_that_an_operator_does_not_return():
    """1e-6: group_norm returns no mean either, and out= gets it, whatever shape it had: the log-sum-exp's way."""
    x = paddle.rand([2, 4, 3])
    results = tuple(paddle.empty([0]) for _ in range(3))
    returned = paddle._C_ops.group_norm(x, None, None, 1e-5, 2, "NCHW", out=results)
    assert isinstance(returned, paddle.Tensor)
    np.testing.assert_allclose(results[1].numpy(), x.numpy().reshape([2, 2, -1]).mean(-1), atol=1e-6)


# results


@pytest.mark.parametrize("has_padded_lse", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bounds", [None, (0, 1, 18, 37), (0, 3, 4, 20, 37)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_packed_attention(heads, bounds, causal, scale, has_padded_lse):
    """fp32: 1e-5 relative, output and gradients; one call each way."""
    inputs = arrays(37, *heads, batch=1 if bounds else 2)
    with FlashDouble(has_padded_lse) as double:
        got = out_and_grads(partial(packed_attention, causal=causal, scale=scale, cu_seqlens=bounds), inputs)
    check_close(
        got, out_and_grads(partial(full_attention, causal=causal, scale=scale, cu_seqlens=bounds), inputs), 1e-5
    )
    assert double.calls == {"flash_attn_unpadded": 1, "flash_attn_unpadded_grad": 1}


@pytest.mark.parametrize(("dtype", "bar"), [("float16", 3e-3), ("bfloat16", 2e-2)])
def test_half_precision(dtype, bar):
    """fp16 3e-3, bf16 2e-2: the operator's inputs are the caller's, bit for bit, with any scale; so is its output."""
    inputs = arrays(37, dtype=dtype)
    attention = partial(packed_attention, scale=0.3, cu_seqlens=(0, 9, 37))
    with FlashDouble() as double:
        got = out_and_grads(attention, inputs)
    assert all(str(x.dtype).endswith(dtype) for x in got)
    for _, args in double.seen:
        for x, own in zip(args[:3], inputs, strict=True):
            assert (x.numpy() == own.numpy().reshape(x.shape)).all()
    exact = [x.astype("float32").detach() for x in inputs]
    for x in exact:
        x.stop_gradient = False
    check_close(got, out_and_grads(partial(full_attention, scale=0.3, cu_seqlens=(0, 9, 37)), exact), bar)
    (_, _), (_, gradient) = double.seen
    assert (gradient[5].numpy() == got[0].numpy().reshape(gradient[5].shape)).all()


def test_strided_inputs():
    """fp32: 1e-5: q, k and v as slices of one projection."""
    whole = paddle.to_tensor(np.random.default_rng(0).standard_normal((2, 12, 8, 8)).astype("float32"))
    inputs = [x.detach() for x in whole.split([4, 2, 2], axis=2)]
    for x in inputs:
        x.stop_gradient = False
    with FlashDouble():
        got = out_and_grads(packed_attention, inputs)
    check_close(got, out_and_grads(full_attention, inputs), 1e-5)


def test_the_seed_is_one_tensor_on_the_host():
    """Exact: the same tensor in every backward, so nothing is copied from the device."""
    with FlashDouble() as double:
        for _ in range(2):
            out_and_grads(packed_attention, arrays(8))
    seeds = [args[7] for name, args in double.seen if name == "flash_attn_unpadded_grad"]
    assert len(seeds) == 2
    assert seeds[0] is seeds[1] is flash._no_seed()
    assert seeds[0].place.is_cpu_place()


@pytest.mark.parametrize("kind", ["ring", "gather"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_wide_heads_without_a_backward_are_refused_before_the_forward(capability, kind, monkeypatch):
    """By the capability; not without gradients, nor up to 192. FakeGroup could not send."""
    monkeypatch.setattr(kernels, "_capability", lambda _: capability)
    layout = SeqLayout(16, cp_size=2, cp_rank=1)
    function = ring_attention if kind == "ring" else gather_attention
    attention = partial(function, layout=layout, group=FakeGroup(1, 2))
    refused = capability in ((8, 6), (8, 7), (8, 9))
    with (
        FlashDouble() as double,
        mock.patch.object(ring, "pass_on", side_effect=ConnectionError),
        mock.patch("paddle_vl_sp.attention.gather.collect_rows", side_effect=ConnectionError),
    ):
        for width in (200, 256):
            wanted = (ValueError, f"heads are {width} wide, and on a GPU of .* {capability[0]}.{capability[1]} the")
            with pytest.raises(wanted[0] if refused else ConnectionError, match=wanted[1] if refused else None):
                attention(*arrays(8, width=width, dtype="bfloat16"))
            with pytest.raises(ConnectionError), paddle.no_grad():
                attention(*arrays(8, width=width, dtype="bfloat16"))
        with pytest.raises(ConnectionError):
            attention(*arrays(8, width=192, dtype="bfloat16"))
    assert not double.calls


@pytest.mark.parametrize("shape", [[1, 4, 37], [4, 38]])
def test_an_unknown_form_of_the_log_sum_exp_is_refused(shape, monkeypatch):
    """With the shapes, before anything is computed from it."""
    wrong = paddle.zeros(shape)
    monkeypatch.setattr("flash_double.padded", lambda *_: wrong.numpy())
    with FlashDouble(has_padded_lse=True), pytest.raises(ValueError, match=r"log-sum-exp of .*expected \[4, 24\] or"):
        packed_attention(*arrays(24))


# launches


class Sent:
    def wait(self):
        pass


def launches(segments, size, rank):
    """Operators of one layer, forward and backward, with flash calls, and how many of those: 16 positions of each
    segment on a rank of a ring of `size`."""
    bounds = tuple(range(0, 16 * size * segments + 1, 16 * size))
    layout = SeqLayout(bounds[-1], cp_size=size, cp_rank=rank, cu_seqlens=bounds)
    inputs, grad = arrays(16 * segments, dtype="bfloat16"), paddle.ones([1, 16 * segments, 4, 8], "bfloat16")
    received = mock.patch.object(ring, "pass_on", lambda tensors, step, *_: (list(tensors), Sent()))
    group = FakeGroup(rank, size) if size > 1 else None
    with FlashDouble() as double, received:
        with counted_operators() as of_forward:
            out = ring_attention(*inputs, layout=layout, group=group)
        with counted_operators() as of_backward:
            out.backward(grad)
    calls = [double.calls[name] for name in ("flash_attn_unpadded", "flash_attn_unpadded_grad")]
    assert of_forward.names.get("lerp", 0) == size - 1  # the first step's result is not merged
    return of_forward.total + calls[0], of_backward.total + calls[1], *calls


@pytest.mark.parametrize(
    ("segments", "size", "expected"),
    [
        *((segments, 1, (1, 1)) for segments in (1, 8, 100)),
        *((segments, 2, (22, 21)) for segments in (8, 100)),
        (1, 4, (39, 46)),
        *((segments, 4, (60, 49)) for segments in (8, 100)),
    ],
)
def test_launches_do_not_grow_with_the_number_of_segments(segments, size, expected):
    """Exact: docs/attention-costs.md's table. One call a step each way; on one rank nothing else runs, no merge, cast
    or copy."""
    counts = [launches(segments, size, rank) for rank in range(size)]
    assert max(counts, key=lambda each: sum(each[:2]))[:2] == expected
    assert all(each[2:] == (size, size) for each in counts)


def test_the_second_step_copies_no_index(monkeypatch):
    """None at all, forward and backward; the first copies each once."""
    copied = []
    original = copies.on_place
    monkeypatch.setattr(copies, "on_place", lambda x, place: copied.append(x) or original(x, place))
    spans.cache_clear()
    launches(5, 2, 0)
    assert copied
    copied.clear()
    launches(5, 2, 0)
    assert not copied


# spans


@st.composite
def steps(draw):
    """Blocks of one step: rows in order, each block with queries and keys of its own; some share keys."""
    blocks, q, k = [], 0, 0
    for _ in range(draw(st.integers(1, 6))):
        q, k = q + draw(st.integers(0, 3)), k + draw(st.integers(0, 3))
        q_len, k_len = draw(st.integers(1, 300)), draw(st.integers(1, 6))
        causal = draw(st.booleans())
        blocks.append(Block(q, q_len, k, q_len if causal else k_len, causal))
        q += q_len
        k += draw(st.sampled_from([0, blocks[-1].k_len]))
    return tuple(blocks), q, max(block.k_start + block.k_len for block in blocks)


@settings(max_examples=100, deadline=None)
@given(steps(), st.integers(1, 2))
def test_spans_are_the_blocks(case, batch):
    """Exact: all blocks once, causal or not, no key twice in a call; the backward's memory is bounded."""
    blocks, num_queries, num_keys = case
    found = []
    for span in spans(blocks, batch, num_queries, num_keys):
        q_rows, k_rows = span.queries.index.array, span.keys.index.array
        bounds_q, bounds_k = span.bounds_q.array, span.bounds_k.array
        assert len(set(k_rows)) == k_rows.size == bounds_k[-1]
        assert (span.longest_q, span.longest_k) == (np.diff(bounds_q).max(), np.diff(bounds_k).max())
        rounded = -(-np.diff(bounds_q) // ROUNDED) * ROUNDED
        assert rounded.size * rounded.max() <= ROOM * rounded.sum()
        for i in range(bounds_q.size - 1):
            q, k = q_rows[bounds_q[i] : bounds_q[i + 1]], k_rows[bounds_k[i] : bounds_k[i + 1]]
            assert (np.diff(q) == 1).all()
            assert (np.diff(k) == 1).all()
            found.append((q[0] // num_queries, Block(q[0] % num_queries, q.size, k[0] % num_keys, k.size, span.causal)))
            assert q[0] // num_queries == k[0] // num_keys
    assert sorted(found) == sorted((row, block) for row in range(batch) for block in blocks)


def test_a_long_segment_among_short_ones_is_called_by_itself():
    """Exact: 2 calls where one would take 100 x 16384 rows of memory for 29056; one where lengths are alike."""
    lengths = [128] * 99 + [16384]
    starts = np.cumsum([0, *lengths]).tolist()
    blocks = tuple(Block(s, n, s, n, True) for s, n in zip(starts, lengths, strict=False))
    calls = spans(blocks, 1, starts[-1], starts[-1])
    assert [span.bounds_q.array.size - 1 for span in calls] == [99, 1]
    assert len(spans(blocks[:99], 1, starts[-1], starts[-1])) == 1
    alike = tuple(Block(s, n, s, n, True) for s, n in ((0, 100), (100, 300), (400, 250)))
    assert len(spans(alike, 1, 650, 650)) == 1


def test_skewed_segments_and_blocks_that_share_keys():
    """fp32: 1e-5, several calls a step, output and gradients."""
    with mock.patch("paddle_vl_sp.attention.spans.ROUNDED", 1):
        spans.cache_clear()
        bounds = (0, 1, 2, 3, 4, 5, 6, 7, 8, 64)
        inputs = arrays(64)
        with FlashDouble() as double:
            got = out_and_grads(partial(packed_attention, cu_seqlens=bounds), inputs)
    spans.cache_clear()
    assert double.calls["flash_attn_unpadded"] == 2
    check_close(got, out_and_grads(partial(full_attention, cu_seqlens=bounds), inputs), 1e-5)
    blocks = (Block(0, 4, 0, 3, False), Block(5, 3, 0, 8, False))  # row 4 sees nothing
    q, k, v = (x.detach() for x in arrays(8))
    kernel = Flash()
    with FlashDouble() as double:
        out, lse = kernel.forward(None, q, k, v, blocks, 0.5)
        grads = kernel.backward(None, paddle.ones_like(out), q, k, v, out, lse, blocks, 0.5)
    assert double.calls["flash_attn_unpadded"] == 2
    for x in (q, k, v):
        x.stop_gradient = False
    parts = [full(q[:, :4], k[:, :3], v[:, :3]), paddle.zeros([1, 1, 4, 8]), full(q[:, 5:], k, v)]
    expected = paddle.concat(parts, axis=1)
    check_close([out, *grads], [expected, *paddle.grad(expected.sum(), [q, k, v])], 1e-5)
    assert not grads[0][:, 4].abs().sum()


def full(q, k, v):
    k, v = (paddle.repeat_interleave(x, 2, axis=2) for x in (k, v))
    weights = paddle.nn.functional.softmax(paddle.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1)
    return paddle.einsum("bhqk,bkhd->bqhd", weights, v)
