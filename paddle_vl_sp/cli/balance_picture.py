"""The picture of a data set's loads: one step rank by rank, and every step's busiest rank. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paddle_vl_sp.cli.picture import BLUE, GREEN, ORANGE, save
from paddle_vl_sp.vision.homes import BalancedShare

COLOURS = {"home": "#888888", "count": GREEN, "contiguous": BLUE, "longest": ORANGE}
MOST_BARS = 64


def draw_balance(path: Path, title: str, shares: Mapping[str, Sequence[BalancedShare]]) -> None:
    """shares: by policy, of the same steps, which have images."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.2)})
        _draw_step(left, shares["home"], shares["longest"])
        _draw_steps(right, shares)
        figure.suptitle(title, fontsize=10)
        figure.tight_layout(rect=(0, 0, 1, 0.97), w_pad=2)

    save(path, 3.8, draw)


def _draw_step(panel: Any, home: Sequence[BalancedShare], longest: Sequence[BalancedShare]) -> None:
    """The ranks' loads in the step that is in the middle by its imbalance at home."""
    step = int(np.argsort([share.imbalance for share in home])[len(home) // 2])
    for name, share, width in (("home", home[step], 0.8), ("longest", longest[step], 0.45)):
        loads = share.loads[:MOST_BARS] / (share.loads.mean() or 1)
        panel.bar(np.arange(len(loads)), loads, width, color=COLOURS[name], label=f"{name}: {share.imbalance:.2f}")
    panel.axhline(1, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    shown = "" if len(home[step].loads) <= MOST_BARS else f", the first {MOST_BARS} ranks"
    panel.set(xlabel="rank", ylabel="load of the encoder, mean = 1", title=f"The median step{shown}")
    panel.set_ylim(0, 1.25 * float((home[step].loads / (home[step].loads.mean() or 1)).max() or 1))
    panel.legend(frameon=False, fontsize=8, loc="upper center", ncols=2)
    _whole_numbers_below(panel)


def _draw_steps(panel: Any, shares: Mapping[str, Sequence[BalancedShare]]) -> None:
    """Of each policy the busiest rank over the mean, the worst step first."""
    for name, steps in shares.items():
        sorted_steps = sorted((share.imbalance for share in steps), reverse=True)
        label, marker = f"{name}: {np.mean(sorted_steps):.2f}", "o" if len(steps) == 1 else None
        panel.plot(np.arange(len(steps)), sorted_steps, marker=marker, color=COLOURS[name], label=label)
    panel.set(xlabel="step, the worst first", ylabel="busiest rank over the mean", title="Every step with images")
    panel.set_ylim(bottom=0.95)
    panel.legend(frameon=False, fontsize=8)
    _whole_numbers_below(panel)


def _whole_numbers_below(panel: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
