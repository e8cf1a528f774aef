"""For tests without a GPU: any rank of any group as a value, and real ranks with real collectives on the CPU."""

from typing import TYPE_CHECKING

from paddle_vl_sp.lazy import lazy_exports

if TYPE_CHECKING:
    from paddle_vl_sp.testing.launch import FakeGroup, RanksFailed, run_ranks
    from paddle_vl_sp.testing.subgroup import SubGroup
    from paddle_vl_sp.testing.tensor_parallel import enable_tensor_parallel_on_cpu, init_tensor_parallel

__all__ = [
    "FakeGroup",
    "RanksFailed",
    "SubGroup",
    "enable_tensor_parallel_on_cpu",
    "init_tensor_parallel",
    "run_ranks",
]

_import, __dir__ = lazy_exports(
    __name__,
    {
        "FakeGroup": "launch",
        "RanksFailed": "launch",
        "SubGroup": "subgroup",
        "enable_tensor_parallel_on_cpu": "tensor_parallel",
        "init_tensor_parallel": "tensor_parallel",
        "run_ranks": "launch",
    },
)
if not TYPE_CHECKING:  # to type checkers, a name that is not above is an error
    __getattr__ = _import
