"""Images encoded wherever the load is balanced, over gloo. Bar: features by bits; gradients to fp32 rounding."""

import itertools
import os
import signal
import time
from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from groups import world
from paddle_vl_sp import RunReport, SeqLayout, add_rows, encode_balanced, plan_visual, replace_rows
from paddle_vl_sp.testing import RanksFailed, run_ranks
from paddle_vl_sp.testing.subgroup import SubGroup
from paddle_vl_sp.vision import balanced
from paddle_vl_sp.vision.balanced import encode_assigned, stop_balancing
from paddle_vl_sp.vision.homes import POLICIES, balance_images
from paddle_vl_sp.vision.loading import BalancedDataset, BalancedSampler, only_item
from rank_cases import hold, pairs, same_error_everywhere
from tiny_tower import CHANNELS, HIDDEN, MERGE, pixels, tower

ALPHA = 8  # of so small images, so that what they cost differs

SMALL, LARGE, VIDEO = [1, 2, 4], [1, 8, 12], [6, 4, 4]


def batches(num_ranks):
    """name: the grids of every rank"""
    last = num_ranks - 1
    return {
        "equal": [[LARGE, SMALL]] * num_ranks,
        "one has all": [[SMALL, LARGE, VIDEO, LARGE, SMALL] if rank == last else [] for rank in range(num_ranks)],
        "some text only": [[LARGE] * (2 * rank) + [SMALL] * (rank % 2) for rank in range(num_ranks)],
        "no images": [[]] * num_ranks,
        "one huge": [[[1, 24, 24]] if rank == last else [SMALL] for rank in range(num_ranks)],
        "videos": [[VIDEO, SMALL, VIDEO] if rank == 0 else [SMALL, [1, 2, 2]] for rank in range(num_ranks)],
    }


def grid_of(grids):
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def own_pixels(rank, grid):
    """Each rank's images differ, also where the grids are equal."""
    return pixels(grid, seed=10 + rank) if len(grid) else paddle.zeros([0, CHANNELS])


def loss_of(rank, features, levels):
    """Each rank's own, of features in an embedding and levels in two layers, with places for text between."""
    number = features.shape[0]
    mask = np.arange(2 * number + 4)[None] % 2 == 1
    mask[0, 2 * number :] = False
    plan = plan_visual(mask, None, SeqLayout(mask.shape[1]), sequence_first=False).to("cpu")
    hidden = paddle.to_tensor(np.random.default_rng(rank).normal(size=[*mask.shape, HIDDEN]).astype("float32"))
    hidden = replace_rows(hidden, features, plan)
    for level in levels:
        hidden = add_rows(paddle.tanh(hidden), level, plan)
    weight = np.random.default_rng([8, rank]).normal(size=[*mask.shape, HIDDEN]).astype("float32")
    return (hidden * paddle.to_tensor(weight)).sum()


def grads_at_home(grids):
    """Every rank's features and levels, gradient of its pixels, and the sum of the tower's gradients: in one rank."""
    model, found = tower(), []
    for rank, grid in enumerate(map(grid_of, grids)):
        x = own_pixels(rank, grid)
        x.stop_gradient = False
        if not len(grid):
            found.append(([paddle.zeros([0, HIDDEN])] * 3, None))
            continue
        features, levels = model(x, grid)
        loss_of(rank, features, levels).backward()
        found.append(([features, *levels], x.grad))
    return found, {name: each.grad for name, each in model.named_parameters()}


def close(got, wanted, told):
    """To the rounding of float32 sums in another order."""
    wanted = np.zeros(got.shape, "float32") if wanted is None else wanted.numpy()
    np.testing.assert_allclose(
        got.numpy(), wanted, rtol=2e-4, atol=2e-4 * (np.abs(wanted).max(initial=0) + 1e-3), err_msg=told
    )


def summed(grad, like, group):
    whole = paddle.zeros(like.shape) if grad is None else grad.astype("float32")
    dist.all_reduce(whole, group=group)
    return whole


def hold_balanced(batch, group=None, of_pixels=True, **options):
    """Features by bits, gradients of own pixels, and the tower's summed over the group, against each rank at home."""
    group = group or world()
    grids = batches(group.nranks)[batch] if isinstance(batch, str) else batch
    told = f"{batch} {options}"
    at_home, wanted = grads_at_home(grids)
    own_grid = grid_of(grids[group.rank])
    model, x = tower(), own_pixels(group.rank, own_grid)
    x.stop_gradient = not of_pixels
    options = {"group": group, "merge_size": MERGE, "alpha": ALPHA, **options}
    features, levels = encode_balanced(model, x, own_grid, **options)
    rows, pixel_grad = at_home[group.rank]
    for got, right in zip([features, *levels], rows, strict=True):
        assert got.shape == right.shape, told
        assert got.dtype == right.dtype or not len(own_grid), told
        assert got.numpy().tobytes() == right.numpy().tobytes(), told
    loss_of(group.rank, features, levels).backward()
    if len(own_grid) and of_pixels:
        close(x.grad, pixel_grad, told)
    for name, each in model.named_parameters():
        close(summed(each.grad, each, group), wanted[name], f"{name} {told}")
    share = balance_images(grids, MERGE, ALPHA, options.get("policy", "longest"), options.get("split_frames", False))
    own = share.encoded_grid(group.rank).tolist()
    if own or options.get("idle") != "skip" or of_pixels or not sum(map(len, grids)):
        assert model.calls == [own or [[1, MERGE, MERGE]]], told
    else:
        assert model.calls == [], told


def every_batch():
    for batch in batches(world().nranks):
        hold_balanced(batch)


def every_policy_and_idle_ranks():
    for policy in POLICIES:
        hold_balanced("some text only", policy=policy)
    for batch, of_pixels in itertools.product(("one has all", "no images"), (False, True)):
        hold_balanced(batch, idle="skip", of_pixels=of_pixels)


def videos_by_frames():
    hold_balanced("videos", split_frames=True)
    hold_balanced("one has all", split_frames=True, policy="contiguous")


def in_groups_whose_ranks_are_not_the_global_ones():
    ranks = range(dist.get_world_size())
    group = SubGroup(ranks[::-1])
    assert group.rank == dist.get_world_size() - 1 - dist.get_rank()
    hold_balanced("some text only", group=group)
    half = len(ranks) // 2
    if half > 1:  # two groups at the same time, of even and of odd ranks
        group = SubGroup([rank for rank in ranks if rank % 2 == dist.get_rank() % 2])
        assert (group.rank, dist.get_rank()) in ((0, 0), (0, 1), (1, 2), (1, 3))
        hold_balanced("one has all", group=group)


def features_alone_and_no_gradients():
    group = world()
    grids = batches(group.nranks)["some text only"]
    grid = grid_of(grids[group.rank])
    model = tower()
    options = {"group": group, "merge_size": MERGE, "alpha": ALPHA}
    features = encode_balanced(lambda x, g: model(x, g)[0], own_pixels(group.rank, grid), grid, **options)
    rows = grads_at_home(grids)[0][group.rank][0][0]
    assert features.numpy().tobytes() == rows.numpy().tobytes()
    assert not features.stop_gradient
    with paddle.no_grad():
        features, _ = encode_balanced(model, own_pixels(group.rank, grid), grid, **options)
    assert features.stop_gradient
    for parameter in model.parameters():
        parameter.stop_gradient = True
    features, _ = encode_balanced(model, own_pixels(group.rank, grid), grid, **options)
    assert features.stop_gradient
    as_tensor = paddle.to_tensor(grid)
    features, _ = encode_balanced(model, own_pixels(group.rank, grid), as_tensor, **options)
    assert features.numpy().tobytes() == rows.numpy().tobytes()


def sixteen_bits():
    """Text-only ranks bring an empty float32 tensor, as a model would that has no pixels to look at."""

    def in_half(model):
        def encode(x, g):
            features, levels = model(x.astype("float32"), g)
            return features.astype("bfloat16"), [level.astype("bfloat16") for level in levels]

        return encode

    group = world()
    grids = batches(group.nranks)["some text only"]
    grid = grid_of(grids[group.rank])
    model, x = tower(), own_pixels(group.rank, grid)
    x = x.astype("bfloat16") if len(grid) else x
    features, levels = encode_balanced(in_half(model), x, grid, group=group, merge_size=MERGE, alpha=ALPHA)
    assert features.dtype == paddle.bfloat16
    if len(grid):
        wanted, by_level = in_half(tower())(x, grid)
        for got, right in zip([features, *levels], [wanted, *by_level], strict=True):
            assert got.astype("float32").numpy().tobytes() == right.astype("float32").numpy().tobytes()


def in_one_exchange_there_and_one_back():
    """Pixels, rows, and their gradients: three exchanges; none where every rank encodes its own."""
    real, calls = balanced.route_rows, []

    def counting(xs, *rest):
        calls.append(len(xs))
        return real(xs, *rest)

    with mock.patch.object(balanced, "route_rows", counting):
        hold_balanced("one has all")
        assert calls == [1, 3]
        calls.clear()
        hold_balanced("equal")
        hold_balanced("no images")
        hold_balanced("one has all", policy="home")
        assert calls == []


def train(steps, is_balanced):
    """Weights after AdamW steps of data parallelism, whose gradients are averaged; patches that this rank encoded."""
    group = world()
    model = tower()
    # a large epsilon, since the key's bias has no gradient but rounding, which AdamW would scale up
    optimizer = paddle.optimizer.AdamW(0.01, epsilon=1e-3, parameters=model.parameters(), weight_decay=0.1)
    for step in range(steps):
        names = list(batches(group.nranks))
        for micro in range(2):
            grid = grid_of(batches(group.nranks)[names[(2 * step + micro) % len(names)]][group.rank])
            x = own_pixels(group.rank, grid)
            if is_balanced:
                result = encode_balanced(model, x, grid, group=group, merge_size=MERGE, alpha=ALPHA)
            elif len(grid):
                result = model(x, grid)
            else:
                continue
            loss_of(group.rank, *result).backward()
        for parameter in model.parameters():
            parameter.grad = summed(parameter.grad, parameter, group) / group.nranks
        optimizer.step()
        optimizer.clear_grad()
    patches = sum(int(grid_of(call).prod(axis=1).sum()) for call in model.calls)
    return {name: each.numpy() for name, each in model.named_parameters()}, patches


def training_ends_at_the_same_weights():
    """Five AdamW steps of two micro-batches, data parallel with and without balance: fp32 rounding."""
    right, patches = train(5, False)
    with RunReport() as report:
        weights, balanced_patches = train(5, True)
    for name, wanted in right.items():
        np.testing.assert_allclose(weights[name], wanted, atol=2e-5, err_msg=name)
    counted = np.zeros([2, world().nranks], dtype=np.int64)
    counted[:, world().rank] = patches, balanced_patches
    counted = paddle.to_tensor(counted)
    dist.all_reduce(counted, group=world())
    before, after = counted.numpy()
    assert before.max() > 1.2 * after.max()
    found = report.read()
    assert found["vision_patches_at_home"] == before.tolist()
    blanks = after - np.array(found["vision_patches_encoded"])  # a blank image of four patches where there is no work
    assert (blanks % MERGE**2 == 0).all()
    assert (blanks <= 10 * MERGE**2).all()
    assert found["vision_imbalance"] < found["vision_imbalance_at_home"]
    names = list(batches(world().nranks))
    trained = [names[micro % len(names)] for micro in range(10)]
    moved = [balance_images(batches(world().nranks)[name], MERGE, ALPHA).moved_patches for name in trained]
    rows = sum(moved) // MERGE**2
    assert found["vision_rows_moved"] == rows
    assert found["vision_bytes_moved"] == 4 * (sum(moved) * CHANNELS + rows * 3 * HIDDEN)


def decoded_where_it_is_encoded():
    """By a sampler that knows all sizes: each rank has the pixels of its share alone; features as at home, by bits."""
    group = world()
    for ranks_per_batch in (1, 2):
        copies, left = divmod(group.nranks, ranks_per_batch)
        if not left:
            for split_frames in (False, True):
                hold_assigned(copies, ranks_per_batch, split_frames)


def hold_assigned(copies, ranks_per_batch, split_frames):
    group, grids = world(), [[VIDEO, SMALL], [], [LARGE], [SMALL, SMALL], [LARGE, VIDEO], [[1, 2, 2]]] * 2
    sampler = BalancedSampler(
        grids,
        2,
        copies,
        group.rank,
        merge_size=MERGE,
        ranks_per_batch=ranks_per_batch,
        split_frames=split_frames,
        alpha=ALPHA,
        seed=5,
    )
    whole = {
        sample: [pixels([grid], seed=100 * sample + i) for i, grid in enumerate(own)]
        for sample, own in enumerate(grids)
    }

    def load_pixels(sample, image, frames):
        times, height, width = grids[sample][image]
        return whole[sample][image].numpy().reshape([times, height * width, CHANNELS])[frames].reshape([-1, CHANNELS])

    loader = paddle.io.DataLoader(
        BalancedDataset(lambda sample: sample, load_pixels, CHANNELS), batch_sampler=sampler, collate_fn=only_item
    )
    model, alone = tower(), tower()
    for step in loader:
        samples, share, x = step["samples"], step["share"], paddle.to_tensor(step["pixel_values"])
        features, levels = encode_assigned(model, x, share, group=group)
        weight = np.random.default_rng([4, group.rank]).normal(size=[3, *features.shape]).astype("float32")
        sum((rows * paddle.to_tensor(weight[i])).sum() for i, rows in enumerate([features, *levels])).backward()
        of_all = []
        dist.all_gather_object(of_all, (samples, weight))
        for rank, (own, of_rank) in enumerate(of_all):
            own_grid = grid_of([grid for sample in own for grid in grids[sample]])
            if not len(own_grid):
                continue
            rows, by_level = alone(paddle.concat([image for sample in own for image in whole[sample]]), own_grid)
            if rank == group.rank:
                for got, right in zip([features, *levels], [rows, *by_level], strict=True):
                    assert got.numpy().tobytes() == right.numpy().tobytes()
            sum((each * paddle.to_tensor(of_rank[i])).sum() for i, each in enumerate([rows, *by_level])).backward()
    for (name, each), right in zip(model.named_parameters(), alone.parameters(), strict=True):
        close(summed(each.grad, each, group), right.grad, name)


def a_wrong_share_is_an_error_on_all():
    group = world()
    last = group.nranks - 1
    share = balance_images([[SMALL]] * group.nranks, MERGE, ALPHA)
    x = own_pixels(group.rank, grid_of([SMALL]))
    short = x[1:] if group.rank == last else x
    same_error_everywhere(
        lambda: encode_assigned(tower(), short, share, group=group),
        group,
        f"rank {last} encodes 8 patches, got",
        "7, 12",
    )
    small = balance_images([[SMALL]], MERGE, ALPHA)
    same_error_everywhere(
        lambda: encode_assigned(tower(), x, small, group=group), group, f"is of 1 ranks and the group has {last + 1}"
    )
    grids = [[SMALL]] * group.nranks
    grids[0] = grids[0] if group.rank != last else [SMALL, [1, 2, 2]]
    other = balance_images(grids, MERGE, ALPHA)
    same_error_everywhere(
        lambda: encode_assigned(tower(), x, other, group=group), group, "must hold the same share", f"rank {last} "
    )
    turned = balance_images([[SMALL if group.rank != last else [1, 4, 2]]] * group.nranks, MERGE, ALPHA)
    same_error_everywhere(lambda: encode_assigned(tower(), x, turned, group=group), group, "must hold the same share")


class BrokenError(Exception):
    pass


def an_error_on_one_rank_is_everyones():
    """Before anything is sent, and in the middle, after the pixels have travelled; then all is as good as before."""
    group, last = world(), world().nranks - 1
    is_last = group.rank == last
    grid = grid_of([LARGE])
    x = own_pixels(group.rank, grid)

    def call(encode=None, x=x, grid=grid, **options):
        options = {"group": group, "merge_size": MERGE, "alpha": ALPHA} | options
        return lambda: encode_balanced(encode or tower(), x, grid, **options)

    same_error_everywhere(call(x=x[1:] if is_last else x), group, f"rank {last} says: grid_thw has 96 patches but")
    same_error_everywhere(call(policy="best" if is_last else "longest"), group, f"rank {last} says: policy must be one")
    same_error_everywhere(call(idle="wait" if is_last else "skip"), group, f"rank {last} says: idle must be one")
    same_error_everywhere(call(alpha=7 + is_last), group, "hold the same arguments of encode_balanced", f"rank {last} ")
    same_error_everywhere(call(x="pixels" if is_last else x), group, f"rank {last} says: x must be a Paddle tensor")
    same_error_everywhere(
        call(x=x.astype("float64") if is_last else x),
        group,
        "one width and dtype, got 12 wide float32, 12 wide float64",
    )
    same_error_everywhere(
        call(x=paddle.concat([x, x], axis=1) if is_last else x), group, "got 12 wide float32, 24 wide float32: cast"
    )

    def narrow(x, g):
        features, levels = tower()(x, g)
        return features[:, : HIDDEN - is_last], [level[:, : HIDDEN - is_last] for level in levels]

    same_error_everywhere(call(narrow), group, "all ranks must send the same")

    def broken(x, g):
        if is_last:
            raise BrokenError("out of memory")
        return tower()(x, g)

    own = grid_of([LARGE, LARGE] if group.rank == 0 else [])  # the last rank encodes what rank 0 has
    with pytest.raises(RuntimeError, match=f"rank {last} of {last + 1} failed, so all stop; rank {last} says: BrokenE"):
        call(broken, own_pixels(group.rank, own), own, policy="count")()
    hold_balanced("one has all")


def a_rank_that_stops_early_is_named():
    """Where it would leave the others waiting for ever; all stopping together is no error."""
    group, last = world(), world().nranks - 1
    grid = grid_of([SMALL])

    def call():
        if group.rank == last:
            stop_balancing(group)
        else:
            encode_balanced(tower(), own_pixels(group.rank, grid), grid, group=group, merge_size=MERGE)

    same_error_everywhere(call, group, f"rank {last} of {last + 1} has stopped, and the others still call")
    stop_balancing(group)
    hold_balanced("equal")  # and another run may follow

    def evaluate():
        with paddle.set_grad_enabled(group.rank != last):
            encode_balanced(tower(), own_pixels(group.rank, grid), grid, group=group, merge_size=MERGE)

    same_error_everywhere(
        evaluate, group, f"rank {last} calls encode_balanced under no_grad, and rank 0 with gradients"
    )


def a_tower_cut_over_the_group_is_refused():
    model = tower()
    for parameter in model.parameters():
        parameter.is_distributed = True
    grid = grid_of([SMALL])
    same_error_everywhere(
        lambda: encode_balanced(model, own_pixels(0, grid), grid, group=world(), merge_size=MERGE),
        world(),
        "is tensor-parallel over",
    )


CASES = [
    every_batch,
    every_policy_and_idle_ranks,
    videos_by_frames,
    features_alone_and_no_gradients,
    sixteen_bits,
    in_one_exchange_there_and_one_back,
    training_ends_at_the_same_weights,
    decoded_where_it_is_encoded,
    a_wrong_share_is_an_error_on_all,
    an_error_on_one_rank_is_everyones,
    a_rank_that_stops_early_is_named,
    a_tower_cut_over_the_group_is_refused,
]
EVEN = [in_groups_whose_ranks_are_not_the_global_ones]  # emulated groups have an even size
LAUNCHES = {2: CASES + EVEN, 3: [every_batch, videos_by_frames], 4: CASES + EVEN}


@pytest.mark.parametrize(("nranks", "case"), pairs(LAUNCHES))
def test_on_all_ranks(nranks, case):
    hold(__name__, nranks, case)


def killed_in_the_middle():
    group = world()
    grid = grid_of([SMALL] * 4 if group.rank else [])

    def encode(x, g):
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return tower()(x, g)

    encode_balanced(encode, own_pixels(group.rank, grid), grid, group=group, merge_size=MERGE, policy="count")


def test_a_killed_rank_ends_the_others():
    """Within the limit, not after it."""
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1"):
        run_ranks(killed_in_the_middle, 2, timeout=60)
    assert time.monotonic() - begin < 55


def test_one_process():
    """No group: this process encodes its own, and a blank image where it has none."""
    model, grid = tower(), grid_of([LARGE, SMALL])
    for group in (None, mock.Mock(nranks=1, rank=0)):
        features, levels = encode_balanced(model, own_pixels(0, grid), grid, group=group, merge_size=MERGE)
        wanted, by_level = tower()(own_pixels(0, grid), grid)
        for got, right in zip([features, *levels], [wanted, *by_level], strict=True):
            assert got.numpy().tobytes() == right.numpy().tobytes()
        features, _ = encode_balanced(model, own_pixels(0, grid[:0]), grid[:0], group=group, merge_size=MERGE)
        assert features.shape == [0, HIDDEN]
        assert not features.stop_gradient
        stop_balancing(group)
        share = balance_images([grid], MERGE, ALPHA)
        features, _ = encode_assigned(model, own_pixels(0, grid), share, group=group)
        assert features.numpy().tobytes() == wanted.numpy().tobytes()
    with pytest.raises(ValueError, match="policy must be one of"):
        encode_balanced(model, own_pixels(0, grid), grid, group=None, merge_size=MERGE, policy="none")
