"""PaddleFormers' models with this package's rows and gradients, by one line; needs paddleformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paddle_vl_sp.carried import plans_of_all_ranks
from paddle_vl_sp.formers.causes import name_causes
from paddle_vl_sp.formers.changes import revert
from paddle_vl_sp.formers.found import UpstreamChanged
from paddle_vl_sp.formers.loader import PlanningCollate
from paddle_vl_sp.formers.patch import (
    apply_to_paddleformers,
    apply_to_qwen2_5_vl,
    apply_to_qwen3_next,
    apply_to_qwen3_vl,
)
from paddle_vl_sp.formers.report import PatchReport
from paddle_vl_sp.lazy import lazy_exports
from paddle_vl_sp.verify import CheckFailed

if TYPE_CHECKING:
    from paddle_vl_sp.formers.callback import VisualReport, report_to

__all__ = [
    "CheckFailed",
    "DiffersFromUpstream",
    "PatchReport",
    "PlanningCollate",
    "UpstreamChanged",
    "VisualReport",
    "apply_to_paddleformers",
    "apply_to_qwen2_5_vl",
    "apply_to_qwen3_next",
    "apply_to_qwen3_vl",
    "plans_of_all_ranks",
    "report_to",
    "revert",
]


DiffersFromUpstream = CheckFailed

name_causes()

# PaddleFormers' trainer imports a lot that its models do not need
_import, __dir__ = lazy_exports(__name__, {"VisualReport": "callback", "report_to": "callback"})
if not TYPE_CHECKING:  # to type checkers, a name that is not above is an error
    __getattr__ = _import
