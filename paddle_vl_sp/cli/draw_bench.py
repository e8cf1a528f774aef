"""Pictures of benchmarks: every way's time over ours, race by race."""

from __future__ import annotations

import textwrap
from typing import Any

from paddle_vl_sp.cli.drawing import BLUE, GREY, RED

BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0}
Race = dict[str, Any]


def bench_height(races: list[Race]) -> float:
    return 0.6 + sum(0.95 + 0.27 * len(race["lines"]) for race in races)


def draw_bench(figure: Any, races: list[Race], machine: str) -> None:
    heights = [0.95 + 0.27 * len(race["lines"]) for race in races]
    panels = figure.subplots(len(races), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, race in zip(panels, races, strict=True):
        _draw_race(panel, race)
    panels[-1].set_xlabel("time over ours (log scale); the dotted line is ours")
    figure.suptitle(machine, fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=1.5)


def _draw_race(panel: Any, race: Race) -> None:
    lines = sorted(race["lines"], key=lambda line: float(line["times_ours"]))
    ratios = [line["times_ours"] for line in lines]
    lowest = min(0.1, 0.7 * min(ratios))
    places = range(len(lines))
    panel.barh(places, [ratio - lowest for ratio in ratios], 0.62, left=lowest, color=[_colour(x) for x in lines])
    for place, line in zip(places, lines, strict=True):
        syncs = f", {line['syncs']} sync{'s' if line['syncs'] > 1 else ''}" if line["syncs"] else ""
        told = f"{line['times_ours']:.2f} x   {line['milliseconds']:.3g} ms{syncs}"
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": BEHIND}
        panel.annotate(told, (line["times_ours"], place), **at)
    panel.axvline(1, color="#333333", linewidth=0.9, linestyle=":", zorder=0)
    panel.set_yticks(places, [line["name"] for line in lines])
    panel.invert_yaxis()
    panel.set(xscale="log", xlim=(lowest, max(ratios) * (max(ratios) / lowest) ** 0.5))
    panel.set_xticks([])
    panel.set_xticks([], minor=True)
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(left=False)
    panel.set_title(textwrap.fill(race["title"], 75), loc="left", fontsize=9)


def _colour(line: dict[str, Any]) -> str:
    if line["name"].startswith("floor"):
        return GREY
    return BLUE if line["name"].startswith("ours") else RED
