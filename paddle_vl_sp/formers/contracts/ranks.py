"""One process that takes itself for a rank of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from paddle import Tensor

from paddle_vl_sp.testing import FakeGroup


@contextmanager
def as_rank(rank: int, nranks: int) -> Iterator[None]:
    """Paddle's topology and its cut of a sequence are those of this rank; there is no communication."""
    from paddle.distributed import fleet
    from paddle.distributed.fleet.utils.sequence_parallel_utils import ScatterOp

    def cut(rows: Tensor, *_: Any, **__: Any) -> Tensor:
        return rows.split(nranks, axis=0)[rank]

    topology = SimpleNamespace(
        get_model_parallel_rank=lambda: rank,
        get_model_parallel_world_size=lambda: nranks,
        get_model_parallel_group=lambda: FakeGroup(rank, nranks),
        get_pipe_parallel_world_size=lambda: 1,
    )
    with (
        mock.patch.object(fleet, "get_hybrid_communicate_group", return_value=topology),
        mock.patch.object(ScatterOp, "apply", staticmethod(cut)),
    ):
        yield
