"""Every switch of the environment, and the check of every argument that is one word out of several."""

from __future__ import annotations

import os
from collections.abc import Sequence

ENABLED, BACKEND, CHECK = "PADDLE_VL_SP", "PADDLE_VL_SP_BACKEND", "PADDLE_VL_SP_CHECK"
LOG, REPORT = "PADDLE_VL_SP_LOG", "PADDLE_VL_SP_REPORT"

SWITCHES = {  # the first word is the default
    ENABLED: ("1", "0"),
    BACKEND: ("auto", "op", "python"),
    CHECK: ("0", "1"),
    LOG: ("info", "debug", "warning", "error"),
    REPORT: ("0", "1"),
}


def setting(switch: str) -> str:
    """The word that the environment gives a switch, read anew every time; its default where it is not set or empty."""
    words = SWITCHES[switch]
    value = os.environ.get(switch, "").lower() or words[0]
    if value not in words:
        expected = "0 or 1" if set(words) == {"0", "1"} else f"one of {', '.join(map(repr, words))}"
        raise ValueError(f"{switch} must be {expected}, got {value!r}")
    return value


def is_on(switch: str) -> bool:
    return setting(switch) == "1"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
