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


def require_tensor_parallel_group() -> Group:
    """The group that sequence parallelism cuts over."""
    groups = topology()
    if groups is None:
        raise ValueError(
            "there is no tensor-parallel group: call paddle.distributed.fleet.init with mp_degree before the first "
            "forward, or turn sequence_parallel off"
        )
    group: Group = groups.get_model_parallel_group()
    return group
