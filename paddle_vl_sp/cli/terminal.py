"""What people see: colours and bars on a terminal, plain text elsewhere; rich where it is installed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, TextIO

BAR_WIDTH = 10
CLEARED = "\r\033[K"  # the line, and the cursor at its begin
COLOURS = {"green": "32", "yellow": "33", "red": "31", "grey": "90", "bold": "1"}


def has_colour(stream: TextIO | None = None) -> bool:
    """A terminal that can, and nobody who asked for none (https://no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if has_colour() else text


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under headings: numbers to the right, words to the left.

    rank  tokens
       0     196
    """
    cells = [list(map(str, headings)), *([_told(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headings))]
    lines = [_line(row, widths, right) for row in cells]
    return "\n".join([coloured(lines[0], "bold"), *lines[1:]])


def _line(row: list[str], widths: list[int], right: list[bool]) -> str:
    cells = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
    return "  ".join(cells).rstrip()


def _told(cell: object) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


class Progress:
    """A bar on stderr, if that is a terminal: `with Progress(total) as bar: bar.advance("what is done next")`"""

    def __init__(self, total: int, wanted: bool = True) -> None:
        self.total, self.done = max(total, 1), 0
        self.rich: Any = None
        self.shown = wanted and has_colour(sys.stderr)

    def __enter__(self) -> Progress:
        if self.shown:
            self.rich = _rich_bar()
        if self.rich is not None:
            self.rich.start()
            self.task = self.rich.add_task("starting", total=self.total)
        return self

    def starts(self, doing: str) -> None:
        """Says what is being done now."""
        self._show(doing, 0)

    def advance(self, doing: str = "") -> None:
        """One step of the total is done."""
        self._show(doing, 1)

    def _show(self, doing: str, steps: int) -> None:
        self.done += steps
        if self.rich is not None:
            self.rich.update(self.task, advance=steps, description=doing)
        elif self.shown:
            filled = BAR_WIDTH * self.done // self.total
            line = f"[{'#' * filled:{BAR_WIDTH}}] {self.done}/{self.total} {doing}"
            sys.stderr.write(f"{CLEARED}{line[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()

    def __exit__(self, *unused: object) -> None:
        if self.rich is not None:
            self.rich.stop()
        elif self.shown:
            sys.stderr.write(CLEARED)
            sys.stderr.flush()


def _rich_bar() -> Any:
    try:
        from rich import console, progress
    except ImportError:
        return None
    columns = progress.TextColumn("{task.description:40}"), progress.BarColumn(), progress.TimeElapsedColumn()
    return progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
