"""What a command answers: once as data, once as words, and the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

FINE, PROBLEM, USAGE = 0, 1, 2


@dataclass(frozen=True)
class Answer:
    """data is what --json prints; text is printed else."""

    data: dict[str, Any]
    text: str
    code: int = FINE

    def told(self, as_json: bool) -> str:
        return json.dumps(self.data, indent=2) if as_json else self.text


class WrongUse(Exception):
    """The command line cannot be carried out as it was given: exit code 2."""


class Problem(Exception):
    """Something that is needed is not there or fails, said with the mend: exit code 1."""
