"""Pictures of benchmarks: every way's time over ours, race by race."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from paddle_vl_sp.cli.drawing import BLUE, GREY, RED

STEPS = ((1, 2, 5), (1,))  # of a decade that get a tick: the first of these that stays below MOST_TICKS
MOST_TICKS = 10
LABEL = 0.16  # of the axis, left free on either side for the ratio beside the outermost dot
Race = dict[str, Any]


def bench_height(races: list[Race]) -> float:
    return 0.9 + sum(map(_height, races))


def draw_bench(figure: Any, races: list[Race], machine: str) -> None:
    """A dot for each way on one log axis, its ratio beside it, its time in a column on the right."""
    ratios = {"height_ratios": list(map(_height, races))}
    panels = figure.subplots(len(races), 1, squeeze=False, sharex=True, gridspec_kw=ratios)[:, 0]
    low, high = limits_of([line["times_ours"] for race in races for line in race["lines"]])
    ticks = ticks_between(low, high)
    for panel, race in zip(panels, races, strict=True):
        panel.set(xscale="log", xlim=(low, high))
        panel.set_xticks([], minor=True)
        panel.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        panel.tick_params(labelbottom=True)
        _draw_race(panel, race)
    panels[-1].set_xlabel("time over ours, log scale; blue: ours, red: other ways, grey: the same bytes copied")
    figure.suptitle(machine, fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=1.5)


def limits_of(ratios: list[float]) -> tuple[float, float]:
    """Both ends of an axis that has 1 and every ratio on it, with room beside them for a label."""
    low, high = min(1, *ratios), max(1, *ratios)
    room = (high / low) ** LABEL * 1.1
    return low / room, high * room


def ticks_between(low: float, high: float) -> list[float]:
    """0.2 0.5 1 2 5 10 20, or powers of ten alone where that would be too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in STEPS:
        found = [tick for decade in decades for step in steps if low <= (tick := float(f"{step}e{decade}")) <= high]
        if len(found) <= MOST_TICKS:
            break
    return found


def _height(race: Race) -> float:
    return 1.15 + 0.25 * len(race["lines"])


def _draw_race(panel: Any, race: Race) -> None:
    lines = sorted(race["lines"], key=lambda line: float(line["times_ours"]))
    for place, line in enumerate(lines):
        ratio, colour = line["times_ours"], _colour(line)
        panel.plot([1, ratio], [place, place], color=colour, alpha=0.45, linewidth=2)
        panel.plot([ratio], [place], "o", color=colour, markersize=7)
        side = {"xytext": (7, 0), "ha": "left"} if ratio >= 1 else {"xytext": (-7, 0), "ha": "right"}
        at = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        panel.annotate(f"{ratio:.2f}x", (ratio, place), **at, **side)
        panel.annotate(_told(line), (1, place), (8, 0), xycoords=("axes fraction", "data"), **at)
    panel.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    panel.axvline(1, color="#333333", linewidth=1.1, linestyle=":", zorder=1.5)
    panel.set_axisbelow(True)
    panel.set_yticks(range(len(lines)), [line["name"] for line in lines])
    panel.set_ylim(len(lines) - 0.5, -0.5)
    panel.tick_params(left=False)
    panel.set_title(textwrap.fill(race["title"], 75), loc="left", fontsize=9)


def _told(line: dict[str, Any]) -> str:
    waits = f", {line['syncs']} wait{'s' if line['syncs'] > 1 else ''} for the device" if line["syncs"] else ""
    return f"{line['milliseconds']:.3g} ms{waits}"


def _colour(line: dict[str, Any]) -> str:
    if line["name"].startswith("floor"):
        return GREY
    return BLUE if line["name"].startswith("ours") else RED
