"""PaddleFormers' Qwen3-VL with this package's rows and gradients, by one line; needs paddleformers."""

from __future__ import annotations

from paddle_vl_sp.formers.deepstack import DiffersFromUpstream
from paddle_vl_sp.formers.loader import PlanningCollate, plans_of_all_ranks
from paddle_vl_sp.formers.patch import UpstreamChanged, apply_to_qwen3_vl
from paddle_vl_sp.formers.report import PatchReport
from paddle_vl_sp.formers.standing import revert

__all__ = [
    "DiffersFromUpstream",
    "PatchReport",
    "PlanningCollate",
    "UpstreamChanged",
    "apply_to_qwen3_vl",
    "plans_of_all_ranks",
    "revert",
]
