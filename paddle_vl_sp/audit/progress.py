"""A bar that counts forwards, on a terminal that has rich."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def counting(wanted: bool | None, is_first_rank: bool) -> Iterator[Callable[[], None]]:
    """A function to call after every forward. None: a bar on the first rank's terminal, where rich can be imported."""
    if wanted is False or not is_first_rank or (wanted is None and not sys.stderr.isatty()):
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda: None
        return
    columns: list[Any] = [SpinnerColumn(), TextColumn("{task.completed} forwards"), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("audit", total=None)
        yield lambda: bar.advance(task)
