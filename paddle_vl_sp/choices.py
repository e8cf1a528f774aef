"""One word out of several: the check of every setting that is one; and of the environment's switches."""

from __future__ import annotations

import os
from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def is_on(switch: str, default: str) -> bool:
    """A variable of the environment that is 0 or 1, asked anew every time."""
    value = os.environ.get(switch, default)
    if value not in ("0", "1"):
        raise ValueError(f"{switch} must be 0 or 1, got {value!r}")
    return value == "1"
