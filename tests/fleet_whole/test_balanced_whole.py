"""vision_dp="data" of PaddleFormers' whole fleet Qwen3-VL: two copies of one rank, and of two tensor-parallel ranks.

Loss and every gradient, summed over the copies, against each copy's batch on one rank, within fp32 rounding (1e-5).
"""

from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

pytest.importorskip("paddlefleet", reason="the whole fleet class is built over an installed paddlefleet")

import whole

from grid import grid_of
from paddle_vl_sp import RunReport, stop_balancing
from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from paddle_vl_sp.formers.groups import data_group
from paddle_vl_sp.testing import run_ranks, tensor_parallel

pytestmark = pytest.mark.timeout(900)
CASES = {  # the setting of the model, and whose batches the two copies have
    "images beside text": ("images", "images", "text only"),
    "text beside images and videos": ("images", "text only", "images and videos"),
    "videos beside images and text": ("images", "videos", "images and text"),
    "text beside text": ("images", "text only", "text only"),
    "full recompute": ("full recompute", "images", "images and text"),
    "frozen tower": ("frozen tower", "images", "text only"),
    "accumulation": ("accumulation of 2", "accumulation of 2", "accumulation of 2"),
    "videos beside images": ("images", "videos", "images"),
}
# the emulated groups of two times two ranks need equally many collectives, and a copy with text only has fewer
IN_STEP = ("videos beside images and text", "full recompute", "videos beside images")


def measured(case, wanted, within):
    """Errors of this rank, what moved, and the patches that its tower encoded."""
    name, *names = CASES[case]
    setting, weights, _, _ = wanted[name]
    copy = data_group().rank
    batches, (loss, _) = wanted[names[copy]][2:]
    gradients = [wanted[each][3][1] for each in names]
    right = {key: sum(each.get(key, 0) for each in gradients) for key in set(gradients[0]) | set(gradients[1])}
    if setting.frozen:
        right = {key: value for key, value in right.items() if f".{setting.frozen}." not in key}
    place, size = (within.rank, within.nranks) if within is not None else (0, 1)
    with apply_to_qwen3_vl(vision_dp="data"):
        model = whole.build(setting, size)
        whole.load(model, weights, setting, place, size)
        with RunReport() as report:
            own_loss, _ = whole.step(model, batches)
        if within is not None:
            tiny.sum_marked_gradients(model, within)
        own, total = tiny.gradients_of(model), {}
        for key in sorted(right):
            part = whole.cut(key, right, place, size)
            gradient = paddle.to_tensor(np.ascontiguousarray(own.get(key, np.zeros_like(part))))
            dist.all_reduce(gradient, group=data_group())
            total[key] = gradient.numpy()
        stop_balancing(data_group())
    found = whole.errors(total, right, setting, place, size) | {"loss": abs(own_loss - loss)}
    blanks = [own[key] for key in own.keys() - right.keys()]  # of the blank image that a tower without work encodes
    return found | {"tower": report.read().get("vision_patches_encoded"), "extra": sum(each.any() for each in blanks)}


def on_two(wanted):
    paddle.set_device("cpu")
    grid_of(dp_degree=2)
    return {case: measured(case, wanted, None) for case in CASES}


def on_two_times_two(wanted):
    paddle.set_device("cpu")
    with (
        tensor_parallel.enable_tensor_parallel_on_cpu(),
        mock.patch.object(tensor_parallel, "_is_gloo", return_value=True),
    ):
        within = grid_of(dp_degree=2, mp_degree=2).get_model_parallel_group()
        return {case: measured(case, wanted, within) for case in IN_STEP}


@pytest.fixture(scope="module")
def wanted():
    return whole.references()


@pytest.fixture(scope="module")
def of_two(wanted):
    return run_ranks(on_two, 2, wanted, timeout=500)


@pytest.fixture(scope="module")
def of_four(wanted):
    return run_ranks(on_two_times_two, 4, wanted, timeout=500)


def hold(found, case):
    for rank in found:
        got = rank[case]
        assert max(got["loss"], got["vision"], got["text"], got["qk norms"]) < 1e-5, got
        assert got["unexpected"] == got["extra"] == 0
    patches = found[0][case]["tower"]
    assert all(rank[case]["tower"] == patches for rank in found)
    return patches


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_both_copies(of_two, case):
    """Thirteen images of one copy: neither encodes more than 55 % of the patches."""
    patches = hold(of_two, case)
    assert case != "images beside text" or max(patches) < 0.55 * sum(patches)


@pytest.mark.parametrize("case", IN_STEP)
def test_sequence_parallelism_inside(of_four, case):
    patches = hold(of_four, case)
    assert max(patches) < 0.6 * sum(patches)
