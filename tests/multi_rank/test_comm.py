"""Gathers, complete gradients, replicas over gloo. Bar: bit-exact, also the sums, which are of small whole numbers."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from arrays import leaf
from groups import with_reduce_scatter, world
from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual, replace_rows
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm.agree import agree, check_same, exchange, fingerprint
from paddle_vl_sp.comm.gather import all_gather_rows, gather_rows
from paddle_vl_sp.comm.grads import complete_grad, sum_in_backward, sum_parameter_grads
from paddle_vl_sp.comm.replicas import check_replicas, sync_replicas
from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.testing.subgroup import SubGroup
from paddle_vl_sp.vision.parallel import encode_shared
from rank_cases import hold, pairs, same_error_everywhere
from tiny_tower import pixels

DTYPES = ("float32", "bfloat16", "float16", "float64")


def count_sets(num_ranks):
    ranks = np.arange(num_ranks)
    yield [3] * num_ranks
    yield (ranks + 1).tolist()
    yield (2 * (ranks % 2)).tolist()  # rank 0 has none
    yield [5] + [0] * (num_ranks - 1)
    yield [0] * num_ranks


def block(rank, count, width, dtype="float32"):
    """Rows [count, width] that every rank can make for every rank: small whole numbers, some of them -0.0."""
    rng = np.random.default_rng([rank, count, width])
    rows = rng.integers(-8, 9, size=[count, width]).astype("float32")
    rows[rows == 0] = -0.0
    return paddle.to_tensor(rows).astype(dtype)


def bits(x):
    return x.numpy().tobytes()


def weights(rank, total, width):
    rng = np.random.default_rng([7, rank, total, width])
    return paddle.to_tensor(rng.integers(-8, 9, size=[total, width]).astype("float32"))


# cases, run on every rank


def gather_moves_every_bit():
    group = world()
    for counts in count_sets(group.nranks):
        for dtype in (*DTYPES, "int64", "int32"):
            for mode in ("auto", "max", "sum", "ragged"):
                blocks = [block(rank, count, 3, dtype) for rank, count in enumerate(counts)]
                whole = all_gather_rows(blocks[group.rank], counts, group, mode=mode)
                assert whole.dtype == blocks[0].dtype
                assert whole.shape == [sum(counts), 3]
                assert bits(whole) == b"".join(map(bits, blocks)), (counts, dtype, mode)


def gather_keeps_nan():
    group = world()
    for mode in ("max", "sum", "ragged"):
        x = paddle.full([group.rank, 2], float("nan"))
        whole = all_gather_rows(x, list(range(group.nranks)), group, mode=mode)
        assert whole.isnan().all()


def several_tensors_travel_together():
    group = world()
    counts = list(range(group.nranks))
    shapes = ([2], [3, 2], [])
    xs = [block(group.rank, counts[group.rank], 6)[:, :width] for width in (2, 6, 1)]
    xs = [x.reshape([x.shape[0], *shape]) for x, shape in zip(xs, shapes, strict=True)]
    wholes = all_gather_rows(xs, counts, group, check=True)
    expected = np.concatenate([block(rank, count, 6).numpy() for rank, count in enumerate(counts)])
    for whole, shape, width in zip(wholes, shapes, (2, 6, 1), strict=True):
        assert whole.shape == [sum(counts), *shape]
        assert whole.numpy().tobytes() == expected[:, :width].tobytes()


def partial_gradients_are_summed_and_cut():
    group = world()
    for counts in count_sets(group.nranks):
        for mode in ("auto", "max", "sum", "ragged"):
            x = leaf(block(group.rank, counts[group.rank], 3))
            whole = all_gather_rows(x.clone(), counts, group, mode=mode)
            (whole * weights(group.rank, sum(counts), 3)).sum().backward()
            begin = sum(counts[: group.rank])
            expected = sum(weights(rank, sum(counts), 3) for rank in range(group.nranks))
            expected = expected[begin : begin + counts[group.rank]]
            assert x.grad.shape == x.shape
            assert bits(x.grad) == bits(expected), (counts, mode)


def partial_gradients_by_reduce_scatter():
    with with_reduce_scatter() as calls:
        partial_gradients_are_summed_and_cut()
        gather_in_any_order()
    group = world()
    assert {(size * group.nranks, 3) for size in (3, group.nranks, 2, 5)} == set(calls)  # padded to the longest


def whole_gradients_are_cut_only():
    group = world()
    for counts in count_sets(group.nranks):
        x = leaf(block(group.rank, counts[group.rank], 3))
        same = weights(0, sum(counts), 3)
        (all_gather_rows(x.clone(), counts, group, grad="whole") * same).sum().backward()
        begin = sum(counts[: group.rank])
        assert bits(x.grad) == bits(same[begin : begin + counts[group.rank]])


def autograds_own_buffer_is_left_alone():
    group = world()
    for grad in ("partial", "whole"):
        x = leaf(block(group.rank, 2, 3))
        whole = all_gather_rows(x, [2] * group.nranks, group, grad=grad)
        whole.retain_grads()
        mine = weights(group.rank, 2 * group.nranks, 3)
        (whole * mine).sum().backward()
        assert bits(whole.grad) == bits(mine)
        paddle.assign(paddle.zeros_like(x.grad), output=x.grad)
        assert bits(whole.grad) == bits(mine)


def strided_rows_and_strided_gradients():
    group = world()
    counts = [rank + 1 for rank in range(group.nranks)]
    blocks = [block(rank, count, 6)[:, 1:4] for rank, count in enumerate(counts)]
    expected = np.concatenate([rows.numpy() for rows in blocks])
    total = sum(weights(rank, len(expected), 3) for rank in range(group.nranks)).numpy()
    begin = sum(counts[: group.rank])
    for mode in ("max", "sum", "ragged"):
        wide = leaf(block(group.rank, counts[group.rank], 6))
        whole = all_gather_rows(wide[:, 1:4], counts, group, mode=mode)
        assert bits(whole) == expected.tobytes()
        (whole.t() * weights(group.rank, len(expected), 3).t()).sum().backward()
        np.testing.assert_array_equal(wide.grad[:, 1:4].numpy(), total[begin : begin + counts[group.rank]])


def gather_in_any_order():
    group = world()
    counts = [rank + 1 for rank in range(group.nranks)]
    rows = UnevenRows(tuple(counts), np.random.default_rng(0).permutation(sum(counts)))
    blocks = np.concatenate([block(rank, count, 3).numpy() for rank, count in enumerate(counts)])
    total = sum(weights(rank, len(blocks), 3) for rank in range(group.nranks)).numpy()
    for mode in ("max", "sum", "ragged"):
        for grad in ("partial", "whole"):
            x = leaf(block(group.rank, counts[group.rank], 3))
            (whole,) = gather_rows([x.clone()], rows, group, mode, grad, True)
            assert whole.numpy().tobytes() == blocks[rows.order].tobytes()
            (whole * weights(group.rank if grad == "partial" else 0, len(blocks), 3)).sum().backward()
            incoming = total if grad == "partial" else weights(0, len(blocks), 3).numpy()
            expected = np.empty_like(incoming)
            expected[rows.order] = incoming
            begin = sum(counts[: group.rank])
            assert x.grad.numpy().tobytes() == expected[begin : begin + len(x)].tobytes()


def gathers_over_sub_groups():
    """Rows of a grid, in another order than the world's; only even worlds have such sub-groups."""
    world_size, me = dist.get_world_size(), dist.get_rank()
    if world_size % 2:
        return
    group = SubGroup([me - me % 2 + 1, me - me % 2])
    for mode in ("max", "sum", "ragged"):
        for counts in ([2, 1], [0, 2]):
            x = leaf(block(me, counts[group.rank], 3))
            whole = all_gather_rows(x.clone(), counts, group, mode=mode, check=True)
            blocks = [block(rank, count, 3) for rank, count in zip(group.ranks, counts, strict=True)]
            assert bits(whole) == b"".join(map(bits, blocks))
            (whole * (group.rank + 1)).sum().backward()
            assert (x.grad == 3).all()
    x = paddle.full([2], group.rank + 1.0)
    dist.reduce(x, dst=group.ranks[0], group=group)
    assert (x == (3 if group.rank == 0 else 2)).all()  # the others keep what they had


def a_second_gradient_is_refused():
    """Paddle makes none of a PyLayer: what comes out is wrong, or nothing, without a word."""
    group = world()
    plan = VisualPlan(np.zeros(0), np.zeros(0), (1, 1), 2)
    for name, make in {
        "CompleteGrad": lambda x: complete_grad([x], plan, group)[0],
        "GatherRows": lambda x: all_gather_rows(x, [2] * group.nranks, group),
    }.items():
        x = leaf(paddle.ones([2, 3]))
        with pytest.raises(OSError, match=f"ValueError: {name} has no second gradient"):
            paddle.grad(make(x * x).sum(), [x], create_graph=True)
        (first,) = paddle.grad(make(x * x).sum(), [x])
        assert (first == 2 * group.nranks).all()


def any_one_of_several_may_need_a_gradient():
    """On all ranks, or on all but the first, which then comes to the backward all the same."""
    group = world()
    for needing in range(3):
        for check, first_rank in ((False, 0), (True, 0), (True, 1)):
            xs = [block(group.rank, 2, 3) for _ in range(3)]
            xs[needing].stop_gradient = group.rank < first_rank
            wholes = all_gather_rows(xs, [2] * group.nranks, group, check=check)
            assert not exchange([whole.stop_gradient for whole in wholes], group)[:, needing].any()
            sum(whole.sum() for whole in wholes).backward()
            for i, x in enumerate(xs):
                assert (x.grad is not None) == (i == needing and group.rank >= first_rank)
                assert x.grad is None or (x.grad == group.nranks).all()


def an_idle_rank_comes_to_the_backward():
    """Its x is a constant; without the agreement it would leave the others waiting."""
    group = world()
    counts = [0] + [2] * (group.nranks - 1)
    x = block(group.rank, counts[group.rank], 3)
    x.stop_gradient = group.rank == 0
    whole = all_gather_rows(x.clone(), counts, group, check=True)
    assert not whole.stop_gradient
    (whole * weights(group.rank, sum(counts), 3)).sum().backward()
    assert group.rank == 0 or x.grad is not None


def nothing_needs_a_gradient():
    group = world()
    whole = all_gather_rows(block(group.rank, 2, 3), [2] * group.nranks, group, check=True)
    assert whole.stop_gradient
    with paddle.no_grad():
        x = leaf(block(group.rank, 2, 3))
        assert all_gather_rows(x, [2] * group.nranks, group, check=True).stop_gradient


def a_gather_of_differing_ranks_is_an_error_on_all():
    group = world()
    counts, last = [2] * group.nranks, group.nranks - 1

    def gather(x, counts=counts, **options):
        return lambda: all_gather_rows(x, counts, group, check=True, **options)

    x = paddle.ones([2, 3])
    odd = group.rank == last
    half = x.astype("bfloat16") if odd else x
    same_error_everywhere(gather(half), group, f"rank {last} gathers .*bfloat16", "float32")
    same_error_everywhere(gather(paddle.ones([2, 4]) if odd else x), group, f"rank {last} gathers .*4 wide", "3 wide")
    same_error_everywhere(gather([x, x] if odd else x), group, f"rank {last} gathers 2 tensor", "a tensor")
    same_error_everywhere(gather(x[:1] if odd else x), group, f"rank {last} of .* failed", r"\[1\] rows", "says 2")
    same_error_everywhere(gather(x, grad="whole" if odd else "partial"), group, f"rank {last} .fingerprint", "differs")
    same_error_everywhere(gather(x, mode="least" if odd else "max"), group, "'auto', 'max'.*'least'")
    for wrong in (None, np.ones([2, 3], "float32"), [x, None]):
        same_error_everywhere(
            gather(wrong if odd else x), group, f"rank {last} of .* failed", "x must be a Paddle tensor, or a list"
        )
    with pytest.raises(RuntimeError, match=f"rank {last} of .* failed.*TypeError"):
        gather(x, counts=None if odd else counts)()
    other = np.array(counts) if odd else counts
    assert gather(x, counts=other)().shape == [2 * group.nranks, 3]  # the same numbers of another type


def each_argument_of_a_gather_must_be_the_same():
    """Every one that goes into the fingerprint, by itself; each value alone is allowed."""
    group, x = world(), paddle.ones([2, 3])
    odd = group.rank == group.nranks - 1
    same = {"counts": [2] * group.nranks, "mode": "max", "grad": "partial"}
    for name, other in {"counts": [3, *same["counts"][1:]], "mode": "sum", "grad": "whole"}.items():
        given = {**same, name: other} if odd else same
        gather = lambda given=given: all_gather_rows(x, group=group, check=True, **given)  # noqa: E731
        same_error_everywhere(gather, group, f"same arguments here: rank {group.nranks - 1} .fingerprint", "differs")


def wrong_arguments_are_told():
    group = world()
    x = paddle.ones([2, 3])
    for counts in ([2], [-1] * group.nranks):
        with pytest.raises(ValueError, match="counts must be the rows of each of"):
            all_gather_rows(x, counts, group)
    with pytest.raises(ValueError, match=r"one dtype out of .*\['float32', 'float64'\]"):
        all_gather_rows([x, x.astype("float64")], [2] * group.nranks, group)
    with pytest.raises(ValueError, match=r"one dtype out of .*bool"):
        all_gather_rows(x > 0, [2] * group.nranks, group)


def one_error_is_everyones():
    group = world()
    agree(None, group)
    for failing in range(group.nranks):
        error = ValueError(f"{failing} images, expected 7") if group.rank >= failing else None
        words = f"rank {failing} says: {failing} images, expected 7"
        same_error_everywhere(lambda error=error: agree(error, group), group, words)
    with pytest.raises(RuntimeError, match=r"rank 0 of .*MemoryError: 3 bytes"):
        agree(MemoryError("3 bytes") if group.rank == 0 else None, group)


def different_batches_are_seen():
    group = world()
    ids = np.arange(12).reshape(2, 6)
    assert fingerprint(ids) == fingerprint(paddle.to_tensor(ids.astype("int32")))
    assert fingerprint(ids) != fingerprint(ids.reshape(3, 4))
    check_same(fingerprint(ids), "ids", group)
    ids[1, 3] += group.rank == 1
    same_error_everywhere(lambda: check_same(fingerprint(ids), "ids", group), group, "same ids: rank 1", "from rank 0")


def no_group_where_there_are_ranks_is_told():
    group, module = world(), small_module()
    module(paddle.ones([1, 3])).sum().backward()
    no_rows = VisualPlan(np.zeros(0), np.zeros(0), (1, 1), 2)
    calls = {
        "check_replicas": lambda of: check_replicas(module, of),
        "sync_replicas": lambda of: sync_replicas(module, of),
        "sum_parameter_grads": lambda of: sum_parameter_grads(module, of),
        "agree": lambda of: agree(None, of),
        "encode_shared": lambda of: encode_shared(lambda x, _: x[::4], pixels(GRID), GRID, group=of, merge_size=2),
        "complete_grad": lambda of: complete_grad([paddle.ones([2, 3])], no_rows, of),
    }
    for name, call in calls.items():
        for of, expected in ((None, [name]), (group, []), (SimpleNamespace(nranks=1, rank=0), [])):
            with mock.patch.object(collectives, "logger") as logger:
                call(of)
            told = [words % tuple(rest) for (words, *rest), _ in logger.warning.call_args_list]
            assert [line.split()[0] for line in told] == expected
            assert all("group=None" in line and "get_group(0)" in line for line in told)


GRID = np.array([[1, 2, 2]])
TOWER_INPUT = np.random.default_rng(1).integers(-3, 4, size=[9, 4]).astype("float32")  # [N, C]
UNEVEN = np.zeros([2, 12], dtype=bool)  # [B, S]
UNEVEN[0, 1:5] = UNEVEN[1, 4:9] = True  # 2 ranks have 6, 3; 3 ranks 3, 5, 1; 4 ranks 2, 4, 3, 0
FIRST_ONLY = np.zeros([2, 12], dtype=bool)
FIRST_ONLY[0, 0:3] = True


def train_levels(layout, group, dtypes, mask, complete=complete_grad, used=None, frozen=()):
    """The gradients of one weight a level: features go into the embedding and are added in deepstack layers."""
    levels = range(len(dtypes))
    tower = [leaf(paddle.full([4, 5], 1.0 + level)) for level in levels]
    x = leaf(paddle.to_tensor(TOWER_INPUT[: mask.sum()]))  # matmul of no rows has no backward for its weight alone
    features = [(x @ weight).astype(dtype) for weight, dtype in zip(tower, dtypes, strict=True)]
    for level in frozen:
        features[level] = features[level].detach()
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
    features = complete(features, plan, group)
    position = layout.positions()
    hidden = leaf(paddle.zeros([layout.local_len, 2, 5])) * 1
    loss = 0
    for level in levels if used is None else used:
        hidden = (replace_rows if level == 0 else add_rows)(hidden, features[level], plan)
        weight = np.random.default_rng([3, level]).integers(-3, 4, size=[12, 2, 5]).astype("float32")
        loss = loss + (hidden * paddle.to_tensor(weight[position])).sum()
    loss.backward()
    return [weight.grad for weight in tower]


def feature_gradients_are_complete():
    group = world()
    mine, all_of_it = SeqLayout(12, sp_size=group.nranks, sp_rank=group.rank), SeqLayout(12)
    options = [
        (["float32"] * 4, {}),
        (["float32"], {}),
        (["float32"] * 4, {"used": [1, 3]}),
        (["float32"] * 3, {"frozen": [1]}),
        (["bfloat16"] * 2, {}),
        (["float16"] * 2, {}),
        (["float32", "bfloat16", "float16"], {}),
        (["float64", "float32"], {}),
        (["bfloat16", "float32", "float64"], {}),
    ]
    for mask in (UNEVEN, FIRST_ONLY, np.zeros_like(UNEVEN)):
        for dtypes, option in options:
            here = train_levels(mine, group, dtypes, mask, **option)
            alone = train_levels(all_of_it, None, dtypes, mask, **option)
            for got, expected in zip(here, alone, strict=True):
                got, expected = (np.zeros([4, 5], "float32") if x is None else x.numpy() for x in (got, expected))
                np.testing.assert_array_equal(got, expected, str((dtypes, option)))


ONE_BIT_MORE = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def levels_of_two_dtypes_keep_every_bit():
    """A gradient that only its own dtype can hold, whichever level comes first."""
    group, plan = world(), VisualPlan(np.zeros(0), np.zeros(0), (1, 1), 1)
    for dtypes in itertools.permutations(ONE_BIT_MORE, 2):
        levels = [leaf(paddle.zeros([1, 2], dtype)) for dtype in dtypes]
        grads = [paddle.full([1, 2], 1 + ONE_BIT_MORE[dtype], "float64").astype(dtype) for dtype in dtypes]
        owned = [grad if group.rank == 0 else paddle.zeros_like(grad) for grad in grads]
        paddle.autograd.backward(complete_grad(levels, plan, group), owned)
        for level, grad in zip(levels, grads, strict=True):
            assert level.grad.dtype == grad.dtype
            assert bits(level.grad) == bits(grad), dtypes


def without_completion_they_are_not():
    """The reason for complete_grad: what each rank's tower sees otherwise."""
    group = world()
    mine = SeqLayout(12, sp_size=group.nranks, sp_rank=group.rank)
    partial = train_levels(mine, group, ["float32"] * 3, UNEVEN, complete=lambda features, *_: features)
    whole = train_levels(SeqLayout(12), None, ["float32"] * 3, UNEVEN)
    for got, expected in zip(partial, whole, strict=True):
        assert (got - expected).norm() / expected.norm() > 0.3


def completion_is_one_collective():
    group, calls, real = world(), [], dist.all_reduce
    dist.all_reduce = lambda x, **options: (calls.append(x.size), real(x, **options))
    try:
        train_levels(SeqLayout(12, sp_size=group.nranks, sp_rank=group.rank), group, ["float32"] * 4, UNEVEN)
    finally:
        dist.all_reduce = real
    assert calls == [4 * 9 * 5]


def completion_is_left_out_where_it_can_be():
    group = world()
    plan = VisualPlan(np.zeros(0), np.zeros(0), (1, 1), 2)
    x, constant = leaf(paddle.ones([2, 3])) * 1, paddle.ones([2, 3])
    assert complete_grad([x], plan, None)[0] is x
    with pytest.raises(ValueError, match="takes a list of levels"):
        complete_grad(x, plan, None)
    assert complete_grad([constant], plan, group)[0] is constant
    with paddle.no_grad():
        assert complete_grad([x], plan, group)[0] is x
    (completed,) = complete_grad([x], plan, group)
    assert completed.data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match=r"the plan is for 2 feature rows, got levels of \[3\]"):
        complete_grad([paddle.ones([3, 3])], plan, group)


def completion_takes_strided_features_and_leaves():
    group = world()
    plan = VisualPlan(np.zeros(0), np.zeros(0), (1, 1), 3)
    x = leaf(paddle.ones([2, 3]))
    wide = leaf(paddle.ones([3, 4]))
    strided, sliced, itself = complete_grad([x.t(), wide[:, 1:3], wide], plan, group)
    (strided * 2 + sliced + itself[:, :2]).sum().backward()
    assert (x.grad == 2 * group.nranks).all()
    assert wide.grad.tolist() == [[group.nranks * value for value in (1, 2, 1, 0)]] * 3


def small_module():
    paddle.seed(5)
    return paddle.nn.Sequential(paddle.nn.Linear(3, 4), paddle.nn.Linear(4, 2))


def drifted_replicas_are_found_and_mended():
    group, module = world(), small_module()
    assert check_replicas(module, group) == []
    optimizer = paddle.optimizer.AdamW(0.01, parameters=module.parameters())
    for _ in range(2):
        (module(paddle.ones([1, 3])) * (1 + group.rank)).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    with paddle.no_grad():
        paddle.assign(module[1].bias + 0.5 * (group.rank == group.nranks - 1), output=module[1].bias)
    found = {drift.name: drift for drift in check_replicas(module, group)}
    drift = found["1.bias"]
    assert drift.largest[0] == 0
    assert drift.largest[-1] == pytest.approx(0.5, abs=0.1)
    assert "1.bias: differs from rank 0's copy by [0, " in str(drift)
    sync_replicas(module, group, optimizer)
    assert check_replicas(module, group) == []
    for _ in range(2):
        module(paddle.ones([1, 3])).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    assert check_replicas(module, group) == []  # the moments, too, were made equal


def replicas_that_are_not_alike_are_refused():
    """Each thing that goes into the fingerprint, by itself: a shape, a dtype, a name."""
    group = world()
    other = group.rank == 1
    of_half = paddle.nn.Linear(3, 4)
    modules = {
        "shape": paddle.nn.Linear(3, 4 + other),
        "transposed": paddle.nn.Linear(*((4, 3) if other else (3, 4)), bias_attr=False),
        "dtype": of_half.to(dtype="bfloat16") if other else of_half,
        "name": paddle.nn.ParameterDict({"b" if other else "a": paddle.nn.Linear(3, 4).weight}),
    }
    for module in modules.values():
        for function in (check_replicas, sync_replicas):
            same_error_everywhere(
                lambda function=function, module=module: function(module, group),
                group, "same parameters .names, shapes", "rank 1",
            )  # fmt: skip


def master_weights_are_made_equal_too():
    """They overwrite 16-bit parameters at the next step: also behind a wrapper, and of replicas only."""
    group, module = world(), small_module()
    module.to(dtype="bfloat16")
    module[1].weight.is_distributed = True
    masters = {p.name: paddle.full(p.shape, 1.0 + group.rank) for p in module.parameters()}
    moments = {p.name: paddle.full(p.shape, 5.0 + group.rank) for p in module.parameters()}
    optimizer = SimpleNamespace(_accumulators={"moment1": moments}, _master_weights=masters)
    for given in (optimizer, SimpleNamespace(_inner_opt=optimizer)):
        for states, start in ((masters, 1.0), (moments, 5.0)):
            for x in states.values():
                paddle.assign(paddle.full_like(x, start + group.rank), output=x)
        sync_replicas(module, group, given)
        for p in module.parameters():
            rank = group.rank if p is module[1].weight else 0
            assert (masters[p.name] == 1.0 + rank).all()
            assert (moments[p.name] == 5.0 + rank).all()


def replicas_leave_tensor_parallel_parameters_alone():
    group, module = world(), small_module()
    module[0].weight.is_distributed = True
    with paddle.no_grad():
        paddle.assign(module[0].weight + float(group.rank), output=module[0].weight)
    assert check_replicas(module, group) == []
    before = bits(module[0].weight)
    sync_replicas(module, group)
    assert bits(module[0].weight) == before


def nan_and_16_bit_replicas():
    group, module = world(), small_module()
    module.to(dtype="bfloat16")
    with paddle.no_grad():
        paddle.assign(paddle.full([2], float("nan")).astype("bfloat16"), output=module[1].bias)
    assert check_replicas(module, group) == []
    with paddle.no_grad():
        paddle.assign(paddle.full([2], float("nan") if group.rank else 1.0).astype("bfloat16"), output=module[1].bias)
    (drift,) = check_replicas(module, group)
    assert drift.largest == (0.0, *[float("inf")] * (group.nranks - 1))


def infinite_replicas():
    group, module = world(), small_module()
    infinity, own = float("inf"), float(group.rank)
    with paddle.no_grad():
        paddle.assign(paddle.to_tensor([infinity, -infinity]), output=module[1].bias)
        assert check_replicas(module, group) == []
        paddle.assign(paddle.to_tensor([infinity, 4 + own]), output=module[1].bias)
        (drift,) = check_replicas(module, group)
        assert drift.largest == tuple(range(group.nranks))
        assert drift.relative == (group.nranks - 1) / 4  # of the largest finite value
        paddle.assign(paddle.to_tensor([infinity if group.rank else -infinity, 4.0]), output=module[1].bias)
        (drift,) = check_replicas(module, group)
        assert drift.largest == (0.0, *[infinity] * (group.nranks - 1))
        assert drift.relative == infinity


def sums_in_the_backward_once_a_parameter():
    """Exact: called twice, of a shared weight, of one that was frozen at the call, and of one that came later."""
    group = world()
    first, second = paddle.nn.LayerNorm(3), paddle.nn.LayerNorm(3)
    second.weight = first.weight
    first.weight.stop_gradient = True
    for layer in (first, second, first):
        sum_in_backward(layer, world)
    first.weight.stop_gradient = False
    later = paddle.nn.LayerNorm(3)
    later.weight = paddle.create_parameter([3], "float32")
    sum_in_backward(later, world)
    (first.weight.sum() + later.weight.sum()).backward()
    for layer in (first, later):
        assert (layer.weight.grad.numpy() == group.nranks).all()


CASES = [
    sums_in_the_backward_once_a_parameter,
    gather_moves_every_bit,
    gather_keeps_nan,
    several_tensors_travel_together,
    partial_gradients_are_summed_and_cut,
    partial_gradients_by_reduce_scatter,
    whole_gradients_are_cut_only,
    autograds_own_buffer_is_left_alone,
    strided_rows_and_strided_gradients,
    gather_in_any_order,
    gathers_over_sub_groups,
    a_second_gradient_is_refused,
    any_one_of_several_may_need_a_gradient,
    an_idle_rank_comes_to_the_backward,
    nothing_needs_a_gradient,
    a_gather_of_differing_ranks_is_an_error_on_all,
    each_argument_of_a_gather_must_be_the_same,
    wrong_arguments_are_told,
    one_error_is_everyones,
    different_batches_are_seen,
    no_group_where_there_are_ranks_is_told,
    feature_gradients_are_complete,
    levels_of_two_dtypes_keep_every_bit,
    without_completion_they_are_not,
    completion_is_one_collective,
    completion_is_left_out_where_it_can_be,
    completion_takes_strided_features_and_leaves,
    drifted_replicas_are_found_and_mended,
    replicas_that_are_not_alike_are_refused,
    master_weights_are_made_equal_too,
    replicas_leave_tensor_parallel_parameters_alone,
    nan_and_16_bit_replicas,
    infinite_replicas,
]


LAUNCHES = dict.fromkeys((2, 3, 4), CASES)


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """Bit-exact on every rank, or the same error on all."""
    hold(__name__, nranks, case)


def test_fingerprints_tell_things_apart():
    """Exact: all different values differ, and equal ones of other types do not."""
    floats = np.array([0.1, 0.9])
    different = [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        (np.array([1]), 23),
        (np.array([1, 23]),),
        (floats,),
        (floats[::-1],),
        (floats.astype("float32"),),
        (np.zeros(2),),
        (np.zeros(2, "int64"),),
        ([np.arange(3000)],),  # whose repr leaves most of it out
        ([np.arange(3000) ^ (np.arange(3000) == 1500)],),
        ([1], 2),
        ([1, 2],),
        (),
    ]
    assert len({fingerprint(*values) for values in different}) == len(different)
    assert fingerprint(floats) == fingerprint(paddle.to_tensor(floats))
    assert fingerprint((np.int64(2), 0.5)) == fingerprint([2, np.float64(0.5)])


def test_what_travels_stays_where_the_rows_are():
    """A gloo group on a machine with a GPU: the default device is not that of the rows."""
    made = paddle.zeros([6, 2])
    rows = SimpleNamespace(shape=[3, 2], size=0, dtype="float32", new_empty=lambda shape: made[: shape[0]])
    assert collectives.all_gather(rows, SimpleNamespace(nranks=2)).data_ptr() == made.data_ptr()
