"""Sequence-parallel vision-language training for PaddlePaddle: plan the visual rows once, use the plan everywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddle_vl_sp.comm import all_gather_rows, complete_grad
    from paddle_vl_sp.consensus import agree
    from paddle_vl_sp.formers import PatchReport, apply_to_qwen3_vl, revert
    from paddle_vl_sp.joint import joint_features
    from paddle_vl_sp.layout import SeqLayout
    from paddle_vl_sp.local import plan_visual_local
    from paddle_vl_sp.ops import backend
    from paddle_vl_sp.plan import VisualPlan, plan_visual
    from paddle_vl_sp.replicas import check_replicas, sync_replicas
    from paddle_vl_sp.rows import add_rows, replace_rows
    from paddle_vl_sp.run_report import RunReport, note_forward
    from paddle_vl_sp.vision.gradients import mark_for_sum, sum_parameter_grads
    from paddle_vl_sp.vision.parallel import encode_shared
    from paddle_vl_sp.vision.share import VisionShare, share_images

__version__ = "0.1.0"

_HOME = {
    "PatchReport": "formers",
    "RunReport": "run_report",
    "SeqLayout": "layout",
    "VisionShare": "vision.share",
    "VisualPlan": "plan",
    "add_rows": "rows",
    "agree": "consensus",
    "all_gather_rows": "comm",
    "apply_to_qwen3_vl": "formers",
    "backend": "ops",
    "check_replicas": "replicas",
    "complete_grad": "comm",
    "encode_shared": "vision.parallel",
    "joint_features": "joint",
    "mark_for_sum": "vision.gradients",
    "note_forward": "run_report",
    "plan_visual": "plan",
    "plan_visual_local": "local",
    "replace_rows": "rows",
    "revert": "formers",
    "share_images": "vision.share",
    "sum_parameter_grads": "vision.gradients",
    "sync_replicas": "replicas",
}

__all__ = [
    "PatchReport",
    "RunReport",
    "SeqLayout",
    "VisionShare",
    "VisualPlan",
    "__version__",
    "add_rows",
    "agree",
    "all_gather_rows",
    "apply_to_qwen3_vl",
    "backend",
    "check_replicas",
    "complete_grad",
    "encode_shared",
    "joint_features",
    "mark_for_sum",
    "note_forward",
    "plan_visual",
    "plan_visual_local",
    "replace_rows",
    "revert",
    "share_images",
    "sum_parameter_grads",
    "sync_replicas",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: layouts and plans on the host need no Paddle."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
