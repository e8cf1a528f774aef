"""PaddleFormers' Qwen3-VL on two data-parallel copies of two tensor-parallel ranks: the rank in the group is not the
global one. Bar: fp32 rounding against one process, as in test_formers.py.
"""

from unittest import mock

import paddle.distributed as dist
import pytest
import test_formers
from test_formers import MORE, RIGHT, SAMPLES, SOME, Ranks, of_loaded_plans, of_shared_tower, on_one

from grid import grid_of
from paddle_vl_sp.formers import apply_to_qwen3_vl
from paddle_vl_sp.testing import run_ranks, tensor_parallel
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu

COPIES, SIZE = 2, 2


def init_copies():
    """fleet's own topology; the tensor-parallel group of this rank."""
    return grid_of(dp_degree=COPIES, mp_degree=SIZE).get_model_parallel_group()


def measure():
    enable_tensor_parallel_on_cpu()
    with (
        mock.patch.object(tensor_parallel, "_is_gloo", return_value=True),
        mock.patch.object(test_formers, "init_tensor_parallel", return_value=init_copies()),
    ):
        ranks = Ranks(SIZE, *on_one())
        found = {"place": (ranks.group.ranks, ranks.rank)}
        with apply_to_qwen3_vl():
            found["patched"] = ranks.errors(ranks.model(), SOME)
            found["loaded"] = of_loaded_plans(ranks, ranks.model())
            found["vision dp"] = of_shared_tower(ranks)
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(measure, COPIES * SIZE, timeout=180)


def test_the_groups_are_those_of_two_copies(found):
    """Exact: without this the tests below say nothing."""
    assert [rank["place"] for rank in found] == [([0, 1], 0), ([0, 1], 1), ([2, 3], 0), ([2, 3], 1)]


@pytest.mark.parametrize(
    ("case", "kind"), [*(("patched", kind) for kind in SOME), *(("vision dp", kind) for kind in MORE)]
)
def test_every_gradient_is_that_of_one_process(found, case, kind):
    """fp32 rounding: loss and every gradient, on every rank of both copies; none more, none less."""
    for rank in found:
        assert rank[case][kind]["loss"] < 2e-6
        assert rank[case][kind]["tower"] < RIGHT
        assert rank[case][kind]["language"] < RIGHT
        assert rank[case][kind]["more"] == 0


def test_plans_of_the_loader_change_nothing(found):
    """Bit-exact: loss and gradients of every batch."""
    assert all(rank["loaded"] == dict.fromkeys(SAMPLES, True) for rank in found)


def test_each_copy_shares_its_images(found):
    """Six images: within each copy none is encoded twice."""
    images = [rank["vision dp"]["images"] for rank in found]
    assert images[0] + images[1] == images[2] + images[3] == 6
