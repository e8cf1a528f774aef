"""Settings that Paddle keeps for the whole process: the default dtype, the search for NaN, mixed precision, gradients
of gradients."""

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import paddle
import pytest

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import (
    blocks,
    delta,
    gated_delta_net_sp,
    gated_delta_rule,
    gather_attention,
    packed_attention,
    sequence_parallel_loss,
    shard_batch,
    ulysses_attention,
    unshard,
)
from paddle_vl_sp.attention.reference import full_attention, recurrent_delta_rule
from paddle_vl_sp.testing import FakeGroup

ONE = FakeGroup(0, 1)
LAYOUT = SeqLayout(70, cu_seqlens=(0, 5, 70))
LABELS = np.random.default_rng(9).integers(0, 8, (1, 70, 2))


def leaf(seed, *shape):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"), stop_gradient=False)


def qkv():
    return [leaf(seed, 1, 70, 2, 8) for seed in range(3)]


def gates():
    return [-leaf(3, 1, 70, 2).abs().detach(), leaf(4, 1, 70, 2).abs().detach()]


def weights_of_conv():
    return paddle.to_tensor(np.full((2, 8, 4), 0.25, "float32"))


def until():
    """Each key is seen to the end, but for those of the last rows, which nothing sees."""
    return paddle.to_tensor([70] * 60 + list(range(60, 70)), dtype="int32").reshape([1, 1, 70, 1])


def maps_of_the_state(*inputs):
    """They do not depend on q, which is added so that each input has a gradient."""
    return delta.state_map(delta.chunked(*delta.delta_inputs(*inputs))) + inputs[0].mean()


CASES = {
    "attention": lambda q, k, v: packed_attention(q, k, v, cu_seqlens=(0, 5, 70)),
    "attention, not causal": lambda q, k, v: packed_attention(q, k, v, causal=False),
    "attention, Ulysses": lambda q, k, v: ulysses_attention(q, k, v, group=ONE, layout=LAYOUT),
    "attention, gathered": lambda q, k, v: gather_attention(q, k, v, layout=LAYOUT, group=ONE),
    "attention, a row without keys": lambda q, k, v: gather_attention(
        q, k, v, layout=SeqLayout(70), group=ONE, startend_row_indices=until()
    ),
    "attention, all scores": full_attention,
    "delta rule": lambda q, k, v: gated_delta_rule(q, k, v, *gates(), cu_seqlens=(0, 5, 70)),
    "delta rule, by position": lambda q, k, v: recurrent_delta_rule(q, k, v, *gates()),
    "delta rule, states": lambda q, k, v: gated_delta_net_sp(
        q,
        k,
        v,
        *gates(),
        group=ONE,
        layout=LAYOUT,
        method="state",
        conv_weight=weights_of_conv().reshape([16, 4]).tile([3, 1]),
    ),
    "delta rule, maps of the state": lambda q, k, v: maps_of_the_state(q, k, v, *gates()),
    "convolution": lambda q, k, v: delta.causal_conv(q * k + v, weights_of_conv()),
    "unshard": lambda q, k, v: unshard(q * k + v, LAYOUT, ONE, axis=1),
    "loss": lambda q, k, v: sequence_parallel_loss(q * k + v, paddle.to_tensor(LABELS), group=ONE),
    "loss, number of tokens": lambda q, k, v: sequence_parallel_loss(
        q * k + v, paddle.to_tensor(LABELS), group=ONE, num_tokens=300
    ),
}


def out_and_grads(case):
    leaves = qkv()
    out = CASES[case](*leaves)
    return [out, *paddle.grad((out * out).sum(), leaves)]


@pytest.fixture(params=["float16", "bfloat16", "float64"])
def default_dtype(request):
    yield request.param
    paddle.set_default_dtype("float32")


@pytest.mark.parametrize("case", CASES)
def test_the_default_dtype_changes_nothing(case, default_dtype):
    """The same bits, output and gradients; PaddleFormers sets another default for whole runs."""
    expected = out_and_grads(case)
    paddle.set_default_dtype(default_dtype)
    for got, want in zip(out_and_grads(case), expected, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_batches_under_another_default_dtype(default_dtype):
    """Exact: padded places of a Paddle array keep its dtype."""
    paddle.set_default_dtype(default_dtype)
    share = shard_batch({"loss_weights": paddle.to_tensor([[1.0, 2.0, 3.0]], dtype="float32")}, SeqLayout(4))
    assert share["loss_weights"].dtype == paddle.float32
    assert share["loss_weights"].tolist() == [[1.0, 2.0, 3.0, 0.0]]


def search_for_nan():
    """In a process of its own: what finds an infinite value ends in an error."""
    paddle.set_flags({"FLAGS_check_nan_inf": 1})
    for case in CASES:
        out_and_grads(case)
    logits = leaf(0, 1, 4, 5)
    loss = sequence_parallel_loss(logits, paddle.full([1, 4], -100, "int64"), group=ONE)  # no token at all
    loss.backward()
    assert loss.item() == 0
    print("no value was infinite")


def test_paddles_search_for_nan_finds_none():
    """No infinite value anywhere, forward and backward, in a process that would end at the first."""
    run = subprocess.run(
        [sys.executable, "-c", "import test_settings; test_settings.search_for_nan()"],
        cwd=__file__.rpartition("/")[0], capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert "no value was infinite" in run.stdout, run.stderr[-2000:]


def test_rows_without_a_key_so_far_take_the_part_as_it_is():
    """Exact, also for parts whose scores are far below or above what exp holds."""
    part = leaf(0, 1, 3, 2, 4).detach()
    part_lse = paddle.to_tensor([[[[-3e4], [3e4]], [[0.0], [1.0]], [[-100.0], [100.0]]]], dtype="float32")
    empty = paddle.full([1, 3, 2, 1], blocks.NO_KEY, "float32")
    out, lse = blocks.merge(paddle.zeros(part.shape, "float32"), empty, part, part_lse)
    np.testing.assert_array_equal(out.numpy(), part.numpy())
    np.testing.assert_array_equal(lse.numpy(), part_lse.numpy())


class MixedPrecision:
    """What auto_cast does on a GPU to the one operator of its white list that is used here; on a CPU it is off."""

    def __init__(self, monkeypatch):
        self.on, self.matmul = True, paddle.matmul
        monkeypatch.setattr(paddle.amp, "auto_cast", self.auto_cast)
        monkeypatch.setattr(paddle, "matmul", self.low_matmul)

    @contextmanager
    def auto_cast(self, enable=True):
        before, self.on = self.on, enable
        yield
        self.on = before

    def low_matmul(self, x, y, **options):
        if not self.on:
            return self.matmul(x, y, **options)
        low = [z.astype("bfloat16").astype("float32") for z in (x, y)]
        return self.matmul(*low, **options).astype("bfloat16").astype("float32")


@pytest.mark.parametrize("case", ["attention", "attention, gathered", "delta rule", "delta rule, states"])
def test_mixed_precision_does_not_lower_what_is_computed_in_float32(case, monkeypatch):
    """The same bits under a double of auto_cast; backward follows the dtypes of forward."""
    expected = out_and_grads(case)
    double = MixedPrecision(monkeypatch)
    x = leaf(0, 4, 4)
    assert not np.array_equal(paddle.matmul(x, x).numpy(), double.matmul(x, x).numpy())
    for got, want in zip(out_and_grads(case), expected, strict=True):
        np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_mixed_precision_is_off_for_the_loss(monkeypatch):
    """O2 lowers sums too, and bf16 does not count beyond 256."""
    double = MixedPrecision(monkeypatch)
    entropy, seen = paddle.nn.functional.cross_entropy, []

    def noted(*args, **options):
        seen.append(double.on)
        return entropy(*args, **options)

    stacked = paddle.stack
    monkeypatch.setattr(paddle.nn.functional, "cross_entropy", noted)
    monkeypatch.setattr(paddle, "stack", lambda x, **options: seen.append(double.on) or stacked(x, **options))
    sequence_parallel_loss(leaf(0, 1, 4, 5), paddle.to_tensor([[1, 2, 3, -100]]), group=ONE)
    assert seen == [False, False]


@pytest.mark.parametrize("case", ["attention", "attention, gathered", "loss"])
def test_a_gradient_of_a_gradient_is_refused(case):
    """Without this the second gradient is None, or lacks a part, and nobody says so. Paddle makes an OSError of it."""
    leaves = qkv()
    out = CASES[case](*leaves)
    with pytest.raises(OSError, match="has no second gradient: leave create_graph out"):
        paddle.grad((out * out).sum(), leaves, create_graph=True)
