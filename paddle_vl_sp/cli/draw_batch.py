"""Pictures of a batch under a layout: who owns what, and what the ranks have to do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli.batch import Batch
from paddle_vl_sp.cli.costs import Model, plans_of, vision_of
from paddle_vl_sp.cli.drawing import BLUE, GREEN, GREY, ORANGE, rank_colours
from paddle_vl_sp.vision.share import imbalance

COLUMNS = 1600  # a picture has no more
PALE = 0.2  # how much of its colour text keeps
WIDE, NARROW = 0.07, 0.018  # shares of the width that hold the word "rank 0", and a number
LETTERS, DIGIT = (8, 7), 0.7  # sizes of numbers above bars; a digit's width and the gap to the next bar's, in sizes
MOST_TITLE = 95  # characters across the picture


def owner_height(batch: Batch) -> float:
    return 2.1 + min(0.42 * batch.mask.shape[0], 4)


def draw_owners(figure: Any, batch: Batch) -> None:
    """Samples x positions, coloured by the rank that owns them; text pale."""
    owners = owners_of(batch)
    samples, seq_len = batch.mask.shape
    panel = figure.subplots()
    panel.imshow(
        picture_of(batch.mask, owners, len(batch.layouts)),
        aspect="auto",
        interpolation="nearest",
        extent=(0, seq_len, samples - 0.5, -0.5),
    )
    for sample in range(samples - 1):
        panel.axhline(sample + 0.5, color="white", linewidth=min(3, 40 / samples))
    cuts = np.flatnonzero(np.diff(owners)) + 1
    for cut in cuts:
        panel.axvline(cut, color="#333333", linewidth=0.9)
    _label_shares(panel, owners, cuts)
    panel.set(xlabel="position in the sequence", ylabel="sample", xlim=(0, seq_len))
    panel.set_yticks(range(samples) if samples <= 10 else range(0, samples, -(-samples // 10)))
    panel.tick_params(left=False)
    panel.ticklabel_format(axis="x", style="plain")
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)
    counts = [len(plan.update_indices) for plan in plans_of(batch)]
    empty = sum(not count for count in counts)
    without = f"{empty} of {len(counts)} ranks have none" if empty else "every rank has some"
    title = f"Who owns which visual tokens: {batch.told()}"
    figure.suptitle(title, fontsize=min(11, 11 * MOST_TITLE / len(title)))
    panel.set_title(
        f"full colour: visual tokens, pale: text; the busiest rank has {imbalance(counts):.2f} x the mean, {without}",
        color="#555555",
        pad=22,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.99))


def owners_of(batch: Batch) -> npt.NDArray[np.int64]:
    """The rank that owns each position, [S]."""
    owners = np.full(batch.mask.shape[1], -1, dtype=np.int64)
    for rank, layout in enumerate(batch.layouts):
        owners[layout.positions()] = rank
    assert (owners >= 0).all(), "every position has an owner"
    return owners


def picture_of(mask: npt.NDArray[np.bool_], owners: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.float64]:
    """The owners' colours, the paler the fewer of a column's positions are visual: [B, columns, 3]."""
    begins = np.unique(np.arange(COLUMNS) * mask.shape[1] // COLUMNS)
    width = np.diff(np.append(begins, mask.shape[1]))
    visual = np.add.reduceat(mask, begins, axis=1, dtype=np.float64) / width  # [B, columns]
    strength = (PALE + (1 - PALE) * visual)[..., None]
    colours = rank_colours(num_ranks)[owners[begins]]  # [columns, 3]
    blended: npt.NDArray[np.float64] = 1 - strength * (1 - colours)
    return blended


def _label_shares(panel: Any, owners: npt.NDArray[np.int64], cuts: npt.NDArray[np.int64]) -> None:
    """The rank's number above each of its shares, where there is room for them."""
    bounds = np.concatenate([[0], cuts, [len(owners)]])
    share = np.diff(bounds) / len(owners)  # of the picture's width
    word = "rank " if share.min() > WIDE else ""
    colours = rank_colours(int(owners.max()) + 1)
    if not word:
        panel.annotate("rank", (0, 1), (-6, 4), xycoords="axes fraction", textcoords="offset points", ha="right")
    for begin, end in pairwise(bounds.tolist()):
        rank = int(owners[begin])
        if end - begin < NARROW * len(owners):
            continue
        panel.annotate(
            f"{word}{rank}",
            ((begin + end) / 2, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=colours[rank] * 0.8,
            weight="bold",
        )


def load_height(batch: Batch) -> float:
    return 4.2


def draw_load(figure: Any, batch: Batch, model: Model) -> None:
    """Visual tokens of every rank, and the load of the vision encoder under each policy, with the mean."""
    left, right = figure.subplots(1, 2)
    counts = [len(plan.update_indices) for plan in plans_of(batch)]
    _bars(left, [("visual tokens", counts, BLUE)])
    _mean_line(left, sum(counts) / len(counts), f"mean\n{sum(counts) / len(counts):.0f}")
    left.set(xlabel="rank", ylabel="visual tokens", ylim=(0, 1.1 * max(1, *counts)))
    left.set_title(f"Visual tokens of each rank:\nthe busiest has {imbalance(counts):.2f} x the mean")
    policies = vision_of(batch, model)
    if policies:
        _draw_policies(right, policies)
    else:
        right.text(0.5, 0.5, "no image or video grids in this batch", ha="center", color=GREY)
        right.set_axis_off()
    figure.suptitle(batch.told(), fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.98), w_pad=2)


def _draw_policies(panel: Any, policies: list[dict[str, Any]]) -> None:
    colours = {"count": GREEN, "contiguous": BLUE, "longest": ORANGE}
    by_name = {policy["policy"]: policy for policy in policies}
    _bars(
        panel,
        [(f"{name}: {by_name[name]['imbalance']:.2f}", by_name[name]["loads"], colours[name]) for name in colours],
    )
    _mean_line(panel, 1, "mean")
    panel.set(xlabel="rank", ylabel="load of the vision encoder, mean = 1")
    panel.set_title("Vision DP, who encodes how much:\nby policy, with its busiest rank over the mean")
    panel.set_ylim(0, 1.35 * max(max(policy["loads"]) for policy in policies))
    panel.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", columnspacing=1, handlelength=1)


def _bars(panel: Any, series: list[tuple[str, list[Any], str]]) -> None:
    width = 0.8 / len(series)
    ranks = np.arange(len(series[0][1]))
    for i, (name, values, colour) in enumerate(series):
        bars = panel.bar(ranks + (i - (len(series) - 1) / 2) * width, values, width * 0.92, color=colour, label=name)
        if len(series) == 1:
            _label_bars(panel, bars, values)
    panel.set_xticks(ranks if len(ranks) <= 16 else ranks[:: -(-len(ranks) // 10)])


def _label_bars(panel: Any, bars: Any, values: list[Any]) -> None:
    """In the largest letters that keep the longest number above its own bar; without numbers where none do."""
    room = panel.get_window_extent().width / (1.1 * len(values))
    pixels = panel.figure.dpi / 72 * DIGIT * max(len(str(value)) for value in values)  # for letters of one point
    fitting = [size for size in LETTERS if size * pixels < room]
    if fitting:
        panel.bar_label(bars, fontsize=fitting[0], padding=2)


def _mean_line(panel: Any, mean: float, told: str) -> None:
    panel.axhline(mean, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    panel.annotate(told, (1, mean), (3, 0), **where)
