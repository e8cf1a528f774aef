"""A small vision-language decoder, image and video, packed or not, under every attention here: equal to one process."""

from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed.fleet.utils import recompute
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp import SeqLayout, add_rows, joint_features, plan_visual, replace_rows
from paddle_vl_sp.attention import (
    gated_delta_net_sp,
    padded_layout,
    ring_attention,
    sequence_parallel_loss,
    shard_batch,
    ulysses_attention,
    unshard,
)
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import full_attention, recurrent_delta_rule
from paddle_vl_sp.testing.subgroup import SubGroup
from rank_cases import hold, pairs

TOLERANCE = 2e-5  # fp32, relative to the largest value of each array
IMAGE, VIDEO, VOCABULARY = 31, 32, 40
LAYERS, HEADS, KV_HEADS, HEAD = 2, 4, 2, 8
HIDDEN, PIXELS = HEADS * HEAD, 12


def parameters():
    """Leaves, the same on every rank; a tower of one matrix for the embedding and one for each deepstack level."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCABULARY, HIDDEN), "head": (HIDDEN, VOCABULARY), "tower": (1 + LAYERS, PIXELS, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"qkv{layer}": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD), f"out{layer}": (HIDDEN, HIDDEN)}
        shapes |= {f"up{layer}": (HIDDEN, 2 * HIDDEN), f"down{layer}": (2 * HIDDEN, HIDDEN)}
        shapes |= {f"gates{layer}": (HIDDEN, 2 * HEADS), f"conv{layer}": ((HEADS + 2 * KV_HEADS) * HEAD, 4)}
    values = {name: rng.standard_normal(shape).astype("float32") * 0.2 for name, shape in shapes.items()}
    return {name: paddle.to_tensor(value, stop_gradient=False) for name, value in values.items()}


def decode(weights, ids, position_ids, visual, plan, mix):
    """ids [B, S_local], position_ids [3, B, S_local], visual: levels [N, H]  ->  logits [B, S_local, V]"""
    hidden = replace_rows(F.embedding(ids, weights["embed"]), visual[0], plan)
    for layer in range(LAYERS):
        hidden = hidden + paddle.matmul(mix(weights, layer, norm(hidden), position_ids), weights[f"out{layer}"])
        hidden = hidden + paddle.matmul(
            F.silu(paddle.matmul(norm(hidden), weights[f"up{layer}"])), weights[f"down{layer}"]
        )
        hidden = add_rows(hidden, visual[1 + layer], plan)
    return paddle.matmul(norm(hidden), weights["head"])


def encode(weights, image, video, tokens):
    """The tower on all of the image and all of the video, joined into the reading order of the tokens."""
    levels = [[paddle.matmul(paddle.to_tensor(x), matrix) for matrix in weights["tower"]] for x in (image, video)]
    return joint_features(*levels, tokens, (IMAGE, VIDEO))


def softmax_mix(weights, layer, hidden, position_ids, *, attention):
    q, k, v = heads_of(paddle.matmul(hidden, weights[f"qkv{layer}"]))
    return attention(rotated(q, position_ids), rotated(k, position_ids), v).flatten(2)


def linear_mix(weights, layer, hidden, position_ids, *, delta_net):
    q, k, v = heads_of(paddle.matmul(hidden, weights[f"qkv{layer}"]), (KV_HEADS, KV_HEADS, HEADS))
    g, beta = paddle.matmul(hidden, weights[f"gates{layer}"]).split(2, axis=-1)
    return delta_net(q, k, v, -F.softplus(g), F.sigmoid(beta), weights[f"conv{layer}"]).flatten(2)


def heads_of(x, heads=(HEADS, KV_HEADS, KV_HEADS)):
    parts = x.split([count * HEAD for count in heads], axis=-1)
    return [part.reshape([*x.shape[:2], count, HEAD]) for part, count in zip(parts, heads, strict=True)]


def rotated(x, position_ids):
    """Rotary embedding whose frequencies take their position from time, height and width in turn."""
    half = x.shape[-1] // 2
    frequency = paddle.to_tensor([10.0 ** -(i / half) for i in range(half)])
    axis_of = paddle.to_tensor([[1.0 if i % 3 == axis else 0.0 for i in range(half)] for axis in range(3)])
    angle = (
        paddle.einsum("absx,ah->bsh", position_ids.astype("float32").unsqueeze(-1), axis_of) * frequency
    ).unsqueeze(2)
    left, right = x.split(2, axis=-1)
    cos, sin = paddle.cos(angle), paddle.sin(angle)
    return paddle.concat([left * cos - right * sin, right * cos + left * sin], axis=-1)


def norm(x):
    return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def batch_of(lengths, batch=1):
    """Ids with an image and a video that lie across every cut, three-part positions, labels not yet shifted."""
    length = sum(lengths)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 30, (batch, length))
    ids[:, 1 : length // 2 : 3] = IMAGE
    ids[:, 2 : length - 2 : 4] = VIDEO
    if batch > 1:
        ids[1:, : length // 2] = 7  # the second sample is text where the first is not
    position_ids = np.stack([np.arange(length) // divisor + np.zeros((batch, 1), "int64") for divisor in (1, 2, 3)])
    labels = np.where(rng.random((batch, length)) < 0.2, -100, ids)
    pixels = [rng.standard_normal(((ids == kind).sum(), PIXELS)).astype("float32") for kind in (IMAGE, VIDEO)]
    return {"input_ids": ids, "position_ids": position_ids, "labels": labels}, pixels


def train(layout, lengths, packed, batch, mix, group, wrap=lambda run, *x: run(*x)):
    """Loss, logits and parameter gradients of this rank's share; layout and group None is the whole on one process."""
    arrays, pixels = batch_of(lengths, batch)
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    whole = SeqLayout(layout.seq_len, cu_seqlens=layout.cu_seqlens)
    padded = shard_batch(arrays, whole, cu_seqlens=bounds)
    share = shard_batch(arrays, layout, cu_seqlens=bounds, shift_labels=True)
    ids, position_ids, labels = (paddle.to_tensor(share[name]) for name in arrays)
    plan = plan_visual(padded["input_ids"], (IMAGE, VIDEO), layout, sequence_first=False).to("cpu")
    weights = parameters()
    visual = encode(weights, *pixels, padded["input_ids"])
    logits = wrap(lambda *levels: decode(weights, ids, position_ids, levels, plan, mix), *visual)
    loss = sequence_parallel_loss(logits, labels, group=group)
    loss.backward()
    grads = {name: x.grad.numpy() for name, x in weights.items() if x.grad is not None}
    return loss.item(), logits, grads


class One:
    rank, nranks, ranks, backend = 0, 1, (0,), "NONE"


def same_as_one_process(layout, lengths, mix, expected_mix, *, packed, batch=1, **options):
    group = dist.get_group(0)
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    one = SeqLayout(sum(lengths), cu_seqlens=bounds)
    expected_loss, expected_logits, expected = train(one, lengths, packed, batch, expected_mix, One())
    loss, logits, grads = train(layout, lengths, packed, batch, mix, group, **options)
    joined = unshard(logits.detach(), layout, group, axis=1, cu_seqlens=bounds if packed else (0, sum(lengths)))
    summed = {}
    for name in expected:
        total = paddle.to_tensor(grads[name])
        dist.all_reduce(total)
        summed[name] = total.numpy()
    close(loss, expected_loss, "loss")
    close(joined.numpy(), expected_logits.numpy(), "logits")
    assert expected.keys() == grads.keys()
    for name, value in summed.items():
        close(value, expected[name], f"gradient of {name}")


def close(got, expected, what):
    got, expected = np.asarray(got), np.asarray(expected)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert got.shape == expected.shape
    assert error < TOLERANCE, f"{what}: relative error {error:.2e}"


def softmax(**options):
    return partial(softmax_mix, **options)


def full(bounds):
    return softmax(attention=partial(full_attention, cu_seqlens=bounds))


def ring_case(lengths, *, packed=True, batch=1, mode="zigzag", recomputed=False):
    group = dist.get_group(0)
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    layout = padded_layout(sum(lengths), cu_seqlens=bounds, cp_size=group.nranks, cp_rank=group.rank, cp_mode=mode)
    mix = softmax(attention=partial(ring_attention, layout=layout, group=group))
    options = {"wrap": recompute} if recomputed else {}
    same_as_one_process(layout, lengths, mix, full(bounds), packed=packed, batch=batch, **options)


def ulysses_case(lengths, *, packed=True, batch=1):
    group = dist.get_group(0)
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    layout = SeqLayout(sum(lengths), sp_size=group.nranks, sp_rank=group.rank, cu_seqlens=bounds, remainder="front")
    mix = softmax(attention=partial(ulysses_attention, group=group, layout=layout))
    same_as_one_process(layout, lengths, mix, full(bounds), packed=packed, batch=batch)


def both_case(lengths, *, packed=True, batch=1):
    cp_rank, sp_rank = divmod(dist.get_rank(), 2)
    ulysses, ring = SubGroup([2 * cp_rank, 2 * cp_rank + 1]), SubGroup([sp_rank, 2 + sp_rank])
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    layout = padded_layout(sum(lengths), cu_seqlens=bounds, cp_size=2, cp_rank=cp_rank, sp_size=2, sp_rank=sp_rank)
    inner = partial(ring_attention, layout=layout, group=ring)
    mix = softmax(attention=partial(ulysses_attention, group=ulysses, attention=inner, layout=layout))
    same_as_one_process(layout, lengths, mix, full(bounds), packed=packed, batch=batch)


def linear_case(lengths, *, packed=True, batch=1):
    """Every layer linear; on two ranks, since the key heads are two."""
    group = dist.get_group(0)
    bounds = tuple(np.cumsum([0, *lengths]).tolist()) if packed else None
    layout = SeqLayout(sum(lengths), sp_size=group.nranks, sp_rank=group.rank, cu_seqlens=bounds, remainder="front")

    def shared(q, k, v, g, beta, conv):
        return gated_delta_net_sp(q, k, v, g, beta, group=group, conv_weight=conv, layout=layout)

    def alone(q, k, v, g, beta, conv):
        parts = conv.split([x.shape[2] * HEAD for x in (q, k, v)])
        q, k, v = (
            causal_conv(x, part.reshape([*x.shape[2:], 4]), bounds) for x, part in zip((q, k, v), parts, strict=True)
        )
        return recurrent_delta_rule(q, k, v, g, beta, cu_seqlens=bounds)

    mixes = [partial(linear_mix, delta_net=net) for net in (shared, alone)]
    same_as_one_process(layout, lengths, *mixes, packed=packed, batch=batch)


CASES = {
    "ring": partial(ring_case, [32], packed=False, batch=2),
    "ring, packed": partial(ring_case, [13, 6, 9]),
    "ring, packed, contiguous": partial(ring_case, [13, 6, 9], mode="contiguous"),
    "ring, packed, recomputed": partial(ring_case, [13, 6, 9], recomputed=True),
    "ulysses": partial(ulysses_case, [32], packed=False, batch=2),
    "ulysses, packed": partial(ulysses_case, [13, 6, 9]),
}
TWO_RANKS = {
    "linear": partial(linear_case, [16], packed=False, batch=2),
    "linear, packed": partial(linear_case, [13, 6, 8]),
}
FOUR_RANKS = {
    "ring x ulysses": partial(both_case, [32], packed=False, batch=2),
    "ring x ulysses, packed": partial(both_case, [13, 6, 9]),
}
LAUNCHES = {2: {**CASES, **TWO_RANKS}, 4: {**CASES, **FOUR_RANKS}}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_trains_like_one_process(nranks, case):
    """Loss, logits, and parameter gradients summed over the ranks (tower included), within 2e-5 (fp32)."""
    hold(__name__, nranks, case)
