"""group=None is no group, one process that holds the whole sequence: in every function that takes a group."""

import inspect
from functools import partial
from unittest import mock

import numpy as np
import paddle
import pytest

import paddle_vl_sp
import paddle_vl_sp.sequence
import tiny_tower
from paddle_vl_sp import SeqLayout, encode_shared, plan_visual
from paddle_vl_sp.attention import (
    ContextParallel,
    gated_delta_net_sp,
    gather_attention,
    gathered_losses,
    ring_attention,
    sequence_parallel_loss,
    token_losses,
    ulysses_attention,
    unshard,
)
from paddle_vl_sp.attention.delta import causal_conv
from paddle_vl_sp.attention.reference import full_attention, recurrent_delta_rule
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.testing import FakeGroup

TOLERANCE = 1e-5  # fp32, relative to the largest value of each array
LENGTH, BOUNDS = 12, (0, 5, 12)
PACKED = SeqLayout(LENGTH, cu_seqlens=BOUNDS)
CUT = SeqLayout(LENGTH, cp_size=2)

alone = pytest.mark.parametrize("group", [None, FakeGroup(0, 1)], ids=["no group", "a group of one"])


def leaf(seed, *shape):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"), stop_gradient=False)


def qkv():
    return [leaf(0, 1, LENGTH, 4, 8), leaf(1, 1, LENGTH, 2, 8), leaf(2, 1, LENGTH, 2, 8)]


def delta_inputs():
    q, k, v = leaf(0, 1, LENGTH, 2, 6), leaf(1, 1, LENGTH, 2, 6), leaf(2, 1, LENGTH, 4, 5)
    gate, strength = leaf(3, 1, LENGTH, 4).detach(), leaf(4, 1, LENGTH, 4).detach()
    return [q, k, v, -gate.abs(), strength.abs()]


def check_equal(function, expected_of, inputs):
    """Output and the gradients of the inputs that need one."""
    leaves = [x for x in inputs if not x.stop_gradient]
    results = []
    for out in (function(*inputs), expected_of(*inputs)):
        weight = leaf(9, *out.shape).detach()
        results.append([out, *paddle.grad((out * weight).sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=TOLERANCE * float(expected.abs().max()))


@alone
@pytest.mark.parametrize("causal", [True, False])
def test_ring_is_full_attention(group, causal):
    """1e-5, output and gradients: one sequence, and packed ones."""
    for layout in (SeqLayout(LENGTH), PACKED):
        check_equal(
            partial(ring_attention, layout=layout, group=group, causal=causal),
            partial(full_attention, causal=causal, cu_seqlens=layout.cu_seqlens),
            qkv(),
        )


@alone
@pytest.mark.parametrize(
    "options", [{"cu_seqlens": BOUNDS}, {"layout": PACKED}, {}], ids=["cu_seqlens", "layout", "one sequence"]
)
def test_ulysses_is_full_attention(group, options):
    """1e-5, output and gradients, with the attention that is built in and with a ring inside."""
    cu_seqlens = BOUNDS if options else None
    inner = partial(ring_attention, layout=SeqLayout(LENGTH, cu_seqlens=cu_seqlens), group=group)
    for attention in (None, inner):
        how = options if attention is None else {"layout": options.get("layout")}
        check_equal(
            partial(ulysses_attention, group=group, attention=attention, **how),
            partial(full_attention, cu_seqlens=cu_seqlens),
            qkv(),
        )


@alone
@pytest.mark.parametrize(
    "options", [{"cu_seqlens": BOUNDS}, {"layout": PACKED}, {}], ids=["cu_seqlens", "layout", "one sequence"]
)
def test_linear_attention_is_the_recurrence(group, options):
    """1e-5, output and gradients, of the convolution's weight too."""
    cu_seqlens = BOUNDS if options else None
    weight = leaf(5, 2 * 2 * 6 + 4 * 5, 3)

    def expected(q, k, v, g, beta, weight):
        parts = [part.reshape([*x.shape[2:], 3]) for x, part in zip((q, k, v), weight.split([12, 12, 20]), strict=True)]
        q, k, v = (causal_conv(x, part, cu_seqlens) for x, part in zip((q, k, v), parts, strict=True))
        return recurrent_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens)

    def function(q, k, v, g, beta, weight):
        return gated_delta_net_sp(q, k, v, g, beta, group=group, conv_weight=weight, **options)

    check_equal(function, expected, [*delta_inputs(), weight])


@alone
def test_the_loss_is_the_mean_of_the_token_losses(group):
    """1e-5, loss and gradients; the token losses of all ranks are this rank's, bit for bit."""
    labels = paddle.to_tensor(np.random.default_rng(6).integers(0, 8, (1, LENGTH)))
    labels[0, 3] = -100

    def expected(logits):
        return paddle.nn.functional.cross_entropy(logits, labels.unsqueeze(-1), reduction="none").sum() / (LENGTH - 1)

    check_equal(partial(sequence_parallel_loss, labels=labels, group=group), expected, [leaf(7, 1, LENGTH, 8)])
    losses = token_losses(leaf(7, 1, LENGTH, 8), labels)
    np.testing.assert_array_equal(gathered_losses(losses, layout=PACKED, group=group).numpy(), losses.numpy())


@alone
@pytest.mark.parametrize("grad", ["partial", "whole"])
def test_unshard_hands_back_the_sequence(group, grad):
    """Pure movement: bit-exact, output and gradient, with padding and without."""
    x, weight = leaf(0, 2, LENGTH, 3), leaf(1, 2, LENGTH, 3).detach()
    joined = unshard(x, SeqLayout(LENGTH), group, axis=1, grad=grad)
    np.testing.assert_array_equal(joined.numpy(), x.numpy())
    np.testing.assert_array_equal(paddle.grad((joined * weight).sum(), x)[0].numpy(), weight.numpy())
    without_padding = unshard(x, PACKED, group, axis=1, grad=grad, cu_seqlens=(0, 4, 10))
    np.testing.assert_array_equal(without_padding.numpy(), x.numpy()[:, [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]])


@alone
@pytest.mark.parametrize("grad", ["partial", "whole"])
def test_the_tower_encodes_all_images(group, grad):
    """The same bits as the tower's own call: features, levels and parameter gradients."""
    grid = paddle.to_tensor([[1, 4, 4], [1, 2, 4]])
    results = []
    for encode in (lambda tower: tower, lambda tower: partial(encode_shared, tower, group=group, merge_size=2)):
        tower = tiny_tower.tower()
        options = {} if encode(tower) is tower else {"grad": grad}
        features, levels = encode(tower)(tiny_tower.pixels(grid.tolist()), grid, **options)
        sum((x * x).sum() for x in (features, *levels)).backward()
        results.append([features, *levels, *(parameter.grad for parameter in tower.parameters())])
    for expected, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got.numpy(), expected.numpy())


def test_a_cut_layout_needs_its_group():
    """Refused before anything is computed: the layout says two ranks, no group is one."""
    half = [x[:, :6] for x in qkv()]
    with pytest.raises(ValueError, match="rank 0 of 2, but the group says rank 0 of 1"):
        ring_attention(*half, layout=CUT, group=None)
    with pytest.raises(ValueError, match="must be that of the group, rank 0 of 1"):
        ulysses_attention(*half, layout=SeqLayout(LENGTH, sp_size=2), group=None)
    with pytest.raises(ValueError, match=r"rank 0 of 2 .*the group says rank 0 of 1"):
        gated_delta_net_sp(*(x[:, :6] for x in delta_inputs()), layout=CUT, group=None)
    with pytest.raises(ValueError, match=r"all 2 x 1 ranks of the layout, and this rank as rank 0; .* rank 0 of 1"):
        unshard(half[0], CUT, None, axis=1)


def test_no_group_among_several_processes_warns():
    """paddle.distributed takes None for the world; here the share would be attended to as if it were the whole."""
    with mock.patch.object(collectives, "dist") as dist, mock.patch.object(collectives, "logger") as logger:
        dist.is_initialized.return_value, dist.get_world_size.return_value = True, 2
        ulysses_attention(*qkv(), group=None)
        gated_delta_net_sp(*delta_inputs(), group=None)
        warned = [call.args[1] for call in logger.warning.call_args_list]
        assert warned == ["ulysses_attention", "gated_delta_net_sp"]
        ulysses_attention(*qkv(), group=None, layout=PACKED)
        ulysses_attention(*qkv(), group=FakeGroup(0, 1))
    assert logger.warning.call_count == 2


def plan():
    return plan_visual(paddle.to_tensor([[1, 9, 9, 1]]), (9,), SeqLayout(4), sequence_first=True)


def shared(group, function="encode_shared"):
    grid = paddle.to_tensor([[1, 4, 4]])
    call = getattr(paddle_vl_sp, function)
    features, levels = call(tiny_tower.tower(), tiny_tower.pixels(grid.tolist()), grid, group=group, merge_size=2)
    return [features, *levels]


def summed(group):
    paddle.seed(0)
    module = paddle.nn.Linear(2, 2)
    module(paddle.ones([1, 2])).sum().backward()
    paddle_vl_sp.sum_parameter_grads(module, group)
    return [parameter.grad for parameter in module.parameters()]


def synced(group):
    paddle.seed(0)
    module = paddle.nn.Linear(2, 2)
    paddle_vl_sp.sync_replicas(module, group)
    return list(module.parameters())


def audited(group):
    paddle.seed(0)
    module = paddle.nn.Linear(2, 1)
    audit = paddle_vl_sp.audit_gradients(lambda: module(paddle.ones([1, 2])).sum(), module, group)
    return sorted(audit.verdicts.items())


def noted(group):
    with paddle_vl_sp.RunReport() as report:
        paddle_vl_sp.note_forward(plan(), group=group)
    return report.read()["visual_tokens"]


def planned(group):
    local = paddle_vl_sp.plan_visual_local(
        paddle.to_tensor([[1, 9, 9, 1]]), (9,), SeqLayout(4), group=group, num_features=2, sequence_first=True
    )
    return [local.update_indices, local.gather_indices]


def losses(group):
    labels = paddle.to_tensor([[1, 2, -100]])
    return sequence_parallel_loss(leaf(0, 1, 3, 4), labels, group=group)


CALLS = {  # every public function that takes a group; each returns what can be compared
    "agree": lambda group: paddle_vl_sp.agree(None, group),
    "all_gather_rows": lambda group: paddle_vl_sp.all_gather_rows(leaf(0, 3, 2), [3], group),
    "audit_gradients": audited,
    "check_replicas": lambda group: paddle_vl_sp.check_replicas(paddle.nn.Linear(2, 2), group),
    "complete_grad": lambda group: paddle_vl_sp.complete_grad([leaf(0, 2, 3)], plan(), group),
    "encode_balanced": partial(shared, function="encode_balanced"),
    "encode_shared": shared,
    "gated_delta_net_sp": lambda group: gated_delta_net_sp(*delta_inputs(), group=group),
    "gather_attention": lambda group: gather_attention(*qkv(), layout=PACKED, group=group),
    "gathered_losses": lambda group: gathered_losses(leaf(0, 1, LENGTH), layout=PACKED, group=group),
    "note_forward": noted,
    "plan_visual_local": planned,
    "ring_attention": lambda group: ring_attention(*qkv(), layout=PACKED, group=group),
    "sequence_parallel_loss": losses,
    "stop_balancing": paddle_vl_sp.stop_balancing,
    "sum_parameter_grads": summed,
    "sync_replicas": synced,
    "ulysses_attention": lambda group: ulysses_attention(*qkv(), group=group, cu_seqlens=BOUNDS),
    "unshard": lambda group: unshard(leaf(0, 2, LENGTH), PACKED, group, axis=1),
}
VALUES = {"ChosenAttention", "ContextParallel", "GradientAudit"}  # hold a group, or its name


def public_functions_of_a_group():
    return {
        name
        for package in (paddle_vl_sp, paddle_vl_sp.attention, paddle_vl_sp.sequence)
        for name in package.__all__
        if callable(getattr(package, name)) and "group" in inspect.signature(getattr(package, name)).parameters
    }


def test_every_public_function_that_takes_a_group_is_tried():
    assert public_functions_of_a_group() - VALUES == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_no_group_is_a_group_of_one(name):
    """The same bits, or the same values."""
    results = [CALLS[name](group) for group in (None, FakeGroup(0, 1))]
    for got, expected in zip(*(x if isinstance(x, list) else [x] for x in results), strict=True):
        if isinstance(expected, paddle.Tensor):
            np.testing.assert_array_equal(got.numpy(), expected.numpy())
        else:
            assert got == expected


def test_context_parallel_of_a_group_of_one():
    """No group is fleet's sep axis here, so it is the group of one that is one process."""
    chosen = ContextParallel("ring", FakeGroup(0, 1)).choose(num_heads=4, num_kv_heads=2, seq_len=LENGTH)
    whole = chosen.attend(*qkv(), layout=chosen.layout(LENGTH, BOUNDS), boundaries=BOUNDS)
    np.testing.assert_array_equal(whole.numpy(), ring_attention(*qkv(), layout=PACKED, group=None).numpy())
