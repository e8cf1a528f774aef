"""A progress bar on stderr: rich's where it is installed, a plain one else, none where stderr is no terminal."""

from __future__ import annotations

import sys
from typing import Any

WIDTH = 30


class Progress:
    """`with Progress(total) as bar: bar.advance("what is done next")`"""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.rich: Any = None
        self.shown = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self.shown:
            self.rich = _rich_bar()
        if self.rich is not None:
            self.rich.start()
            self.task = self.rich.add_task("starting", total=self.total)
        return self

    def advance(self, doing: str, steps: int = 1) -> None:
        self.done += steps
        if self.rich is not None:
            self.rich.update(self.task, advance=steps, description=doing)
        elif self.shown:
            filled = WIDTH * self.done // self.total
            sys.stderr.write(f"\r[{'#' * filled:{WIDTH}}] {self.done:3}/{self.total} {doing:40.40}")
            sys.stderr.flush()

    def __exit__(self, *unused: object) -> None:
        if self.rich is not None:
            self.rich.stop()
        elif self.shown:
            sys.stderr.write("\n")


def _rich_bar() -> Any:
    try:
        from rich import console, progress
    except ImportError:
        return None
    columns = progress.TextColumn("{task.description:40}"), progress.BarColumn(), progress.TimeElapsedColumn()
    return progress.Progress(*columns, console=console.Console(stderr=True))
