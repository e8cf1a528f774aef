"""Context parallelism of PaddleFormers' whole fleet Qwen3-VL: on two ranks, and on two times two with sequence
parallelism over tensor-parallel groups inside. Loss and every gradient against one rank, within fp32 rounding (1e-5).
"""

from unittest import mock

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

pytest.importorskip("paddlefleet", reason="the whole fleet class is built over an installed paddlefleet")

import whole

from grid import grid_of
from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import run_ranks, tensor_parallel

pytestmark = pytest.mark.timeout(900)
KINDS = ("gather", "ring", "ulysses")
SELECTIVE = whole.Setting(
    "core attention recomputed", text={"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
)
NAMES = [setting.name for setting in whole.SETTINGS if setting.name != "empty layer in the head"]
NAMES.append(SELECTIVE.name)


def summed(gradients, wanted, setting, rank, nranks, group):
    """The gradients of all parameters, of which a rank may have none, summed over the ranks that share a sequence."""
    total = {}
    for name in wanted:
        right = whole.cut(name, wanted, rank, nranks)
        own = gradients.get(name, np.zeros_like(right))
        gradient = paddle.to_tensor(np.ascontiguousarray(own))
        dist.all_reduce(gradient, group=group)
        total[name] = gradient.numpy()
    return total


def measured(given, setting_of, group, rank=0, nranks=1):
    setting, weights, batches, (loss, gradients) = given
    with apply_to_qwen3_vl(context_parallel=setting_of):
        model = whole.build(setting, nranks)
        whole.load(model, weights, setting, rank, nranks)
        own_loss, own = whole.step(model, batches)
        if nranks > 1:
            tensor_group = paddle.distributed.fleet.get_hybrid_communicate_group().get_model_parallel_group()
            tiny.sum_marked_gradients(model, tensor_group)
            own = tiny.gradients_of(model)
    total = summed(own, gradients, setting, rank, nranks, group)
    return whole.errors(total, gradients, setting, rank, nranks) | {"loss": abs(own_loss - loss)}


def on_ranks(names, kinds, wanted):
    paddle.set_device("cpu")
    group = dist.get_group(0)
    return {
        (name, kind): measured(wanted[name], ContextParallel(kind, group=group), group)
        for name in names
        for kind in kinds
    }


def on_two_times_two(names, wanted):
    """The context axis is looked up: fleet's sep axis."""
    paddle.set_device("cpu")
    with (
        tensor_parallel.enable_tensor_parallel_on_cpu(),
        mock.patch.object(tensor_parallel, "_is_gloo", return_value=True),
    ):
        grid = grid_of(dp_degree=1, mp_degree=2, sep_degree=2)
        group, place = grid.get_sep_parallel_group(), grid.get_model_parallel_group().rank
        return {
            (name, kind): measured(wanted[name], ContextParallel(kind), group, place, 2)
            for name in names
            for kind in ("gather", "ring", "ulysses")
        }


@pytest.fixture(scope="module")
def wanted():
    found = whole.references()
    return found | {SELECTIVE.name: (SELECTIVE, *found["images"][1:])}


@pytest.fixture(scope="module")
def of_two(wanted):
    return run_ranks(on_ranks, 2, NAMES, KINDS, wanted, timeout=500)


SOME = [SELECTIVE.name, "images", "images and videos", "full recompute", "packed", "text only", "accumulation of 2"]


@pytest.fixture(scope="module", params=[3, 4], ids=["3 ranks", "4 ranks"])
def of_more(request, wanted):
    return run_ranks(on_ranks, request.param, SOME, ("gather", "ring"), wanted, timeout=500)


@pytest.fixture(scope="module")
def of_four(wanted):
    return run_ranks(on_two_times_two, 4, SOME, wanted, timeout=600)


def is_right(rank):
    return max(rank["loss"], rank["vision"], rank["text"], rank["qk norms"]) < 1e-5 and rank["unexpected"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks(of_two, name, kind):
    for rank in of_two:
        assert is_right(rank[name, kind]), rank[name, kind]


@pytest.mark.parametrize("kind", ["gather", "ring"])
@pytest.mark.parametrize("name", SOME)
def test_three_and_four_ranks(of_more, name, kind):
    for rank in of_more:
        assert is_right(rank[name, kind]), rank[name, kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_sequence_parallelism_inside(of_four, name, kind):
    for rank in of_four:
        assert is_right(rank[name, kind]), rank[name, kind]
