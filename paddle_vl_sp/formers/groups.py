"""The process groups that PaddleFormers' models run with, from Paddle's hybrid topology."""

from __future__ import annotations

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


def require_tensor_parallel_group() -> Group:
    """The same, where there must be one."""
    group = tensor_parallel_group()
    if group is None:
        raise ValueError(
            "there is no tensor-parallel group: call paddle.distributed.fleet.init with mp_degree before the first "
            "forward, or turn sequence_parallel off"
        )
    return group
