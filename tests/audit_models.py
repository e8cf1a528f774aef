"""Small models for audits on real ranks, each with faults that can be planted in it.

A model is (loss, named parameters, after): what `audit_gradients` takes. A fault is a word that the maker knows.
"""

from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
import test_decoder as decoder
from paddle.autograd import PyLayer
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients
from paddle.nn import functional as F  # noqa: N812

from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.attention import ring_attention, ulysses_attention
from paddle_vl_sp.sequence import padded_layout, sequence_parallel_loss, shard_batch

HIDDEN, INNER, WORDS, ROWS = 16, 32, 24, 20


class Around(PyLayer):
    """y = forward(x), whose gradient is backward(gradient)."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_by = backward
        return forward(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward_by(grad.clone())


class Swapped(PyLayer):
    """Two tensors of one shape, each with the other's gradient."""

    @staticmethod
    def forward(ctx, x, y):
        return x.clone(), y.clone()

    @staticmethod
    def backward(ctx, one, other):
        return other.clone(), one.clone()


def same(x):
    return x


def summed(x):
    x = x.contiguous()
    dist.all_reduce(x)
    return x


def times(factor):
    return lambda x: x * factor


def without_rank(rank):
    """The sum over all ranks but one."""
    return lambda x: summed(x * float(dist.get_rank() != rank))


def around(x, forward=same, backward=same):
    return Around.apply(x, forward, backward)


def leaf(rng, *shape, scale=0.3, middle=0.0):
    values = middle + scale * rng.standard_normal(shape)
    return paddle.to_tensor(values.astype("float32"), stop_gradient=False)


ENTER = {  # the backward of a tensor that enters tensor-parallel columns
    "missing sum": same,
    "second sum": lambda grad: summed(summed(grad)),
    "mean for the sum": lambda grad: summed(grad) / dist.get_world_size(),
    "rank forgotten": without_rank(1),
    "sign of a rank": lambda grad: grad * (1.0 - 2.0 * (dist.get_rank() == 1)),
}


def tensor_parallel_mlp(fault="", seed=0):
    """Two blocks norm -> columns -> rows with a residual way, between an embedding and a head."""
    rank, nranks, rng = dist.get_rank(), dist.get_world_size(), np.random.default_rng(seed)
    own = slice(rank * INNER // nranks, (rank + 1) * INNER // nranks)
    weights = {"embed": leaf(rng, WORDS, HIDDEN, scale=1.0)}
    for block in range(2):
        whole = [rng.standard_normal(shape) * 0.3 for shape in ((HIDDEN, INNER), (INNER, HIDDEN))]
        parts = whole[0][:, own], whole[1][own]
        up, down = (paddle.to_tensor(part.astype("float32"), stop_gradient=False) for part in parts)
        up.is_distributed = down.is_distributed = True
        weights |= {f"{block}.norm": leaf(rng, HIDDEN, scale=0.1, middle=1.0), f"{block}.up": up, f"{block}.down": down}
        weights |= {f"{block}.bias": leaf(rng, HIDDEN), f"{block}.scale": leaf(rng, HIDDEN, scale=0.1, middle=1.0)}
    weights["head"] = leaf(rng, HIDDEN, WORDS)
    if fault == "marked twice":
        weights["1.norm"].sequence_parallel = True
    ids = paddle.to_tensor(np.arange(ROWS) * 7 % WORDS)
    labels = paddle.to_tensor(np.arange(ROWS) * 5 % WORDS)

    def loss():
        hidden = F.embedding(ids, weights["embed"])
        for block in range(2):
            hidden = _block(weights, block, hidden, fault if block == 1 else "")
        return F.cross_entropy(paddle.matmul(hidden, weights["head"]), labels)

    return loss, list(weights.items()), None


def _block(weights, block, hidden, fault):
    norm, scale, bias = (weights[f"{block}.{name}"] for name in ("norm", "scale", "bias"))
    up, down = weights[f"{block}.up"], weights[f"{block}.down"]
    if fault == "another's gradient":
        norm, scale = Swapped.apply(norm, scale)
    if fault == "no gradient":
        scale = scale.detach()
    if fault == "a shard's factor":
        up = around(up, backward=times(1.0 + (dist.get_rank() == 1)))
    normed = hidden * paddle.rsqrt((hidden * hidden).mean(-1, keepdim=True) + 1e-6) * norm
    inner = around(normed, backward=ENTER.get(fault, summed))
    out = paddle.matmul(F.gelu(paddle.matmul(inner, up)), down)
    out = around(out, summed, summed if fault == "sum in both ways" else same) * scale + bias
    return out + (hidden.detach() if fault == "detached" else hidden)


MLP_FAULTS = {  # fault: {parameter: verdict on n ranks}; those not named are right
    "missing sum": {"1.norm": "partial", "0.*": "mixed", "embed": "mixed"},
    "second sum": {"1.norm": "times n", "0.*": "mixed", "embed": "mixed"},
    "mean for the sum": {"1.norm": "partial", "0.*": "mixed", "embed": "mixed"},
    "rank forgotten": {"1.norm": "mixed", "0.*": "mixed", "embed": "mixed"},
    "sign of a rank": {"1.norm": "mixed", "0.*": "mixed", "embed": "mixed"},
    "sum in both ways": {"1.norm": "times n", "1.up": "times n", "1.down": "times n", "0.*": "mixed", "embed": "mixed"},
    "another's gradient": {"1.norm": "mixed", "1.scale": "mixed"},
    "no gradient": {"1.scale": "none"},
    "a shard's factor": {"1.up": "mixed"},
    "detached": {"0.*": "mixed", "embed": "mixed"},
    "marked twice": {"1.norm": "times n"},
}


def data_parallel(reduced_by=None, seed=1):
    """Each rank with rows of its own, a weight that is multiplied transposed, and the mean of the losses."""
    paddle.seed(seed)
    weight, bias = paddle.create_parameter([12, 8], "float32"), paddle.create_parameter([12], "float32", is_bias=True)
    weight.is_distributed = True  # over another group: here the ranks hold copies
    rows = np.random.default_rng([seed, dist.get_rank()]).standard_normal((16, 8))
    x = paddle.to_tensor(rows.astype("float32"))

    def loss():
        return F.cross_entropy(paddle.matmul(x, weight.T) + bias, paddle.arange(16) % 12)

    after = None if reduced_by is None else lambda: reduced_by([weight, bias])
    return loss, [("weight", weight), ("bias", bias)], after


def contiguous_mean(parameters):
    for parameter in parameters:
        parameter.grad.set_value(summed(parameter.grad.clone()) / dist.get_world_size())


def fused_mean(parameters):
    """Paddle 3.3.1's, which permutes a gradient with strides."""
    fused_allreduce_gradients(parameters, None)


DATA_PARALLEL_FAULTS = {"fused all-reduce": {"weight": "mixed"}}
DECODER_FAULTS = {
    "missing sum": {"tower": "partial"},
    "second sum": {"tower": "times n", "head": "times n"},
    "mean for the sum": {"tower": "partial", "head": "partial"},
    "factor n": {"tower": "times n", "head": "times n"},
    "level forgotten": {"tower": "mixed"},
    "rank forgotten": {"tower": "mixed", "out1": "mixed"},
    "another's gradient": {"out0": "mixed", "out1": "mixed"},
    "detached keys": {"qkv1": "mixed"},
}


def small_decoder(attention, fault="", seed=0):
    """The decoder of test_decoder over ring or Ulysses: every gradient is partial until `after` sums it."""
    group, nranks = dist.get_group(0), dist.get_world_size()
    if attention == "ring":
        layout = padded_layout(32, cp_size=nranks, cp_rank=group.rank)
        mixed = partial(ring_attention, layout=layout, group=group)
    else:
        layout = SeqLayout(32, sp_size=nranks, sp_rank=group.rank)
        mixed = partial(ulysses_attention, group=group, layout=layout)
    if fault == "detached keys":
        mixed = lambda q, k, v, real=mixed: real(q, k.detach(), v)  # noqa: E731
    arrays, pixels = decoder.batch_of([32], 2)
    whole = shard_batch(arrays, SeqLayout(32))
    ids, position_ids, labels = (
        paddle.to_tensor(shard_batch(arrays, layout, shift_labels=True)[name]) for name in arrays
    )
    plan = plan_visual(whole["input_ids"], (decoder.IMAGE, decoder.VIDEO), layout, sequence_first=False).to("cpu")
    weights, rng = decoder.parameters(), np.random.default_rng(seed)
    for weight in weights.values() if seed else ():
        weight.set_value(paddle.to_tensor(0.2 * rng.standard_normal(weight.shape).astype("float32")))
    mix = partial(decoder.softmax_mix, attention=mixed)

    def loss():
        visual = decoder.encode(weights, *pixels, whole["input_ids"])
        logits = decoder.decode(weights, ids, position_ids, visual, plan, mix)
        value = sequence_parallel_loss(logits, labels, group=group)
        return around(value, backward=times(float(nranks))) if fault == "factor n" else value

    return loss, list(weights.items()), partial(_reduce, weights, fault)


def _reduce(weights, fault):
    """What a trainer does over context-parallel ranks."""
    for name, weight in weights.items():
        if weight.grad is None or (fault == "missing sum" and name == "tower"):
            continue
        own = weight.grad.clone()
        total = (without_rank(1) if fault == "rank forgotten" else summed)(own.clone())
        if fault == "level forgotten" and name == "tower":
            total[1] = own[1]
        factor = {"second sum": dist.get_world_size(), "mean for the sum": 1 / dist.get_world_size()}.get(fault, 1.0)
        weight.grad.set_value(total * factor)
    if fault == "another's gradient":
        one, other = weights["out0"].grad.clone(), weights["out1"].grad.clone()
        weights["out0"].grad.set_value(other)
        weights["out1"].grad.set_value(one)


def expected(named, faults, nranks):
    """{name: verdict} of a fault, whole where none is named."""
    found = {}
    for name, _ in named:
        wrong = faults.get(name) or faults.get(f"{name.partition('.')[0]}.*") or "whole"
        found[name] = wrong.replace("times n", f"times {nranks}")
    return found
