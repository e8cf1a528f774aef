"""What stands for Paddle's groups and topologies."""

import contextlib
from types import SimpleNamespace

import paddle
import paddle.distributed as dist

from paddle_vl_sp.comm import collectives


def world():
    """The default group, which joins all ranks."""
    return dist.get_group(0)


def topology_of(group, stages=1):
    """fleet's hybrid topology, as far as tensor-parallel layers and pipelines ask it."""
    return SimpleNamespace(
        get_model_parallel_group=lambda: group,
        get_model_parallel_rank=lambda: group.rank,
        get_model_parallel_world_size=lambda: group.nranks,
        get_pipe_parallel_world_size=lambda: stages,
    )


@contextlib.contextmanager
def with_reduce_scatter():
    """As on a backend that has one: made of an all-reduce and a cut. Yields the shapes that it got."""
    real, shapes = (collectives.has_reduce_scatter, dist.stream.reduce_scatter), []

    def reduce_scatter(out, x, group, sync_op):
        assert sync_op
        shapes.append(tuple(x.shape))
        whole = x.clone()
        dist.all_reduce(whole, group=group)
        rows = out.shape[0]
        paddle.assign(whole[group.rank * rows : (group.rank + 1) * rows], output=out)

    collectives.has_reduce_scatter, dist.stream.reduce_scatter = (lambda _: True), reduce_scatter
    try:
        yield shapes
    finally:
        collectives.has_reduce_scatter, dist.stream.reduce_scatter = real
