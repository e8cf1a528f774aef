"""fleet's own topology over a grid of gloo ranks, whose groups are emulated over the default one."""

from unittest import mock

import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.communication import group as groups

from paddle_vl_sp.attention.groups import SequenceGroups
from paddle_vl_sp.testing.subgroup import SubGroup, _EmulatedProcessGroup


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


def two_times_two():
    """Ring x Ulysses over four ranks."""
    rank = dist.get_rank()
    return SequenceGroups(
        ulysses=SubGroup([rank - rank % 2, rank - rank % 2 + 1]), ring=SubGroup([rank % 2, rank % 2 + 2])
    )


def grid_of(**degrees):
    """Of degrees such as dp_degree and mp_degree, whose product is the number of ranks."""
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"pp_degree": 1, **degrees}
    with mock.patch.object(dist, "new_group", sub_group):
        fleet.init(is_collective=True, strategy=strategy)
    return fleet.get_hybrid_communicate_group()
