"""The process groups that PaddleFormers' models run with, from Paddle's hybrid topology."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from paddle_vl_sp.comm.collectives import Group


def topology() -> Any:
    """Paddle's hybrid topology; None before fleet.init."""
    from paddle.distributed import fleet

    try:
        return fleet.get_hybrid_communicate_group()
    except (AssertionError, AttributeError):  # how Paddle says that there is none
        return None


def sep_size() -> int:
    """The degree of the axis whose ranks share a sequence; 1 where there is none."""
    groups = topology()
    size = getattr(groups, "get_sep_parallel_world_size", None)
    return 1 if size is None else int(size())


def tensor_parallel_group() -> Group | None:
    """The group that tensor and sequence parallelism cut over; None before fleet.init."""
    groups = topology()
    group: Group | None = None if groups is None else groups.get_model_parallel_group()
    return group


def data_group() -> Group | None:
    """The ranks that train on other batches with the same weights: data parallelism and sharding, joined.

    Without fleet.init all ranks of the launch; None where there is one such rank. The first call may make a group, and
    then every rank of the launch must make it.
    """
    import paddle.distributed as dist

    groups = topology()
    if groups is None:
        everyone: Group | None = dist.get_group(0) if dist.is_initialized() and dist.get_world_size() > 1 else None
        return everyone
    axes: list[Group] = [groups.get_data_parallel_group(), groups.get_sharding_parallel_group()]
    of_many = [group for group in axes if group.nranks > 1]
    return _joined(groups) if len(of_many) > 1 else of_many[0] if of_many else None


@lru_cache(maxsize=1)
def _joined(groups: Any) -> Group:
    group: Group = groups.create_fuse_group(["data", "sharding"])[1]
    return group


def require_tensor_parallel_group() -> Group:
    """The same, where there must be one."""
    group = tensor_parallel_group()
    if group is None:
        raise ValueError(
            "there is no tensor-parallel group: call paddle.distributed.fleet.init with mp_degree before the first "
            "forward, or turn sequence_parallel off"
        )
    return group
