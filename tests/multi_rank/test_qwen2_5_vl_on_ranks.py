"""Qwen2.5-VL under tensor-parallel sequence parallelism on real ranks, with and without a shared tower.

Loss and every gradient against one process. Upstream is right here as well: plan and shared work must keep it so.
"""

import functools

import numpy as np
import paddle
import pytest

from paddle_vl_sp.formers import apply_to_qwen2_5_vl, tiny
from paddle_vl_sp.testing import run_ranks
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

SEQ_LEN = 96
SAMPLES = {
    "images": [["image", "image"], ["image"], []],
    "videos": [["video"], ["video", "video"]],
    "both": [["image", "video"], ["video"], ["image"]],
    "text": [[], []],
    "one": [["image"]],  # fewer than ranks
    "packed": [["image", "video"], ["image"]],
}
WAYS = {2: ("upstream", "plan", "shared", "shared as it is built"), 4: ("plan", "shared")}
RIGHT = 1e-5


def batches():
    for i, (name, samples) in enumerate(SAMPLES.items()):
        batch = tiny.draw_batch(samples, SEQ_LEN, seed=i, frames_apart=False)
        if name == "packed":
            ends = np.repeat(np.array([40, SEQ_LEN], "int32"), [40, SEQ_LEN - 40]).reshape(1, 1, SEQ_LEN, 1)
            batch["attn_mask_startend_row_indices"] = paddle.to_tensor(np.repeat(ends, 2, axis=0))
        yield name, batch


def step(model, batch, group=None):
    tiny.drop_gradients(model)
    loss = model(**batch, position_ids=tiny.positions(model, batch)).loss
    loss.backward()
    if group is not None:
        tiny.sum_marked_gradients(model, group)
    return float(loss), tiny.gradients_of(model)


def measure(nranks):
    """{way: {batch: (loss error, worst gradient error, gradients too many)}}, and patches encoded by this rank."""
    enable_tensor_parallel_on_cpu()
    group = init_tensor_parallel(nranks)
    one = tiny.tiny_qwen2_5_vl()
    weights = tiny.weights_of(one)
    wanted = {name: step(one, batch) for name, batch in batches()}  # upstream's own
    found = {}
    for way in WAYS[nranks]:
        built = {} if way != "shared as it is built" else {"vision_dp": True}
        applied = None if way == "upstream" else apply_to_qwen2_5_vl(**built)
        model = tiny.tiny_qwen2_5_vl(**tiny.tensor_parallel(nranks, SEQ_LEN))
        tiny.load_weights(model, weights, group.rank, nranks)
        shared = apply_to_qwen2_5_vl(model, vision_dp=True) if way == "shared" else None
        patches, tower = [], model.visual.forward
        model.visual.forward = lambda x, grid_thw, into=patches, run=tower: (into.append(len(x)), run(x, grid_thw))[1]
        found[way] = {
            name: errors(step(model, batch, group), wanted[name], group.rank, nranks) for name, batch in batches()
        }
        found[way]["patches"] = sum(patches)
        for change in (shared, applied):
            if change is not None:
                change.take_back()
    return found


def errors(got, wanted, rank, nranks):
    (loss, gradients), (right_loss, right) = got, wanted
    worst = 0.0
    for name, gradient in right.items():
        own = tiny.cut(name, gradient, rank, nranks)
        wrong = np.linalg.norm(gradients.get(name, np.zeros_like(own)) - own)
        worst = max(worst, float(wrong / max(np.linalg.norm(own), 1e-30)))
    return abs(loss - right_loss), worst, len(gradients.keys() - right.keys())


@functools.cache
def found(nranks):
    return run_ranks(measure, nranks, nranks, timeout=240)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(("nranks", "way"), [(nranks, way) for nranks, ways in WAYS.items() for way in ways])
def test_loss_and_gradients_are_those_of_one_process(nranks, way, name):
    """fp32 rounding, on every rank."""
    for rank in found(nranks):
        loss, worst, too_many = rank[way][name]
        assert loss < 2e-6
        assert worst < RIGHT
        assert too_many == 0 or way.startswith("shared")  # a rank without images takes part in the sum with zeros


@pytest.mark.parametrize("nranks", WAYS)
def test_the_work_is_shared(nranks):
    """Patches: every rank encodes all of them without it, and each is encoded once with it."""
    ranks = found(nranks)
    whole = ranks[0]["plan"]["patches"]
    assert all(rank[way]["patches"] == whole for rank in ranks for way in ("plan", "upstream") if way in rank)
    for way in [way for way in WAYS[nranks] if way.startswith("shared")]:
        real = sum(rank[way]["patches"] for rank in ranks)
        assert whole <= real < 1.5 * whole, "more are the small dummies of ranks that have nothing to encode"
