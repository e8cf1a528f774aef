"""Vision DP over gloo against one process. Bar: features bit-exact; gradients to 1e-5 (they are summed otherwise)."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.autograd import PyLayer
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import recompute

from groups import topology_of, with_reduce_scatter, world
from paddle_vl_sp import SeqLayout, add_rows, plan_visual, replace_rows
from paddle_vl_sp.comm import collectives
from paddle_vl_sp.comm import grads as comm_grads
from paddle_vl_sp.comm.agree import exchange
from paddle_vl_sp.comm.grads import complete_grad, mark_for_sum, sum_parameter_grads
from paddle_vl_sp.comm.replicas import check_replicas, sync_replicas
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel
from paddle_vl_sp.vision.parallel import encode_shared
from rank_cases import hold, pairs, same_error_everywhere
from tiny_tower import CHANNELS, HIDDEN, MERGE, pixels, tower

BATCHES = {
    "uneven": [[1, 4, 6], [1, 2, 2], [1, 6, 4], [1, 2, 4], [1, 4, 4]],
    "one image": [[1, 4, 4]],
    "two images": [[1, 8, 6], [1, 2, 4]],
    "videos": [[5, 4, 4], [1, 2, 6], [3, 2, 2]],
    "text only": [],
}


def grid_of(name):
    return np.array(BATCHES[name], dtype=np.int64).reshape(-1, 3)


def weights(rank, number, rows):
    """Each rank's own loss weights for features and levels, [number, rows, HIDDEN]."""
    rng = np.random.default_rng([rank, rows])
    return paddle.to_tensor(rng.normal(size=[number, rows, HIDDEN]).astype("float32"))


def loss_of(features, levels, weight):
    return sum((x * w).sum() for x, w in zip([features, *levels], weight, strict=True))


def shared(model, grid, **options):
    options = {"group": world(), "merge_size": MERGE, "replicate_below": 0, **options}
    return encode_shared(model, pixels(grid), paddle.to_tensor(grid), **options)


def grads(model):
    return [None if p.grad is None else p.grad.numpy() for p in model.parameters()]


def reference(grid, weight):
    """Features and gradients of one process that encodes everything, with the summed weights of all ranks."""
    model = tower()
    if not len(grid):
        return None, None, [np.zeros(p.shape, "float32") for p in model.parameters()]
    features, levels = model(pixels(grid), grid)
    loss_of(features, levels, weight).backward()
    return features, levels, grads(model)


def hold_close(got, expected, told=""):
    for here, there in zip(got, expected, strict=True):
        here = np.zeros_like(there) if here is None else here
        assert np.abs(here - there).max() <= 1e-5 * max(np.abs(there).max(), 1), told


# cases, run on every rank


def hold_shared(batch, grad="partial", **options):
    group, grid = world(), grid_of(batch)
    rows = int(grid.prod(axis=1).sum()) // MERGE**2
    own = weights(group.rank if grad == "partial" else 0, 3, rows)
    total = sum(weights(rank, 3, rows) for rank in range(group.nranks)) if grad == "partial" else own
    expected, expected_levels, expected_grads = reference(grid, total)
    model = tower()
    features, levels = shared(model, grid, grad=grad, **options)
    told = str((batch, grad, options))
    for got, wanted in zip([features, *levels], [expected, *(expected_levels or [None] * 2)], strict=True):
        assert got.shape == [rows, HIDDEN], told
        assert wanted is None or got.numpy().tobytes() == wanted.numpy().tobytes(), told
    loss_of(features, levels, own).backward()
    sum_parameter_grads(model, group)
    hold_close(grads(model), expected_grads, told)
    return model


def features_and_gradients_equal_one_process():
    for batch, policy, grad in itertools.product(BATCHES, ("contiguous", "longest", "count"), ("partial", "whole")):
        hold_shared(batch, policy=policy, grad=grad)


def idle_ranks_may_skip():
    for batch, policy, grad in itertools.product(BATCHES, ("contiguous", "longest"), ("partial", "whole")):
        model = hold_shared(batch, policy=policy, grad=grad, idle="skip")
        busy = world().rank < len(BATCHES[batch]) or not BATCHES[batch]
        assert len(model.calls) == int(busy)


def every_gather_mode():
    for batch, mode in itertools.product(("uneven", "two images"), ("max", "sum", "ragged")):
        hold_shared(batch, mode=mode, policy="longest")


def gradients_by_reduce_scatter():
    with with_reduce_scatter() as calls:
        hold_shared("uneven", mode="max")
        hold_shared("uneven", mode="max", policy="longest")
    assert len(calls) == 2


def videos_are_split_by_frames():
    for policy in ("contiguous", "longest"):
        model = hold_shared("videos", split_frames=True, policy=policy)
        assert sum(t * h * w for t, h, w in model.calls[0]) < 5 * 16  # less than the longest video
    (grid,) = hold_shared("videos", split_frames=True).calls
    if world().rank == 0:
        assert grid[0][0] > 1  # frames that follow each other stay one entry of the grid


def work_that_is_not_worth_sharing_is_replicated():
    """The same invariant below the threshold: the sum of the ranks' parameter gradients is the whole gradient."""
    for batch, grad in itertools.product(BATCHES, ("partial", "whole")):
        model = hold_shared(batch, grad=grad, replicate_below=10**6)
        assert len(model.calls) == 1
        assert model.calls[0] == (BATCHES[batch] or [[1, MERGE, MERGE]])
    model = hold_shared("one image", replicate_below=1)  # sharing one image spares nobody anything
    assert model.calls == [BATCHES["one image"]]


def every_rank_calls_the_tower_once():
    for batch in BATCHES:
        model = tower()
        features, levels = shared(model, grid_of(batch))
        assert len(model.calls) == 1
        (features.sum() + sum(level.sum() for level in levels)).backward()
        assert all(p.grad is not None for p in model.parameters()), batch
        busy = world().rank < len(BATCHES[batch])
        assert busy or model.calls == [[[1, MERGE, MERGE]]]


def the_busiest_rank_encodes_what_the_share_says():
    """Peak patches a rank, which decide the tower's peak memory, fall from all to the largest share."""
    group, grid = world(), np.array([[1, 4, 4]] * 12)
    for policy in ("contiguous", "longest"):
        model = tower()
        shared(model, grid, policy=policy)
        (patches,) = (sum(t * h * w for t, h, w in call) for call in model.calls)
        assert exchange([patches], group)[:, 0].tolist() == [12 * 16 // group.nranks] * group.nranks


def towers_without_levels():
    group, grid = world(), grid_of("two images")
    model = tower(num_levels=0)
    for encode, form in ((lambda x, g: model(x, g)[0], "plain"), (model, "pair")):
        for idle in ("dummy", "skip"):
            got = shared(encode, grid, idle=idle)
            features = got if form == "plain" else got[0]
            assert isinstance(got, paddle.Tensor) == (form == "plain")
            assert features.numpy().tobytes() == model(pixels(grid), grid)[0].numpy().tobytes()
            features.sum().backward()
    assert encode_shared(model, pixels(grid), grid, group=None, merge_size=MERGE)[1] == []
    assert group.nranks > 1


def grids_stay_what_they_are():
    grid = grid_of("two images")
    seen = []

    def encode(x, g):
        seen.append(g)
        return tower()(x, g)

    options = {"group": world(), "merge_size": MERGE, "replicate_below": 0}
    encode_shared(encode, pixels(grid), grid.astype("int32"), **options)
    encode_shared(encode, pixels(grid), paddle.to_tensor(grid.astype("int32")), **options)
    encode_shared(encode, pixels(grid), grid.tolist(), **options)
    assert seen[0].dtype == np.int32
    assert seen[1].dtype == paddle.int32
    assert seen[2].dtype == np.int64


def frozen_towers_and_no_grad():
    for model in (tower(), tower()):
        for parameter in model.parameters():
            parameter.stop_gradient = True
        for idle in ("dummy", "skip"):
            features, levels = shared(model, grid_of("two images"), idle=idle)
            assert features.stop_gradient
            assert all(level.stop_gradient for level in levels)
    with paddle.no_grad():
        assert shared(tower(), grid_of("two images"))[0].stop_gradient


def sixteen_bit_towers():
    """bf16 features arrive bit for bit; the CPU has no bf16 matmul, so a cast after an fp32 tower stands for it."""
    grid, model = grid_of("uneven"), tower()

    def encode(x, g):
        features, levels = model(x, g)
        return features.astype("bfloat16"), [level.astype("bfloat16") for level in levels]

    for policy, idle in itertools.product(("contiguous", "longest"), ("dummy", "skip")):
        features, _ = shared(encode, grid, policy=policy, idle=idle)
        assert features.dtype == paddle.bfloat16
        expected = encode(pixels(grid), grid)[0]
        assert features.numpy().tobytes() == expected.numpy().tobytes()
        features.astype("float32").sum().backward()


def recomputed_towers():
    group, grid, model = world(), grid_of("uneven"), tower()
    rows = int(grid.prod(axis=1).sum()) // MERGE**2

    def encode(x, g):
        return recompute(lambda x: model(x, g), x, use_reentrant=False)

    features, levels = shared(encode, grid)
    loss_of(features, levels, weights(group.rank, 3, rows)).backward()
    sum_parameter_grads(model, group)
    assert len(model.calls) == 2  # once more in the backward
    *_, expected = reference(grid, sum(weights(rank, 3, rows) for rank in range(group.nranks)))
    hold_close(grads(model), expected)


def one_exchange_one_gather_one_sum():
    calls = []
    gather, add = dist.stream.all_gather, dist.all_reduce
    dist.stream.all_gather = lambda out, x, **rest: (calls.append("gather"), gather(out, x, **rest))
    dist.all_reduce = lambda x, **rest: (calls.append("sum"), add(x, **rest))
    try:
        features, levels = shared(tower(), grid_of("uneven"), mode="max")
        loss_of(features, levels, weights(0, 3, len(features))).backward()
    finally:
        dist.stream.all_gather, dist.all_reduce = gather, add
    assert calls == ["gather", "gather", "sum"]


def an_error_in_one_tower_stops_all():
    group, grid, model = world(), grid_of("uneven"), tower()

    def failing(x, g):
        if group.rank == group.nranks - 1:
            raise ValueError(f"no room for {len(x)} patches")
        return model(x, g)

    words = f"rank {group.nranks - 1} says: no room for"
    same_error_everywhere(lambda: shared(failing, grid), group, words)

    def broken(x, g):
        return model(x, g) if group.rank else 1 / 0

    with pytest.raises(RuntimeError, match="rank 0 says: ZeroDivisionError"):
        shared(broken, grid)
    shared(model, grid)  # and the group is as good as before


def ranks_that_differ_are_everyones_error():
    group, grid, model = world(), grid_of("uneven"), tower()
    odd = group.rank == group.nranks - 1

    def half(x, g):
        features, levels = model(x, g)
        return features.astype("bfloat16"), [level.astype("bfloat16") for level in levels]

    same_error_everywhere(lambda: shared(half if odd else model, grid), group, "bfloat16", "float32", "mixed precision")
    fewer = tower(num_levels=1) if odd else model
    same_error_everywhere(lambda: shared(fewer, grid), group, "gathers 2 tensor|1 tensor", "3 tensor|2 tensor")
    other = np.concatenate([grid[1:], grid[:1]]) if odd else grid
    same_error_everywhere(lambda: shared(model, other), group, "must hold the same batch")
    policy = "longest" if odd else "count"
    same_error_everywhere(lambda: shared(model, grid, policy=policy), group, "same batch and pass the same arguments")


def each_argument_must_be_the_same():
    """Every one that goes into the fingerprint, by itself; each value alone is allowed."""
    group, grid = world(), grid_of("videos")
    odd = group.rank == group.nranks - 1
    others = {
        "grid_thw": np.concatenate([grid[1:], grid[:1]]),
        "policy": "longest",
        "idle": "skip",
        "grad": "whole",
        "mode": "sum",
        "split_frames": True,
        "alpha": 7,
        "replicate_below": 10**6,
    }
    for name, other in others.items():
        given = {"grid": grid}
        if odd:
            given = {"grid": other} if name == "grid_thw" else {"grid": grid, name: other}
        same_error_everywhere(lambda given=given: shared(tower(), **given), group, "same batch and pass the same")
    blank = lambda x, g: x[: len(x) // (1 if odd else 4), :HIDDEN]  # noqa: E731
    merge_size = lambda: shared(blank, grid, merge_size=1 if odd else 2)  # noqa: E731
    same_error_everywhere(merge_size, group, "same batch and pass the same")


def work_is_shared_from_the_threshold_on():
    """Two images of 16 patches: sharing spares the busiest rank 16, so 16 is worth it and 17 is not."""
    grid = np.array([[1, 4, 4]] * 2)
    for replicate_below, images in ((16, 1), (17, 2)):
        model = tower()
        shared(model, grid, replicate_below=replicate_below)
        assert len(model.calls) == 1
        assert len(model.calls[0]) == images


def wrong_inputs_are_told():
    group, grid, model = world(), grid_of("uneven"), tower()
    same_error_everywhere(lambda: shared(model, grid, idle="sleep"), group, "'dummy', 'skip', got 'sleep'")
    same_error_everywhere(lambda: shared(model, grid, grad="half"), group, "'partial', 'whole', got 'half'")
    same_error_everywhere(lambda: shared(model, grid, mode="least"), group, "'auto', 'max'.*got 'least'")
    same_error_everywhere(lambda: shared(model, grid, policy="best"), group, "'contiguous', 'longest'")
    same_error_everywhere(lambda: shared(model, grid, merge_size=4), group, "image 0 .* 4, 6", "merge_size 4")
    options = {"group": group, "merge_size": MERGE}
    short = pixels(grid)[:-1]
    same_error_everywhere(lambda: encode_shared(model, short, grid, **options), group, "76 patches but .* 75 rows")
    flat = grid.ravel()
    same_error_everywhere(lambda: encode_shared(model, short, flat, **options), group, r"\[P, C\].*\[I, 3\].*\[15\]")
    same_error_everywhere(lambda: shared(lambda x, g: x, grid), group, "check merge_size")
    same_error_everywhere(lambda: shared(lambda x, g: (x, x, x), grid), group, "must return features, or")


def a_tensor_parallel_tower_is_refused():
    group, grid = world(), grid_of("uneven")
    model = tower()
    model.blocks[0].qkv.weight.is_distributed = True
    same_error_everywhere(lambda: shared(model, grid), group, r"blocks.0.qkv.weight \(Linear\) is tensor-parallel")
    same_error_everywhere(lambda: shared(model.forward, grid), group, "blocks.0.qkv.weight")
    model.blocks[0].qkv.model_parallel_group = SimpleNamespace(ranks=[group.ranks[group.rank]])
    shared(model, grid)  # cut over others, whole for this group


class CutSequence(PyLayer):
    """The framework's scatter: forward takes this rank's rows of [S, B, H], backward gathers all ranks' gradients."""

    @staticmethod
    def forward(ctx, x):
        group = world()
        rows = x.shape[0] // group.nranks
        return x[group.rank * rows : (group.rank + 1) * rows].clone()

    @staticmethod
    def backward(ctx, grad):
        return collectives.all_gather(grad, world())


def sequence_loss(encode, layout, insert, mask, step=0):
    """A stand-in for a language model: features in the embedding, levels in two deepstack layers, then a loss."""
    features, levels = encode()
    hidden = insert(features)  # [S_local, B, H]
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
    for level in levels:
        hidden = add_rows(paddle.tanh(hidden), level, plan)
    rng = np.random.default_rng([9, step])
    weight = rng.normal(size=[layout.seq_len, mask.shape[0], HIDDEN]).astype("float32")
    return (hidden * paddle.to_tensor(weight[layout.positions()])).sum() / mask.size


def whole_hidden(mask):
    return paddle.full([mask.shape[1], mask.shape[0], HIDDEN], 0.1)


def wirings(model, grid, layout, mask, group, **options):
    """name: (encode, insert, whether the tower's gradients are summed after backward); all we ship."""
    plan = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
    everything = plan_visual(paddle.to_tensor(mask), None, SeqLayout(layout.seq_len), sequence_first=True)
    hidden = whole_hidden(mask)
    hidden.stop_gradient = False
    own = whole_hidden(mask)[: layout.local_len]

    def completed(encoded):
        features, *levels = complete_grad([encoded[0], *encoded[1]], plan, group)
        return features, levels

    def levels_completed(encoded):
        return encoded[0], complete_grad(encoded[1], plan, group)

    def after_the_cut(features):
        return replace_rows(own, features, plan)

    def before_the_cut(features):
        return CutSequence.apply(replace_rows(hidden * 1, features, everything))

    def parallel(grad):
        return encode_shared(
            model, pixels(grid), grid, group=group, merge_size=MERGE, grad=grad, replicate_below=0, **options
        )

    replicated = lambda: model(pixels(grid), grid) if len(grid) else parallel("whole")  # noqa: E731
    return {
        "replicated, after the cut": (lambda: completed(replicated()), after_the_cut, False),
        "replicated, before the cut": (lambda: levels_completed(replicated()), before_the_cut, False),
        "shared, after the cut": (lambda: parallel("partial"), after_the_cut, True),
        "shared, before the cut": (lambda: levels_completed(parallel("whole")), before_the_cut, True),
    }


def batch_of(step):
    """Grid and mask [2, 24] of one training step; some steps have no image."""
    grid = grid_of(("uneven", "text only", "two images", "videos")[step % 4])
    mask = np.zeros(48, dtype=bool)
    mask[1 : 1 + int(grid.prod(axis=1).sum()) // MERGE**2] = True
    return grid, mask.reshape(2, 24)


def train(name, group, num_steps, **options):
    """Losses and final parameters of num_steps with momentum."""
    model = tower()
    optimizer = paddle.optimizer.Momentum(0.05, parameters=model.parameters())
    layout = SeqLayout(24) if group is None else SeqLayout(24, sp_size=group.nranks, sp_rank=group.rank)
    losses = []
    for step in range(num_steps):
        grid, mask = batch_of(step)
        if group is None:
            everything = plan_visual(paddle.to_tensor(mask), None, layout, sequence_first=True)
            encode = lambda grid=grid: encode_shared(model, pixels(grid), grid, group=None, merge_size=MERGE)  # noqa: E731
            insert = lambda features, plan=everything, mask=mask: replace_rows(whole_hidden(mask), features, plan)  # noqa: E731
            summed = False
        else:
            encode, insert, summed = wirings(model, grid, layout, mask, group, **options)[name]
        loss = sequence_loss(encode, layout, insert, mask, step)
        loss.backward()
        if summed:
            sum_parameter_grads(model, group)
        total = loss.detach().clone()
        losses.append(float(total if group is None else collectives.all_reduce_sum(total, group)))
        optimizer.step()
        optimizer.clear_grad()
    return model, losses


def every_wiring_trains_as_one_process():
    """Losses to 1e-5 over steps with images, without and with videos; and the ranks' towers stay equal, bit for bit."""
    group = world()
    alone, expected = train("", None, 8)
    names = [
        "replicated, after the cut",
        "replicated, before the cut",
        "shared, after the cut",
        "shared, before the cut",
    ]
    for name, idle in [*((name, "dummy") for name in names), ("shared, after the cut", "skip")]:
        model, losses = train(name, group, 8, idle=idle)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        assert check_replicas(model, group) == [], name
        hold_close(*([p.numpy() for p in trained.parameters()] for trained in (model, alone)), name)


def gradients_of(encode, insert, model, layout, mask, summed):
    sequence_loss(encode, layout, insert, mask).backward()
    if summed:
        sum_parameter_grads(model, world())
    found = grads(model)
    model.clear_gradients()
    return [np.zeros(p.shape, "float32") if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def every_wiring_has_the_whole_gradient_and_a_second_sum_is_seen():
    group = world()
    layout = SeqLayout(24, sp_size=group.nranks, sp_rank=group.rank)
    for step in range(4):
        grid, mask = batch_of(step)
        model = tower()
        plan = plan_visual(paddle.to_tensor(mask), None, SeqLayout(24), sequence_first=True)
        expected = gradients_of(
            lambda model=model, grid=grid: encode_shared(model, pixels(grid), grid, group=None, merge_size=MERGE),
            lambda features, plan=plan, mask=mask: replace_rows(whole_hidden(mask), features, plan),
            model,
            SeqLayout(24),
            mask,
            False,
        )
        for name, (encode, insert, summed) in wirings(model, grid, layout, mask, group).items():
            hold_close(gradients_of(encode, insert, model, layout, mask, summed), expected, f"step {step}, {name}")
        if not len(grid):
            continue
        (encode, insert, _) = wirings(model, grid, layout, mask, group)["replicated, after the cut"]
        twice = gradients_of(encode, insert, model, layout, mask, True)
        hold_close([grad / group.nranks for grad in twice], expected, "a second sum is n times the gradient")


def paddles_callback_sums_marked_parameters():
    """mark_for_sum with Paddle's own hooks, on a model-parallel group that is the default group."""
    from paddle.distributed.fleet.utils import sequence_parallel_utils as utils

    group, grid, model = world(), grid_of("two images"), tower()
    rows = int(grid.prod(axis=1).sum()) // MERGE**2
    real = utils.fleet.get_hybrid_communicate_group
    utils.fleet.get_hybrid_communicate_group = lambda: topology_of(group)
    try:
        mark_for_sum(model)
        utils.register_sequence_parallel_allreduce_hooks(model, 1, False)
        features, levels = shared(model, grid)
        loss_of(features, levels, weights(group.rank, 3, rows)).backward()
    finally:
        utils.fleet.get_hybrid_communicate_group = real
    *_, expected = reference(grid, sum(weights(rank, 3, rows) for rank in range(group.nranks)))
    hold_close(grads(model), expected)


def sum_of_gradients_fills_gaps():
    group, model = world(), paddle.nn.Linear(2, 2)
    if group.rank == 0:
        model(paddle.ones([1, 2])).sum().backward()
    model.bias.clear_gradient() if group.rank else None
    sum_parameter_grads(model, group)
    assert model.weight.grad.tolist() == [[1, 1], [1, 1]]
    model = paddle.nn.Linear(2, 2)
    sum_parameter_grads(model, group)
    assert model.weight.grad is None
    for parameter in model.parameters():
        parameter.main_grad = paddle.full(parameter.shape, group.rank + 1.0)
    sum_parameter_grads(model, group)
    assert (model.weight.main_grad == sum(range(1, group.nranks + 1))).all()
    for parameter in model.parameters():  # there, but not filled on every rank
        parameter.main_grad = paddle.ones(parameter.shape) if group.rank == 0 else None
    sum_parameter_grads(model, group)
    assert all(bool((parameter.main_grad == 1).all()) for parameter in model.parameters())
    assert model.weight.grad is None


def parameters_frozen_on_one_rank_are_everyones_error():
    """Layers of one size: a sum would add gradients of different ones. No gradient is changed."""
    group, last = world(), world().nranks - 1
    for frozen, on_last in ((0, 1), (None, 0), (None, slice(None))):
        model = paddle.nn.Sequential(*(paddle.nn.Linear(2, 2) for _ in range(2)))
        model(paddle.ones([1, 2])).sum().backward()
        before = grads(model)
        at = on_last if group.rank == last else frozen
        for layer in model[at] if isinstance(at, slice) else [] if at is None else [model[at]]:
            for parameter in layer.parameters():
                parameter.stop_gradient = True
        words = f"same parameters whose gradients are summed .*: rank {last} .fingerprint", "or have frozen"
        same_error_everywhere(lambda model=model: sum_parameter_grads(model, group), group, *words)
        for got, wanted in zip(grads(model), before, strict=True):
            np.testing.assert_array_equal(got, wanted)
    for call in (check_replicas, sync_replicas):  # a rank without parameters stays in the collective
        module = paddle.nn.Linear(2, 2) if group.rank else paddle.nn.ReLU()
        same_error_everywhere(lambda call=call, module=module: call(module, group), group, "must hold the same param")


def skipped_layers_are_not_summed():
    """Exact: a tower behind complete_grad keeps its whole gradient in the sum over a model that holds it."""
    group = world()
    model = paddle.nn.Sequential(*(paddle.nn.Linear(2, 2) for _ in range(3)))
    for skip, kept in ((model[0], [0]), ([model[0], model[2]], [0, 2]), ((), [])):
        for parameter in model.parameters():
            parameter.grad = paddle.full(parameter.shape, group.rank + 1.0)
        sum_parameter_grads(model, group, skip=skip)
        total = sum(range(1, group.nranks + 1))
        for index, layer in enumerate(model):
            wanted = group.rank + 1 if index in kept else total
            assert all((parameter.grad == wanted).all() for parameter in layer.parameters()), (skip, index)
    for wrong, name in ((paddle.nn.Linear(2, 2), "Linear"), (paddle.nn.ReLU(), "ReLU"), ("0", "str")):
        for skip in ([wrong], [model[0], wrong] if group.rank == 0 else []):  # on all ranks, and on one
            words = f"skip must be layers with parameters of the module, got {name}"
            same_error_everywhere(lambda skip=skip: sum_parameter_grads(model, group, skip=skip), group, words)


def sums_go_in_buckets():
    """Three elements at a time, and a bucket ends where the dtype changes: the same gradients, more sums."""
    group = world()
    model = paddle.nn.Sequential(paddle.nn.Linear(2, 2), paddle.nn.Linear(2, 1))
    for i, parameter in enumerate(model.parameters()):
        dtype = "float64" if i == 3 else "float32"
        parameter.main_grad = paddle.full(parameter.shape, (group.rank + 1) * 10.0**i, dtype)
    summed, sizes = collectives.all_reduce_sum, []
    with (
        mock.patch.object(comm_grads, "BUCKET", 3),
        mock.patch.object(collectives, "all_reduce_sum", lambda x, of: (sizes.append(x.size), summed(x, of))[1]),
    ):
        sum_parameter_grads(model, group)
    assert sizes == [4, 2, 2, 1], sizes
    for i, parameter in enumerate(model.parameters()):
        assert (parameter.main_grad == sum(range(1, group.nranks + 1)) * 10.0**i).all()


def no_second_gradient_of_replicated_work():
    model = tower()
    features, _ = shared(model, grid_of("two images"), grad="whole", replicate_below=10**6)
    with pytest.raises(OSError, match="OwnGradient has no second gradient"):
        paddle.grad(features.sum(), [model.merger.project.weight], create_graph=True)


CASES = [
    features_and_gradients_equal_one_process,
    idle_ranks_may_skip,
    every_gather_mode,
    gradients_by_reduce_scatter,
    videos_are_split_by_frames,
    work_that_is_not_worth_sharing_is_replicated,
    every_rank_calls_the_tower_once,
    the_busiest_rank_encodes_what_the_share_says,
    towers_without_levels,
    grids_stay_what_they_are,
    frozen_towers_and_no_grad,
    sixteen_bit_towers,
    recomputed_towers,
    one_exchange_one_gather_one_sum,
    an_error_in_one_tower_stops_all,
    ranks_that_differ_are_everyones_error,
    each_argument_must_be_the_same,
    work_is_shared_from_the_threshold_on,
    wrong_inputs_are_told,
    a_tensor_parallel_tower_is_refused,
    every_wiring_has_the_whole_gradient_and_a_second_sum_is_seen,
    every_wiring_trains_as_one_process,
    paddles_callback_sums_marked_parameters,
    no_second_gradient_of_replicated_work,
    sum_of_gradients_fills_gaps,
    parameters_frozen_on_one_rank_are_everyones_error,
    skipped_layers_are_not_summed,
    sums_go_in_buckets,
]


LAUNCHES = dict.fromkeys((2, 3, 4), CASES)


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    """Features bit-exact and gradients to 1e-5 on every rank, or the same error on all."""
    hold(__name__, nranks, case)


def sums_leave_cut_weights_alone():
    """Paddle's own tensor-parallel layer behind a norm that every rank has: the norm is summed, the shards are not."""
    nranks = dist.get_world_size()
    with enable_tensor_parallel_on_cpu():
        group = init_tensor_parallel(nranks)
        column = fleet.meta_parallel.ColumnParallelLinear(4, 3 * nranks, has_bias=True, gather_output=False)
        model = paddle.nn.Sequential(paddle.nn.LayerNorm(4), column)
        x = paddle.arange(12, dtype="float32").reshape([3, 4]) ** 2
        (model(x) ** 2).sum().backward()
    before = grads(model)
    sum_parameter_grads(model, group)
    expected = [collectives.all_reduce_sum(paddle.to_tensor(grad), group).numpy() for grad in before[:2]] + before[2:]
    for got, wanted in zip(grads(model), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert np.abs(before[2]).max() > 0
    mark_for_sum(model)
    return [bool(getattr(parameter, "sequence_parallel", False)) for parameter in model.parameters()]


def test_weights_that_are_cut_are_not_summed():
    """Exact, for values and for marks; Paddle's own tensor-parallel layer."""
    assert run_ranks(sums_leave_cut_weights_alone, 2) == [[True, True, False, False]] * 2


def test_one_rank_needs_no_group():
    """Bit-exact with the tower itself; without images a dummy keeps the graph."""
    grid = grid_of("uneven")
    model = tower()
    features, levels = encode_shared(model, pixels(grid), grid, group=None, merge_size=MERGE)
    expected, expected_levels = model(pixels(grid), grid)
    for got, wanted in zip([features, *levels], [expected, *expected_levels], strict=True):
        assert got.numpy().tobytes() == wanted.numpy().tobytes()
    features, levels = encode_shared(
        model, paddle.zeros([0, CHANNELS]), np.zeros([0, 3], "int64"), group=None, merge_size=MERGE
    )
    assert features.shape == [0, HIDDEN]
    features.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if not p.name.startswith("deepstack")) or levels
