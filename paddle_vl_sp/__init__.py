"""Sequence-parallel vision-language training for PaddlePaddle: plan the visual rows once, use the plan everywhere."""

from typing import TYPE_CHECKING

from paddle_vl_sp.lazy import MovedModule, lazy_exports

if TYPE_CHECKING:
    from paddle_vl_sp.audit import GradientAudit, audit_gradients
    from paddle_vl_sp.backends.load import backend
    from paddle_vl_sp.comm.agree import agree
    from paddle_vl_sp.comm.gather import all_gather_rows
    from paddle_vl_sp.comm.grads import complete_grad, mark_for_sum, sum_parameter_grads
    from paddle_vl_sp.comm.local_plan import plan_visual_local
    from paddle_vl_sp.comm.replicas import check_replicas, sync_replicas
    from paddle_vl_sp.formers import (
        PatchReport,
        apply_to_paddleformers,
        apply_to_qwen2_5_vl,
        apply_to_qwen3_next,
        apply_to_qwen3_vl,
        revert,
    )
    from paddle_vl_sp.interleave import joint_features
    from paddle_vl_sp.layout import SeqLayout
    from paddle_vl_sp.plan import VisualPlan, plan_visual
    from paddle_vl_sp.report import RunReport, note_forward
    from paddle_vl_sp.rows import add_rows, replace_rows
    from paddle_vl_sp.vision.balanced import encode_balanced, stop_balancing
    from paddle_vl_sp.vision.parallel import encode_shared
    from paddle_vl_sp.vision.share import VisionShare, share_images

__version__ = "0.2.0.dev0"

__all__ = [
    "GradientAudit",
    "PatchReport",
    "RunReport",
    "SeqLayout",
    "VisionShare",
    "VisualPlan",
    "__version__",
    "add_rows",
    "agree",
    "all_gather_rows",
    "apply_to_paddleformers",
    "apply_to_qwen2_5_vl",
    "apply_to_qwen3_next",
    "apply_to_qwen3_vl",
    "audit_gradients",
    "backend",
    "check_replicas",
    "complete_grad",
    "encode_balanced",
    "encode_shared",
    "joint_features",
    "mark_for_sum",
    "note_forward",
    "plan_visual",
    "plan_visual_local",
    "replace_rows",
    "revert",
    "share_images",
    "stop_balancing",
    "sum_parameter_grads",
    "sync_replicas",
]

_import, __dir__ = lazy_exports(
    __name__,
    {
        "GradientAudit": "audit",
        "PatchReport": "formers",
        "RunReport": "report",
        "SeqLayout": "layout",
        "VisionShare": "vision.share",
        "VisualPlan": "plan",
        "add_rows": "rows",
        "agree": "comm.agree",
        "all_gather_rows": "comm.gather",
        "apply_to_paddleformers": "formers",
        "apply_to_qwen2_5_vl": "formers",
        "apply_to_qwen3_next": "formers",
        "apply_to_qwen3_vl": "formers",
        "audit_gradients": "audit",
        "backend": "backends.load",
        "check_replicas": "comm.replicas",
        "complete_grad": "comm.grads",
        "encode_balanced": "vision.balanced",
        "encode_shared": "vision.parallel",
        "joint_features": "interleave",
        "mark_for_sum": "comm.grads",
        "note_forward": "report",
        "plan_visual": "plan",
        "plan_visual_local": "comm.local_plan",
        "replace_rows": "rows",
        "revert": "formers",
        "share_images": "vision.share",
        "stop_balancing": "vision.balanced",
        "sum_parameter_grads": "comm.grads",
        "sync_replicas": "comm.replicas",
    },
)
if not TYPE_CHECKING:  # to type checkers, a name that is not above is an error
    __getattr__ = _import

consensus = MovedModule(f"{__name__}.consensus", f"{__name__}.comm.agree")
emulate = MovedModule(f"{__name__}.emulate", f"{__name__}.testing.subgroup")
local = MovedModule(f"{__name__}.local", f"{__name__}.comm.local_plan")
