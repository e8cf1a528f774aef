"""Switches that only the plugin reads, where it does not run: said, instead of left without effect."""

from __future__ import annotations

import os

from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import CONTEXT_PARALLEL, FAMILIES, LOADER_PLANS, REPORT, STRICT, SWITCHES, VISION_DP

INSTEAD = {  # what code of one's own has for each
    FAMILIES: "apply_to_paddleformers(families=...)",
    STRICT: "apply_to_paddleformers(strict=False)",
    VISION_DP: "apply_to_paddleformers(vision_dp=...)",
    CONTEXT_PARALLEL: "apply_to_paddleformers(context_parallel=...)",
    LOADER_PLANS: "PlanningCollate",
    REPORT: "report_to(trainer)",
}

_read: list[bool] = []  # one element where the plugin has run


def plugin_runs() -> None:
    _read[:] = [True]


def warn_of_unread() -> None:
    for switch, instead in INSTEAD.items():
        value = os.environ.get(switch, "")
        if value and not _read and value.lower() != SWITCHES.get(switch, ("",))[0]:
            logger.warning("%s=%s has no effect: only the plugin reads it; instead there is %s", switch, value, instead)
