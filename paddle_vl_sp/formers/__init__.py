"""PaddleFormers' Qwen3-VL with this package's rows and gradients, by one line; needs paddleformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paddle_vl_sp.formers.deepstack import DiffersFromUpstream
from paddle_vl_sp.formers.loader import PlanningCollate, plans_of_all_ranks
from paddle_vl_sp.formers.patch import UpstreamChanged, apply_to_qwen3_vl
from paddle_vl_sp.formers.report import PatchReport
from paddle_vl_sp.formers.standing import revert

if TYPE_CHECKING:
    from paddle_vl_sp.formers.callback import VisualReport, report_to

__all__ = [
    "DiffersFromUpstream",
    "PatchReport",
    "PlanningCollate",
    "UpstreamChanged",
    "VisualReport",
    "apply_to_qwen3_vl",
    "plans_of_all_ranks",
    "report_to",
    "revert",
]


def __getattr__(name: str) -> Any:
    """PaddleFormers' trainer imports a lot that its models do not need."""
    if name not in ("VisualReport", "report_to"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paddle_vl_sp.formers import callback

    return getattr(callback, name)
