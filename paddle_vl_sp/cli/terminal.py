"""What people see: colours and a progress bar on a terminal, plain text elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

BAR_WIDTH = 20
CLEARED = "\r\033[K"  # an empty line with the cursor at its start
COLOURS = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}


def has_colour(stream: TextIO | None = None) -> bool:
    """A terminal that has colours, where the user has not switched them off (https://no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if has_colour() else text


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under headings: numbers to the right, words to the left.

    rank  tokens
       0     196
    """
    cells = [list(headings), *([f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligns = [">" if all(isinstance(row[i], (int, float)) for row in rows) else "<" for i in range(len(headings))]
    lines = [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([coloured(lines[0], "bold"), *lines[1:]])


class Progress:
    """A bar on stderr, if that is a terminal: `with Progress(total) as bar: bar.advance("what was done")`"""

    def __init__(self, total: int, wanted: bool = True) -> None:
        self.total, self.done, self.begin = max(total, 1), 0, time.monotonic()
        self.is_shown = wanted and has_colour(sys.stderr)

    def __enter__(self) -> Progress:
        self._show("starting")
        return self

    def advance(self, doing: str) -> None:
        """One step of the total is done."""
        self.done += 1
        self._show(doing)

    def __exit__(self, *unused: object) -> None:
        self._write("")

    def _show(self, doing: str) -> None:
        bar = "#" * (BAR_WIDTH * self.done // self.total)
        self._write(f"[{bar:{BAR_WIDTH}}] {self.done}/{self.total} {time.monotonic() - self.begin:3.0f} s  {doing}")

    def _write(self, line: str) -> None:
        if self.is_shown:
            sys.stderr.write(f"{CLEARED}{line[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()
