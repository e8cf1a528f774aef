"""Every environment variable of the package, and the check of every argument that is one word out of several."""

from __future__ import annotations

import os
from collections.abc import Sequence

ENABLED, BACKEND, CHECK = "PADDLE_VL_SP", "PADDLE_VL_SP_BACKEND", "PADDLE_VL_SP_CHECK"
LOG, REPORT = "PADDLE_VL_SP_LOG", "PADDLE_VL_SP_REPORT"
STRICT, VISION_DP, LOADER_PLANS = "PADDLE_VL_SP_STRICT", "PADDLE_VL_SP_VISION_DP", "PADDLE_VL_SP_LOADER_PLANS"
PROBE = "PADDLE_VL_SP_PROBE"
CONTEXT_PARALLEL = "PADDLE_VL_SP_CONTEXT_PARALLEL"
AUDIT = "PADDLE_VL_SP_AUDIT"
FAMILIES = "PADDLE_VL_SP_FAMILIES"  # names with commas between; unset or empty: all

SWITCHES = {  # the first word is the default
    ENABLED: ("1", "0"),
    BACKEND: ("auto", "op", "python"),
    CHECK: ("0", "1"),
    LOG: ("info", "debug", "warning", "error"),
    REPORT: ("0", "1"),
    STRICT: ("1", "0"),
    VISION_DP: ("0", "1", "data"),
    LOADER_PLANS: ("0", "1"),
    CONTEXT_PARALLEL: ("0", "auto", "gather", "ring", "ulysses"),
    PROBE: ("cached", "always", "never"),
    AUDIT: ("0", "1", "strict"),
}


def setting(switch: str) -> str:
    """The value of a switch in the environment, read at every call; its default where it is unset or empty."""
    words = SWITCHES[switch]
    value = os.environ.get(switch, "").lower() or words[0]
    if set(words) == {"0", "1"} and value not in words:
        raise ValueError(f"{switch} must be 0 or 1, got {value!r}")
    check_choice(switch, value, words)
    return value


def is_on(switch: str) -> bool:
    return setting(switch) == "1"


def names_in(switch: str) -> tuple[str, ...] | None:
    """The names in a switch that is a list; None where it is unset or empty."""
    return tuple(name.strip() for name in os.environ.get(switch, "").split(",") if name.strip()) or None


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises unless the value of the argument `name` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
