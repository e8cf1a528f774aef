"""Rows to the ranks that use them, over gloo. Bar: bit-exact with every rank having all rows, forward and backward."""

import itertools
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.distributed.fleet.utils import recompute

from groups import world
from paddle_vl_sp import SeqLayout, add_rows, complete_grad, plan_visual, replace_rows
from paddle_vl_sp.comm import exchange
from paddle_vl_sp.comm.grads import sum_parameter_grads
from paddle_vl_sp.comm.routed import exchange_rows
from paddle_vl_sp.testing.subgroup import SubGroup
from paddle_vl_sp.vision.parallel import encode_shared
from rank_cases import hold, pairs, same_error_everywhere
from tiny_tower import HIDDEN, MERGE, pixels, tower

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))
from wire import Counted

DTYPES = ("float32", "bfloat16", "float16", "float64", "int64")
LENGTH = 48
BATCHES = {
    "uneven": [[1, 4, 6], [1, 2, 2], [1, 6, 4], [1, 2, 4], [1, 4, 4]],
    "one image": [[1, 4, 4]],
    "videos": [[5, 4, 4], [1, 2, 6], [3, 2, 2]],
    "text only": [],
}


def same(got, wanted, told=""):
    """Equal numbers, of one dtype; a zero may have another sign where 0.0 was added to it."""
    assert got.dtype == wanted.dtype, told
    np.testing.assert_array_equal(got.astype("float64").numpy(), wanted.astype("float64").numpy(), err_msg=str(told))


def reversed_group():
    """All ranks in the reverse order, so that none but the middle one is its global rank."""
    return SubGroup(range(dist.get_world_size())[::-1])


# the exchange


def block(rank, count, dtype):
    """Rows [count, 3] of a rank, which every rank can make; small whole numbers, some of them -0.0."""
    rows = np.random.default_rng([rank, count]).integers(-8, 9, size=[count, 3]).astype("float32")
    rows[rows == 0] = -0.0
    return paddle.to_tensor(rows).astype(dtype)


def sends_of(rank, num_ranks, num_rows, kind):
    """The rows that a rank sends to each other: some once, some often, some never."""
    rng = np.random.default_rng([5, rank, num_ranks, num_rows])
    numbers = {"some": rng.integers(0, 4, num_ranks), "none": [0] * num_ranks, "one each": [1] * num_ranks}[kind]
    return [rng.integers(0, num_rows, number if num_rows else 0).tolist() for number in numbers]


def counts_of(num_ranks):
    yield [4] * num_ranks
    yield [5 * (rank % 2) for rank in range(num_ranks)]  # rank 0 has none
    yield [0] * num_ranks


def hold_exchange(group, counts, kind, dtype):
    """What arrives, bit for bit, and the gradients, of whole numbers: against blocks that every rank makes itself."""
    me, num_ranks = group.rank, group.nranks
    sends = [sends_of(rank, num_ranks, count, kind) for rank, count in enumerate(counts)]
    blocks = [[block(seed + rank, count, dtype) for rank, count in enumerate(counts)] for seed in (0, 100)]
    is_float = "int" not in dtype
    xs = [of_ranks[me].clone() for of_ranks in blocks]
    for x in xs:
        x.stop_gradient = not is_float
    rows, arrived = exchange_rows(xs, sends[me], group)
    for got, of_ranks in zip(rows, blocks, strict=True):
        wanted = [of_ranks[source].numpy()[np.array(sends[source][me], int)] for source in range(num_ranks)]
        assert arrived == tuple(len(part) for part in wanted)
        assert got.shape == [sum(arrived), 3]
        assert got.numpy().tobytes() == np.concatenate(wanted).tobytes(), (counts, kind, dtype)
    if not is_float:
        return
    sum(got.astype("float32").sum() * (me + 1 + 8 * i) for i, got in enumerate(rows)).backward()
    for i, x in enumerate(xs):
        grad = np.zeros([counts[me], 3])
        for target, rows_of_target in enumerate(sends[me]):
            np.add.at(grad, np.array(rows_of_target, int), target + 1 + 8 * i)
        same(x.grad, paddle.to_tensor(grad).astype(dtype), (counts, kind, dtype))


def rows_arrive_and_gradients_return():
    for dtype in DTYPES:
        for counts, kind in itertools.product(counts_of(world().nranks), ("some", "none", "one each")):
            hold_exchange(world(), counts, kind, dtype)


def in_a_group_of_other_ranks():
    group = reversed_group()
    assert group.rank != dist.get_rank()
    for counts in counts_of(group.nranks):
        hold_exchange(group, counts, "some", "float32")
    half = dist.get_world_size() // 2
    if half > 1:  # two groups at the same time
        group = SubGroup(range(half)) if dist.get_rank() < half else SubGroup(range(2 * half)[: -half - 1 : -1])
        hold_exchange(group, [4] * half, "some", "float32")


def a_rank_without_a_gradient_takes_part():
    """Its rows need none; the others' gradients are whole numbers, and it is left without one."""
    group = world()
    x = paddle.ones([2, 3])
    x.stop_gradient = group.rank == 0
    rows, _ = exchange_rows(x, [[0]] * group.nranks, group)
    assert not rows.stop_gradient
    rows.sum().backward()
    if group.rank:
        assert x.grad.tolist() == [[group.nranks] * 3, [0] * 3]
    else:
        assert x.grad is None


def by_one_collective_where_there_is_one():
    """A double of alltoall_single, which gloo lacks: the same results by two calls, forward and backward."""
    calls = []

    def alltoall_single(out, x, sends, receives, group):
        assert x.is_contiguous()
        assert [sum(sends), sum(receives)] == [x.shape[0], out.shape[0]]
        calls.append(sends)
        ends = np.cumsum(sends).tolist()
        parts = [x[end - count : end] for end, count in zip(ends, sends, strict=True)]
        with mock.patch.object(exchange, "is_gloo", return_value=True):
            arrived = exchange.all_to_all(parts, [[count, x.shape[1]] for count in receives], group)
        paddle.assign(paddle.concat(arrived), output=out)

    with (
        mock.patch.object(exchange, "is_gloo", return_value=False),
        mock.patch.object(dist, "alltoall_single", alltoall_single),
    ):
        hold_exchange(world(), [4] * world().nranks, "some", "float32")
        assert len(calls) == 2
        hold_plan("uneven", "zigzag", "scattered")


def wrong_rows_on_one_rank_are_everyones_error():
    group, last = world(), world().nranks - 1
    is_odd = group.rank == last
    x, sends = paddle.ones([2, 3]), [[0]] * group.nranks
    same_error_everywhere(lambda: exchange_rows(x, [[2 * is_odd]] * group.nranks, group), group, "sends must be")
    same_error_everywhere(lambda: exchange_rows(x, sends[is_odd:], group), group, f"sends must be {group.nranks} lists")
    other = x.astype("float64") if is_odd else x
    same_error_everywhere(lambda: exchange_rows(other, sends, group), group, "all ranks must send the same")
    other = [x, x] if is_odd else x
    same_error_everywhere(lambda: exchange_rows(other, sends, group), group, "all ranks must send the same")
    other = "rows" if is_odd else x
    same_error_everywhere(lambda: exchange_rows(other, sends, group), group, f"rank {last} says: x must be a Paddle")
    hold_exchange(group, [4] * group.nranks, "some", "float32")  # and the group is as good as before


# a shared tower by plans


def layouts_of(num_ranks):
    """name: every rank's layout"""
    ranks = range(num_ranks)
    step = 2 * num_ranks
    cuts = {
        "contiguous": [SeqLayout(LENGTH, cp_size=num_ranks, cp_rank=rank, cp_mode="contiguous") for rank in ranks],
        "zigzag": [SeqLayout(LENGTH, cp_size=num_ranks, cp_rank=rank) for rank in ranks],
        "sequence parallel": [SeqLayout(LENGTH, sp_size=num_ranks, sp_rank=rank) for rank in ranks],
        "packed": [
            SeqLayout(LENGTH, cp_size=num_ranks, cp_rank=rank, cu_seqlens=(0, step, 3 * step, LENGTH)) for rank in ranks
        ],
    }
    if num_ranks == 4:
        cuts["cp x sp"] = [
            SeqLayout(LENGTH, cp_size=2, cp_rank=rank // 2, sp_size=2, sp_rank=rank % 2) for rank in ranks
        ]
    return cuts


def mask_of(grid, placing, layout):
    """bool [B, LENGTH]: the places of the visual tokens; "front" leaves ranks without any."""
    batch = 1 if layout.cu_seqlens else 2
    number = int(grid.prod(axis=1).sum()) // MERGE**2
    places = np.random.default_rng([3, number]).permutation(batch * LENGTH) if placing == "scattered" else np.arange(99)
    mask = np.zeros(batch * LENGTH, bool)
    mask[places[:number]] = True
    return mask.reshape(batch, LENGTH)


def trained(encode, layout, mask, plan, sequence_first, again=lambda f, *x: f(*x)):
    """Hidden states and their loss's gradients: features in the embedding, levels in two layers. plan: of the result"""
    (features, levels), plan = encode()
    shape = (layout.local_len, mask.shape[0]) if sequence_first else (mask.shape[0], layout.local_len)
    first = paddle.to_tensor(np.random.default_rng(4).normal(size=[*shape, HIDDEN]).astype("float32"))
    first.stop_gradient = False
    hidden = replace_rows(first * 1, features, plan)
    for level in levels:
        hidden = again(lambda x, level: add_rows(paddle.tanh(x), level, plan), hidden, level)
    weight = np.random.default_rng([8, world().rank]).normal(size=[*shape, HIDDEN]).astype("float32")
    (hidden * paddle.to_tensor(weight)).sum().backward()
    return hidden, first.grad, features, levels


def drawn(batch, cut, placing, group):
    """Grids, this rank's layout, the mask [B, LENGTH] and this rank's plan."""
    grid, layout = np.array(BATCHES[batch], np.int64).reshape(-1, 3), layouts_of(group.nranks)[cut][group.rank]
    mask = mask_of(grid, placing, layout)
    return grid, layout, mask, plan_visual(mask, None, layout, sequence_first=cut == "sequence parallel").to("cpu")


def hold_own_rows(own, of_all, plan, told):
    """By bits, in features or levels: the rows that the plan uses."""
    for got, rows in zip(own, of_all, strict=True):
        assert got.numpy().tobytes() == rows.numpy()[plan.gather_indices.numpy()].tobytes(), told


def hold_plan(batch, cut, placing, group=None, encoding=lambda model: model, again=lambda f, *x: f(*x), **options):
    """With a plan and without: hidden states by bits, gradients of pixels, of every parameter and of hidden states."""
    group = group or world()
    grid, layout, mask, plan = drawn(batch, cut, placing, group)
    told, sequence_first = (batch, cut, placing, options), cut == "sequence parallel"
    found = []
    options = {"group": group, "merge_size": MERGE, "replicate_below": 0, **options}
    for is_routed in (False, True):
        model, x = tower(), pixels(grid)
        x.stop_gradient = False

        def encode(model=model, x=x, is_routed=is_routed):
            if is_routed:
                return encode_shared(encoding(model), x, grid, plan=plan, **options)
            return encode_shared(encoding(model), x, grid, **options), plan

        hidden, grad, features, levels = trained(encode, layout, mask, plan, sequence_first, again)
        grads = {name: each.grad for name, each in model.named_parameters()} | {"hidden": grad, "pixels": x.grad}
        found.append((hidden, grads, [features, *levels]))
    (whole, right, of_all), (hidden, grads, own) = found
    assert hidden.numpy().tobytes() == whole.numpy().tobytes(), told
    hold_own_rows(own, of_all, plan, told)
    for name, wanted in right.items():
        assert (grads[name] is None) == (wanted is None), (name, told)
        if wanted is not None:
            same(grads[name], wanted, (name, told))
    return own


def placed_apart(encode, mask, layout):
    """Features before the cut, whose gradient is the same on every rank, and two levels after it."""
    everything = plan_visual(mask, None, SeqLayout(LENGTH), sequence_first=False).to("cpu")
    (features, levels), own = encode()
    rng = np.random.default_rng(4)
    whole = paddle.to_tensor(rng.normal(size=[*mask.shape, HIDDEN]).astype("float32"))
    whole = replace_rows(whole, features, everything) * paddle.to_tensor(rng.normal(size=whole.shape).astype("float32"))
    shape = (mask.shape[0], layout.local_len, HIDDEN)
    rng = np.random.default_rng([8, world().rank])
    hidden, weight = (paddle.to_tensor(rng.normal(size=shape).astype("float32")) for _ in range(2))
    for level in levels:
        hidden = add_rows(paddle.tanh(hidden), level, own)
    (whole.sum() + (hidden * weight).sum()).backward()
    return features, levels, hidden


def hold_levels(batch, cut, placing, group=None, **options):
    """grad="whole" with a plan and without, where complete_grad sums the levels': all by bits, the tower's sum by 1e-5.

    The sum, since without a plan a tower that every rank runs keeps other rows of the levels' gradients.
    """
    group = group or world()
    grid, layout, mask, plan = drawn(batch, cut, placing, group)
    told, found = (batch, cut, placing, options), []
    options = {"group": group, "merge_size": MERGE, "grad": "whole", "replicate_below": 0, **options}
    for is_routed in (False, True):
        model, x = tower(), pixels(grid)

        def encode(model=model, x=x, is_routed=is_routed):
            if is_routed:
                return encode_shared(model, x, grid, plan=plan, **options)
            features, levels = encode_shared(model, x, grid, **options)
            return (features, complete_grad(levels, plan, group)), plan

        outs = placed_apart(encode, mask, layout)
        sum_parameter_grads(model, group)
        found.append((outs, {name: each.grad for name, each in model.named_parameters()}))
    ((features, levels, hidden), right), ((got, own, own_hidden), grads) = found
    assert got.numpy().tobytes() == features.numpy().tobytes(), told
    assert own_hidden.numpy().tobytes() == hidden.numpy().tobytes(), told
    hold_own_rows(own, levels, plan, told)
    for name, wanted in right.items():
        assert (grads[name] is None) == (wanted is None), (name, told)
        if wanted is not None:
            assert np.allclose(grads[name].numpy(), wanted.numpy(), rtol=1e-5, atol=1e-5), (name, told)


def levels_alone_go_to_their_owners():
    for batch, placing in itertools.product(BATCHES, ("scattered", "front")):
        for cut in ("contiguous", "zigzag"):
            hold_levels(batch, cut, placing)
        hold_levels(batch, "contiguous", placing, replicate_below=10**6)  # every rank encodes all
    for policy, idle in (("longest", "skip"), ("count", "dummy")):
        hold_levels("uneven", "zigzag", "scattered", policy=policy, idle=idle)
    group, grid = world(), np.array(BATCHES["uneven"])
    plan = plan_visual(mask_of(grid, "front", SeqLayout(LENGTH)), None, SeqLayout(LENGTH), sequence_first=False)
    for encode, form in ((lambda x, g: tower()(x, g)[0], None), (lambda x, g: (tower()(x, g)[0], []), [])):
        found, _ = encode_shared(encode, pixels(grid), grid, plan=plan, group=group, merge_size=MERGE, grad="whole")
        features, levels = (found, None) if form is None else found
        assert levels == form
        assert features.numpy().tobytes() == tower()(pixels(grid), grid)[0].numpy().tobytes()


def own_rows_are_those_of_all_rows():
    for batch, placing in itertools.product(BATCHES, ("scattered", "front")):
        for cut in layouts_of(world().nranks):
            hold_plan(batch, cut, placing)


def every_sharing():
    for policy, idle in itertools.product(("contiguous", "longest", "count"), ("dummy", "skip")):
        hold_plan("uneven", "zigzag", "scattered", policy=policy, idle=idle)
        hold_plan("text only", "zigzag", "scattered", policy=policy, idle=idle)
    hold_plan("videos", "zigzag", "scattered", split_frames=True, policy="longest")
    for batch in BATCHES:  # every rank encodes all
        hold_plan(batch, "contiguous", "front", replicate_below=10**6)
        hold_plan(batch, "packed", "scattered", replicate_below=10**6)


def other_groups():
    for cut, placing in itertools.product(layouts_of(world().nranks), ("scattered", "front")):
        hold_plan("uneven", cut, placing, group=reversed_group())


def recomputed():
    def recomputing(model):
        return lambda x, g: recompute(lambda x: model(x, g), x, use_reentrant=False)

    hold_plan("uneven", "zigzag", "scattered", encoding=recomputing)
    hold_plan("uneven", "sequence parallel", "front", encoding=recomputing, again=recompute)


def half(model):
    def encode(x, g):
        features, levels = model(x, g)
        return features.astype("bfloat16"), [level.astype("bfloat16") for level in levels]

    return encode


def sixteen_bits():
    hold_plan("uneven", "zigzag", "scattered", encoding=half)


def features_alone_and_frozen_towers():
    group, grid = world(), np.array(BATCHES["uneven"])
    layout = layouts_of(group.nranks)["zigzag"][group.rank]
    plan = plan_visual(mask_of(grid, "scattered", layout), None, layout, sequence_first=False)
    model = tower()
    options = {"group": group, "merge_size": MERGE}
    features, own = encode_shared(lambda x, g: model(x, g)[0], pixels(grid), grid, plan=plan, **options)
    assert own.on_host  # as the plan
    rows = model(pixels(grid), grid)[0].numpy()[plan.gather_indices]
    assert features.numpy().tobytes() == rows.tobytes()
    with paddle.no_grad():
        (features, levels), _ = encode_shared(model, pixels(grid), grid, plan=plan, **options)
        assert features.stop_gradient
    for parameter in model.parameters():
        parameter.stop_gradient = True
    (features, levels), _ = encode_shared(model, pixels(grid), grid, plan=plan, **options)
    assert features.stop_gradient
    assert all(level.stop_gradient for level in levels)


def rows_go_to_their_owners_alone():
    """Of every rank at most its own N / n rows arrive; all bytes together are counted, forward and backward."""
    group, grid = world(), np.array([[1, 4, 4]] * (3 * world().nranks))
    num_rows, row_bytes = int(grid.prod(axis=1).sum()) // MERGE**2, 3 * HIDDEN * 4
    layout = SeqLayout(num_rows, cp_size=group.nranks, cp_rank=group.rank, cp_mode="contiguous")
    plan = plan_visual(np.ones([1, num_rows], bool), None, layout, sequence_first=False)
    for turned, is_away in ((grid, 0), (grid[:-1], None)):
        told = int(turned.prod(axis=1).sum()) // MERGE**2
        if is_away is None:
            mask = np.ones([1, num_rows], bool)
            mask[0, : num_rows - told] = False
            plan = plan_visual(mask, None, layout, sequence_first=False)
        with Counted() as counted:
            (features, levels), own = encode_shared(
                tower(), pixels(turned), turned, group=group, merge_size=MERGE, plan=plan
            )
            forward = counted.sent
            (features.sum() + sum(level.sum() for level in levels)).backward()
        assert features.shape == [len(plan.gather_indices), HIDDEN]
        assert own.num_features == len(plan.gather_indices)
        agreed = (group.nranks - 1) * 8 * (6 + -(-told // 64))  # two small gathers
        sent = exchange_total(forward - agreed), exchange_total(counted.sent - forward)
        if is_away is None:
            assert sent[0] == sent[1] <= told * row_bytes
        else:  # each rank encodes what it uses
            assert sent == (0, 0)


def exchange_total(number):
    total = paddle.to_tensor(float(number), dtype="float64")
    dist.all_reduce(total)
    return float(total)


def wrong_plans_on_one_rank_are_everyones_error():
    group, grid, last = world(), np.array(BATCHES["uneven"]), world().nranks - 1
    layout = layouts_of(group.nranks)["zigzag"][group.rank]
    mask = mask_of(grid, "scattered", layout)
    plan = plan_visual(mask, None, layout, sequence_first=False)
    is_odd = group.rank == last

    def call(**options):
        model = tower()
        options = {"group": group, "merge_size": MERGE, "plan": plan, **options}
        return encode_shared(model, pixels(grid), grid, **options)

    other = mask.copy()
    other[np.nonzero(mask)[0][0], np.nonzero(mask)[1][0]] = False
    short = plan_visual(other, None, layout, sequence_first=False)
    words = f"rank {last} says: the batch has 18 visual tokens but 19 feature rows"
    same_error_everywhere(lambda: call(plan=short if is_odd else plan), group, words)
    same_error_everywhere(lambda: call(plan=None if is_odd else plan), group, "same batch and pass the same arguments")
    wrong = {"grad": "whole"} if is_odd else {}
    same_error_everywhere(lambda: call(**wrong), group, "same batch and pass the same arguments")
    wrong = {"mode": "sum"} if is_odd else {}
    same_error_everywhere(lambda: call(**wrong), group, "moves rows in its own way, got mode='sum'")
    assert call()[1].num_features == len(plan.gather_indices)


ON_ANY = [
    rows_arrive_and_gradients_return,
    a_rank_without_a_gradient_takes_part,
    by_one_collective_where_there_is_one,
    wrong_rows_on_one_rank_are_everyones_error,
    own_rows_are_those_of_all_rows,
    levels_alone_go_to_their_owners,
    every_sharing,
    recomputed,
    sixteen_bits,
    features_alone_and_frozen_towers,
    rows_go_to_their_owners_alone,
    wrong_plans_on_one_rank_are_everyones_error,
]
IN_PAIRS = [*ON_ANY, in_a_group_of_other_ranks, other_groups]  # a SubGroup has an even number of members
LAUNCHES = {2: IN_PAIRS, 3: ON_ANY, 4: IN_PAIRS}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """Bit-exact with all rows on every rank, or the same error on all."""
    hold(__name__, nranks, case)
