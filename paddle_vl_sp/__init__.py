"""Sequence-parallel vision-language training for PaddlePaddle: plan the visual rows once, use the plan everywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paddle_vl_sp.joint import joint_features
    from paddle_vl_sp.layout import SeqLayout
    from paddle_vl_sp.ops import backend
    from paddle_vl_sp.plan import VisualPlan, plan_visual
    from paddle_vl_sp.rows import add_rows, replace_rows

__version__ = "0.1.0"

_HOME = {
    "SeqLayout": "layout",
    "VisualPlan": "plan",
    "plan_visual": "plan",
    "joint_features": "joint",
    "replace_rows": "rows",
    "add_rows": "rows",
    "backend": "ops",
}

__all__ = [
    "SeqLayout",
    "VisualPlan",
    "__version__",
    "add_rows",
    "backend",
    "joint_features",
    "plan_visual",
    "replace_rows",
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
