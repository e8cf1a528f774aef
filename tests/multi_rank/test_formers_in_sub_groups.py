"""PaddleFormers' Qwen3-VL on two data-parallel copies of two tensor-parallel ranks: the rank in the group is not the
global one. Bar: fp32 rounding against one process, as in test_formers.py.
"""

from unittest import mock

import paddle.distributed as dist
import pytest
import test_formers
from paddle.distributed import fleet
from paddle.distributed.communication import group as groups
from test_formers import MORE, RIGHT, SAMPLES, SOME, Ranks, of_loaded_plans, of_shared_tower, on_one

from paddle_vl_sp.formers import apply_to_qwen3_vl
from paddle_vl_sp.testing import run_ranks, tensor_parallel
from paddle_vl_sp.testing.subgroup import SubGroup, _EmulatedProcessGroup
from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu

COPIES, SIZE = 2, 2


class ForLayers(_EmulatedProcessGroup):
    """With the calls that Paddle's tensor-parallel layers make besides."""

    def all_gather(self, first, second, sync_op=True):
        if isinstance(first, list):
            return super().all_gather(first, second, sync_op)
        return self.all_gather_into_tensor(second, first)  # the older order, of two tensors

    def all_gather_into_tensor_on_calc_stream(self, output, tensor):
        return self.all_gather_into_tensor(output, tensor)

    def all_reduce_on_calc_stream(self, tensor, op):
        return self.all_reduce(tensor, op)


def sub_group(ranks, *_, **__):
    """Stands in for new_group: gloo does not always bring up groups of its own on one machine."""
    if ranks is None or len(ranks) == dist.get_world_size():
        return dist.get_group(0)
    is_ours = dist.get_rank() in ranks
    made = SubGroup(ranks) if is_ours else groups.Group(-1, 5000 + sum(1 << rank for rank in ranks), list(ranks))
    if is_ours:
        made._pg = ForLayers(list(ranks))
    groups._GroupManager.group_map_by_id[made.id] = made
    return made


def init_copies():
    """fleet's own topology; the tensor-parallel group of this rank."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": COPIES, "mp_degree": SIZE, "pp_degree": 1}
    with mock.patch.object(dist, "new_group", sub_group):
        fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group().get_model_parallel_group()


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
            found["loaded"] = of_loaded_plans(ranks)
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
