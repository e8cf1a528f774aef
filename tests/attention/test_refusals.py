"""What is refused, before anything is sent: the message names what was got, what was expected and how to mend it."""

from functools import partial

import numpy as np
import paddle
import pytest

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import (
    gated_delta_net_sp,
    gated_delta_rule,
    packed_attention,
    ring_attention,
    sequence_parallel_loss,
    token_losses,
    ulysses_attention,
)
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.testing import FakeGroup
from paddle_vl_sp.testing.subgroup import SubGroup

TWO = FakeGroup(1, 2)
RING = SeqLayout(8, cp_size=2, cp_rank=1)
PACKED = SeqLayout(8, cp_size=2, cp_rank=1, cu_seqlens=(0, 4, 8))


def qkv(rows=4, heads=4, kv_heads=2, width=8, batch=1):
    return [paddle.zeros([batch, rows, n, width]) for n in (heads, kv_heads, kv_heads)]


def refused(match, function, *args, **options):
    with pytest.raises(ValueError, match=match):
        function(*args, **options)


def test_ring_and_group_must_agree():
    """Refused with both ranks and sizes."""
    refused("rank 1 of 2, but the group says rank 0 of 2", ring_attention, *qkv(), layout=RING, group=FakeGroup(0, 2))
    refused("rank 1 of 2, but the group says rank 1 of 4", ring_attention, *qkv(), layout=RING, group=FakeGroup(1, 4))


def test_ring_rows_must_be_the_share():
    """Refused with both numbers of rows and the way out."""
    refused(
        "q has 8 rows, the layout's cp share is 4: pass the rank's own share",
        ring_attention,
        *qkv(8),
        layout=RING,
        group=TWO,
    )
    both = SeqLayout(16, cp_size=2, cp_rank=1, sp_size=2)
    refused(
        "q has 4 rows.*share is 8.*has an sp cut too.*ulysses_attention",
        ring_attention,
        *qkv(4),
        layout=both,
        group=TWO,
    )


def test_shapes_and_dtypes():
    """Refused with the shapes, dtypes or heads that were got."""
    q, k, v = qkv()
    refused(r"must be \[B, S_local, heads, D\], got q \[1, 4, 32\]", packed_attention, q.flatten(2), k, v)
    refused("one dtype, got .*float16", packed_attention, q.astype("float16"), k, v)
    refused("agree in B and S_local.*k .1, 3, 2, 8.", packed_attention, q, k[:, :3], v[:, :3])
    refused("4 query heads cannot share 3 key heads evenly", packed_attention, *qkv(kv_heads=3))


def test_packed_is_one_row():
    """Refused with the batch size, by all three functions."""
    refused("one packed row, B = 1, got B = 2", ring_attention, *qkv(batch=2), layout=PACKED, group=TWO)
    refused("one packed row, B = 1, got B = 2", packed_attention, *qkv(batch=2), cu_seqlens=(0, 1, 4))
    uneven = SeqLayout(8, sp_size=2, sp_rank=1, cu_seqlens=(0, 5, 8))
    refused("one packed row, B = 1, got B = 2", ulysses_attention, *qkv(batch=2), layout=uneven, group=TWO)


def test_ulysses_heads():
    """Refused with the heads and the ranks, and what chooses better."""
    refused(
        "3 query heads do not divide over 2 ranks.*choose_degrees",
        ulysses_attention,
        *qkv(heads=3, kv_heads=3),
        group=TWO,
    )
    refused(
        "3 key heads and 2 ranks: one must be a multiple of the other.*choose_degrees",
        ulysses_attention, *qkv(heads=6, kv_heads=3), group=TWO,
    )  # fmt: skip
    refused("4 key heads and 6 ranks", ulysses_attention, *qkv(heads=12, kv_heads=4), group=FakeGroup(1, 6))


def test_ulysses_layouts():
    """Refused with the layout's cut and the group's."""
    refused("pass attention=functools.partial.ring_attention", ulysses_attention, *qkv(), group=TWO,
            layout=SeqLayout(16, cp_size=2, sp_size=2, sp_rank=1))  # fmt: skip
    refused(
        "Ulysses joins consecutive stretches of the sequence.*zigzag, rank 1 of 2.*sp_size=2, sp_rank=1",
        ulysses_attention,
        *qkv(),
        group=TWO,
        layout=RING,
    )
    packed = SeqLayout(8, cp_size=2, cp_rank=1, cp_mode="contiguous", cu_seqlens=(0, 4, 8))
    refused(
        "cuts every segment of cu_seqlens by itself.*sp_size=2", ulysses_attention, *qkv(), group=TWO, layout=packed
    )
    refused("q has 4 rows, the layout says 3 for rank 1 of .4, 3.", ulysses_attention, *qkv(), group=TWO,
            layout=SeqLayout(7, sp_size=2, sp_rank=1, remainder="front"))  # fmt: skip


def test_ulysses_boundaries_belong_to_the_built_in_attention():
    """Refused: boundaries that the given attention would not see."""
    refused("bind it to your own", ulysses_attention, *qkv(), group=TWO, attention=packed_attention, cu_seqlens=(0, 8))
    packed = SeqLayout(8, sp_size=2, sp_rank=1, cu_seqlens=(0, 3, 8))
    opaque = [full_attention, lambda q, k, v, **options: v, partial(full_attention, cu_seqlens=None)]
    for attention in opaque:
        refused(
            "bind it to your own.*a layout without cu_seqlens",
            ulysses_attention, *qkv(), group=TWO, attention=attention, layout=packed,
        )  # fmt: skip


def test_ulysses_takes_an_attention_that_has_the_boundaries():
    """On a group of one, where nothing moves: the segments of the layout, 1e-6; and whoever knows better."""
    one, layout = FakeGroup(0, 1), SeqLayout(8, cu_seqlens=(0, 3, 8))
    q, k, v = (paddle.randn(x.shape) for x in qkv(8))
    expected = full_attention(q, k, v, cu_seqlens=(0, 3, 8)).numpy()
    bound = [partial(full_attention, cu_seqlens=(0, 3, 8)), partial(ring_attention, layout=layout, group=one), None]
    for attention in bound:
        out = ulysses_attention(q, k, v, group=one, attention=attention, layout=layout)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-6)
    out = ulysses_attention(q, k, v, group=one, attention=full_attention, layout=SeqLayout(8))
    assert not np.allclose(out.numpy(), expected)


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ((0, 5, 7), "cu_seqlens ends at 7, but seq_len is 8"),
        ((0, 20), "cu_seqlens ends at 20, but seq_len is 8"),
        ((3, 8), "cu_seqlens must start at 0"),
        ((0, 5, 5, 8), "strictly increasing, got 5 then 5"),
    ],
)
def test_boundaries_must_be_those_of_the_sequence(bounds, reason):
    """On every rank, before anything is sent: FakeGroup cannot send."""
    x, q = delta(8), qkv(8)
    refused(reason, gated_delta_rule, *x, cu_seqlens=bounds)
    refused(reason, causal_conv, x[0], paddle.ones([2, 8, 4], "float32"), bounds)
    refused(reason, packed_attention, *q, cu_seqlens=bounds)
    refused(reason, gated_delta_net_sp, *delta(4), group=TWO, cu_seqlens=bounds)
    refused(reason, ulysses_attention, *qkv(), group=TWO, cu_seqlens=bounds)


def test_boundaries_are_any_integers():
    """Exact: numpy's as well as Python's."""
    x = [paddle.rand(each.shape) for each in delta(8)]
    for rule in (gated_delta_rule, lambda q, *_, cu_seqlens: causal_conv(q, paddle.ones([2, 8, 4]), cu_seqlens)):
        outs = [rule(*x, cu_seqlens=bounds) for bounds in ((0, 3, 8), np.array([0, 3, 8]), [0, 3, 8])]
        for out in outs[1:]:
            np.testing.assert_array_equal(out.numpy(), outs[0].numpy())


def delta(rows=4, key_heads=2, value_heads=4, **shapes):
    made = {"q": [1, rows, key_heads, 8], "v": [1, rows, value_heads, 8], "g": [1, rows, value_heads]}
    q, v, g = (paddle.zeros(shapes.get(name, shape)) for name, shape in made.items())
    return q, q, v, g, g


def test_linear_attention_and_its_group_must_agree():
    """Refused with both ranks and sizes, by both methods; and a share of another length."""
    for method in ("ulysses", "state"):
        run = partial(gated_delta_net_sp, *delta(), method=method)
        refused("rank 1 of 2 .*the group says rank 0 of 2", run, group=FakeGroup(0, 2), layout=RING)
        refused(
            "q has 4 rows, the layout's share of this rank is 8",
            run,
            group=TWO,
            layout=SeqLayout(16, sp_size=2, sp_rank=1),
        )


def test_states_are_passed_by_the_built_in_rule():
    """Refused: another rule says nothing of the state that it ends with."""
    refused('"state" has a delta rule of its own', gated_delta_net_sp, *delta(), group=TWO, method="state",
            delta_rule=lambda q, k, v, g, beta, cu_seqlens: v)  # fmt: skip
    refused(
        "method must be one of 'ulysses', 'state', got 'ring'", gated_delta_net_sp, *delta(), group=TWO, method="ring"
    )


def test_linear_attention_heads():
    """Refused with the heads and the ranks."""
    refused(
        '1 key heads and 4 value heads do not divide over 2 ranks: use method="state"',
        gated_delta_net_sp,
        *delta(key_heads=1),
        group=TWO,
    )
    refused("3 key heads must divide 4 value heads", gated_delta_net_sp, *delta(key_heads=3), group=TWO)
    refused("g and beta must be .B, S_local, Hv.*g .1, 4, 2.", gated_delta_net_sp, *delta(g=[1, 4, 2]), group=TWO)


def test_linear_attention_shapes():
    """Refused with the shapes that were expected."""
    q = paddle.zeros([1, 4, 2, 8])
    refused(r"q and k must be \[B, S_local, Hk, Dk\]", gated_delta_net_sp, q[0], q, q, q, q, group=TWO)


def test_linear_attention_channels():
    """Refused with the channels of the weight and those of q, k and v."""
    refused(
        "conv_weight has 60 channels, q, k and v have .16, 16, 32., together 64",
        gated_delta_net_sp, *delta(), group=TWO, conv_weight=paddle.zeros([60, 4]),
    )  # fmt: skip


def test_loss():
    """Refused with both shapes, or the number that was got."""
    logits, labels = paddle.zeros([1, 4, 5]), paddle.zeros([1, 5], "int64")
    refused(r"logits \[1, 4, 5\] need labels \[1, 4\], got \[1, 5\]", token_losses, logits, labels)
    refused(
        "num_tokens must be positive, got 0", sequence_parallel_loss, logits, labels[:, :4], group=TWO, num_tokens=0
    )


def test_emulated_groups():
    """Refused with the ranks that were named."""
    refused(r"made by its members, each named once; rank 0 got ranks \[1, 2\]", SubGroup, [1, 2])
    refused(r"each named once; rank 0 got ranks \[0, 0\]", SubGroup, [0, 0])
    refused(r"even number of members, got \[0, 1, 2\]: its exchanges go in pairs", SubGroup, [0, 1, 2])
