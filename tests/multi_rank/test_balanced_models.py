"""vision_dp="data" in PaddleFormers' models: data-parallel ranks balance the work of their towers, in every forward.

Bar: after AdamW steps the weights of unbalanced data parallelism, to fp32 rounding; and less work for the busiest rank.
"""

from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from grid import grid_of, sub_group
from groups import world
from paddle_vl_sp import RunReport, apply_to_paddleformers, stop_balancing
from paddle_vl_sp.formers import balanced_tower, groups, tiny
from paddle_vl_sp.testing import run_ranks, tensor_parallel
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu

SEQ_LEN = 96
STEPS, MICRO = 5, 2
FAMILIES = {"qwen3_vl": tiny.tiny_qwen3_vl, "qwen2_5_vl": tiny.tiny_qwen2_5_vl}
RIGHT = 1e-5


def samples_of(rank, nranks, step):
    """Of a micro-batch: one rank has many images, in turn; others have text only, a video, or one image."""
    kinds = [[["image", "image", "image"], ["image", "image"]], [[], []], [["image"], []], [["image", "video"], []]]
    return kinds[(rank + step) % nranks] if step < 2 * STEPS - 1 else [[], []]  # at last no rank has images


def batch_of(family, rank, nranks, step):
    return tiny.draw_batch(
        samples_of(rank, nranks, step), SEQ_LEN, seed=100 * step + rank, frames_apart=family == "qwen3_vl"
    )


def loss_of(model, batch):
    return model(**batch, position_ids=tiny.positions(model, batch)).loss


def counted(model):
    """Patches that the tower is called with from now on, as a list that grows."""
    patches, original = [], model.model.visual.forward

    def forward(pixels, *args, **kwargs):
        patches.append(pixels.shape[0])
        return original(pixels, *args, **kwargs)

    model.model.visual.forward = forward
    return patches


def average(parameters, group):
    for parameter in parameters:
        grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad, group=group)
        parameter.grad = grad / group.nranks


def trained(family, **how):
    """Weights after the steps, losses with and without gradients, patches that this rank encoded."""
    group = world()
    with apply_to_paddleformers(families=family, **how):
        model = FAMILIES[family]()
        patches, losses = counted(model), []
        # a large epsilon: the keys' biases have no gradient but rounding, which AdamW would scale up
        optimizer = paddle.optimizer.AdamW(1e-3, epsilon=1e-4, parameters=model.parameters(), weight_decay=0.1)
        with RunReport() as report:
            for step in range(STEPS):
                for micro in range(MICRO):
                    loss = loss_of(model, batch_of(family, group.rank, group.nranks, MICRO * step + micro))
                    loss.backward()
                    losses.append(float(loss))
                average(model.parameters(), group)
                optimizer.step()
                optimizer.clear_grad()
        trained_on = sum(patches)
        model.eval()
        with paddle.no_grad():
            losses += [float(loss_of(model, batch_of(family, group.rank, group.nranks, step))) for step in range(2)]
        if how:
            stop_balancing(groups.data_group())
        return tiny.weights_of(model), losses, trained_on, report.read()


def plain(family):
    """Largest difference of a weight and of a loss; patches of unbalanced and balanced steps; the report."""
    wanted, right, before, _ = trained(family)
    weights, losses, after, report = trained(family, vision_dp="data")
    assert wanted.keys() == weights.keys()
    worst = max(float(np.abs(weights[name] - wanted[name]).max()) for name in wanted)
    moved = max(float(np.abs(wanted[name]).max()) for name in wanted)
    return {
        "weights": worst / moved,
        "losses": float(np.abs(np.array(losses) / np.array(right) - 1).max()),
        "patches": (before, after),
        "report": report,
    }


def once(nranks):
    found = {family: plain(family) for family in FAMILIES}
    if nranks == 2:
        found["model"] = a_model_that_is_built_already()
        found["generation"] = a_generation_meets_no_other()
    return found


def a_model_that_is_built_already():
    """Marked, and reverted: whether it is balanced before, with, and after."""
    model = tiny.tiny_qwen2_5_vl()
    found = [balanced_tower.is_balanced(model.model)]
    with apply_to_paddleformers(model, families="qwen2_5_vl", vision_dp="data") as report:
        found += [balanced_tower.is_balanced(model.model), "balanced over the data-parallel ranks" in str(report)]
    return [*found, balanced_tower.is_balanced(model.model)]


def a_generation_meets_no_other():
    """One rank makes a forward with a cache, alone; the other does not."""
    with apply_to_paddleformers(families="qwen2_5_vl", vision_dp="data"):
        model = tiny.tiny_qwen2_5_vl()
        model.eval()
        batch = tiny.draw_batch([["image"]], SEQ_LEN, seed=1, frames_apart=False)
        batch.pop("labels")
        if world().rank == 0:
            with paddle.no_grad():
                model(**batch, position_ids=tiny.positions(model, batch), use_cache=True)
        dist.barrier()
    return True


@pytest.mark.parametrize("nranks", [2, 4])
def test_training_ends_at_the_weights_of_data_parallelism(nranks):
    """fp32 rounding, of losses in evaluation too; the busiest rank encodes less, and every patch is counted."""
    found = run_ranks(once, nranks, nranks, timeout=400)
    for family in FAMILIES:
        of_ranks = [rank[family] for rank in found]
        assert max(each["weights"] for each in of_ranks) < RIGHT
        assert max(each["losses"] for each in of_ranks) < RIGHT
        before, after = zip(*(each["patches"] for each in of_ranks), strict=True)
        report = of_ranks[0]["report"]
        assert all(each["report"]["vision_patches_encoded"] == report["vision_patches_encoded"] for each in of_ranks)
        assert tuple(report["vision_patches_at_home"]) == before
        dummies = np.array(after) - report["vision_patches_encoded"]
        assert (dummies >= 0).all()
        assert (dummies <= 4 * STEPS * MICRO).all()
        assert report["vision_imbalance"] < report["vision_imbalance_at_home"]
        assert report["vision_bytes_moved"] > 0
    if nranks == 2:
        assert all(rank["model"] == [False, True, True, False] for rank in found)
        assert all(rank["generation"] for rank in found)


def data_and_sharding():
    """fleet's two axes of data, which make one group; gradients are averaged over it."""
    grid_of(dp_degree=2, sharding_degree=2)
    with mock.patch.object(dist, "new_group", sub_group):
        ranks = groups.data_group().ranks
    return plain("qwen2_5_vl") | {"ranks": ranks, "again": groups.data_group().ranks}


def test_data_parallelism_and_sharding_are_one_group():
    """fp32 rounding, over both axes; the ranks of either alone would leave the largest images where they are."""
    for rank in run_ranks(data_and_sharding, 4, timeout=240):
        assert rank["ranks"] == rank["again"] == [0, 1, 2, 3]
        assert rank["weights"] < RIGHT
        assert rank["losses"] < RIGHT
        assert len(rank["report"]["vision_patches_encoded"]) == 4


def two_times_two(families, context):
    """Two copies of two ranks that share a batch, by family."""
    enable_tensor_parallel_on_cpu()
    topology = grid_of(dp_degree=2, **({"sep_degree": 2} if context else {"mp_degree": 2}))
    return {family: errors(family, context, topology) for family in families}


def errors(family, context, topology):
    """Of the loss and the worst gradient, against one process that has both copies' batches; patches encoded here."""
    within = topology.get_sep_parallel_group() if context else topology.get_model_parallel_group()
    copy, data = dist.get_rank() // 2, topology.get_data_parallel_group()
    assert groups.data_group().ranks == data.ranks
    samples = [[["image", "image", "image"], ["image", "image"]], [["image", "image"], []]]
    frames = {"frames_apart": family == "qwen3_vl"}
    batches = [tiny.draw_batch(each, SEQ_LEN, seed=i, **frames) for i, each in enumerate(samples)]
    one = FAMILIES[family]()
    weights = tiny.weights_of(one)
    wanted_losses = []
    for batch in batches:
        loss = loss_of(one, batch)
        loss.backward()
        wanted_losses.append(float(loss))
    wanted = tiny.gradients_of(one)  # of both, summed
    options = {"context_parallel": "gather"} if context else {}
    with (
        mock.patch.object(tensor_parallel, "_is_gloo", return_value=True),
        apply_to_paddleformers(families=family, vision_dp="data", **options),
    ):
        model = FAMILIES[family](**({} if context else tiny.tensor_parallel(2, SEQ_LEN)))
        tiny.load_weights(model, weights, *((0, 1) if context else (within.rank, 2)))
        patches = counted(model)
        loss = loss_of(model, batches[copy])
        loss.backward()
        for parameter in model.parameters():  # what the trainer sums: over the batch's ranks, then over data
            parts = [data]
            if context or getattr(parameter, "sequence_parallel", False):
                parts.insert(0, within)
            for group in parts:
                grad = paddle.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad, group=group)
                parameter.grad = grad
        grads = tiny.gradients_of(model)
    own = wanted if context else {name: tiny.cut(name, each, within.rank, 2) for name, each in wanted.items()}
    errors = {name: np.linalg.norm(grads[name] - right) / np.linalg.norm(right) for name, right in own.items()}
    names = [name for name in errors if not name.endswith("k_proj.bias") and "qkv.bias" not in name]
    return abs(float(loss) / wanted_losses[copy] - 1), max(errors[name] for name in names), sum(patches)


@pytest.mark.parametrize(("families", "context"), [(["qwen3_vl", "qwen2_5_vl"], False), (["qwen3_vl"], True)])
def test_ranks_of_one_batch_share_what_falls_to_it(families, context):
    """Two copies, each on two tensor-parallel or context-parallel ranks: every gradient, and no image encoded twice."""
    found = run_ranks(two_times_two, 4, families, context, timeout=240)
    samples = [[["image", "image", "image"], ["image", "image"]], [["image", "image"], []]]
    drawn = [tiny.draw_batch(each, SEQ_LEN, seed=i)["pixel_values"].shape[0] for i, each in enumerate(samples)]
    for family in families:
        losses, grads, patches = zip(*(rank[family] for rank in found), strict=True)
        assert max(losses) < RIGHT
        assert max(grads) < RIGHT
        assert sum(patches) == sum(drawn)
        assert max(patches) < 0.6 * drawn[0]
