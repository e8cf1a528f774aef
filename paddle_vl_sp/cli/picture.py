"""The picture of a batch under a layout: who owns what, and what the ranks have to do. Needs matplotlib."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli import Problem, UsageError
from paddle_vl_sp.cli.batch import Batch, Mask
from paddle_vl_sp.layout import SeqLayout

BLUE, ORANGE, GREEN = "#1f5fa8", "#e69f00", "#009e73"
POLICY_COLOURS = {"count": GREEN, "contiguous": BLUE, "longest": ORANGE}
# Okabe and Ito's without black, and two more, in an order in which neighbours differ for the colour-blind too
RANKS = ("#0072b2", "#cc79a7", "#56b4e9", "#e69f00", "#009e73", "#d55e00", "#8c6bb1", "#b8a800")
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}
SUFFIXES = (".png", ".svg")
COLUMNS = 1600  # an image has no more
PALE = 0.2  # how much of its colour text keeps
WIDE, NARROW = 0.07, 0.018  # shares of the width that have room for "rank 0", and for a number
MOST_DIGITS = 40  # above the bars of one panel
MOST_TITLE = 95  # letters across the picture

Positions = npt.NDArray[np.int64]


def save(path: Path, height: float, draw: Callable[[Any], None]) -> None:
    """Makes a figure, 9 inches and 900 pixels wide, lets `draw` fill it and saves it as the path's suffix says."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a picture must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # the first picture on a machine logs its fonts
    try:
        import matplotlib
    except ImportError as error:
        raise Problem(
            'pictures need matplotlib: pip install "paddle-vl-sp[plot]", or pip install matplotlib'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(SETTINGS):
        figure = pyplot.figure(figsize=(9, height), dpi=100)
        try:
            draw(figure)
            figure.savefig(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error}") from error
        finally:
            pyplot.close(figure)


def draw_batch(path: Path, batch: Batch, costs: dict[str, Any]) -> None:
    """Owners above, loads below; costs are those of `inspect`."""
    owners_height = 1.2 + min(0.42 * len(batch.mask), 4)  # inches

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=(owners_height, 3))
        _draw_owners(figure.add_subplot(grid[0, :]), batch, costs)
        has_images = bool(costs["vision_dp"])
        _draw_tokens(figure.add_subplot(grid[1, 0] if has_images else grid[1, :]), costs)
        if has_images:
            _draw_policies(figure.add_subplot(grid[1, 1]), costs["vision_dp"])
        figure.suptitle(str(batch), fontsize=min(12, 12 * MOST_TITLE / len(str(batch))))
        figure.tight_layout(rect=(0, 0, 1, 0.99), h_pad=2, w_pad=2)

    save(path, owners_height + 4, draw)


def rank_colours(num_ranks: int) -> npt.NDArray[np.float64]:
    """A colour for every rank, [num_ranks, 3]; they repeat after as many as can be told apart."""
    from matplotlib.colors import to_rgb

    return np.array([to_rgb(RANKS[rank % len(RANKS)]) for rank in range(num_ranks)])


def owners_of(layouts: Sequence[SeqLayout]) -> Positions:
    """The rank that owns each position, [S]."""
    owners = np.full(layouts[0].seq_len, -1, dtype=np.int64)
    for rank, layout in enumerate(layouts):
        owners[layout.positions()] = rank
    assert (owners >= 0).all(), "every position has an owner"
    return owners


def owners_image(mask: Mask, owners: Positions, num_ranks: int) -> npt.NDArray[np.float64]:
    """The owners' colours, the paler the fewer of a column's positions are visual: [B, columns, 3]."""
    begins = np.unique(np.arange(COLUMNS) * mask.shape[1] // COLUMNS)
    width = np.diff(np.append(begins, mask.shape[1]))
    visual = np.add.reduceat(mask, begins, axis=1, dtype=np.float64) / width  # [B, columns]
    strength = (PALE + (1 - PALE) * visual)[..., None]
    colours = rank_colours(num_ranks)[owners[begins]]  # [columns, 3]
    blended: npt.NDArray[np.float64] = 1 - strength * (1 - colours)
    return blended


def show_owners(panel: Any, image: npt.NDArray[np.float64], right: float, bottom: float) -> None:
    """The image over positions 0 to `right`, its samples from 0 down to `bottom`, without frame."""
    panel.imshow(image, aspect="auto", interpolation="nearest", extent=(0, right, bottom, 0))
    panel.tick_params(left=False)
    for side in ("left", "bottom"):
        panel.spines[side].set_visible(False)


def _draw_owners(panel: Any, batch: Batch, costs: dict[str, Any]) -> None:
    """Samples x positions, coloured by the rank that owns them; text pale."""
    owners, num_ranks = owners_of(batch.layouts), len(batch.layouts)
    samples, seq_len = batch.mask.shape
    show_owners(panel, owners_image(batch.mask, owners, num_ranks), seq_len, samples)
    for sample in range(1, samples):
        panel.axhline(sample, color="white", linewidth=min(3, 40 / samples))
    cuts = np.flatnonzero(np.diff(owners)) + 1
    for cut in cuts:
        panel.axvline(cut, color="#333333", linewidth=0.9)
    _label_shares(panel, owners, [0, *cuts.tolist(), seq_len])
    panel.set(xlabel="position in the sequence", ylabel="sample")
    shown = range(0, samples, -(-samples // 10))
    panel.set_yticks([sample + 0.5 for sample in shown], shown)
    panel.ticklabel_format(axis="x", style="plain")
    empty = len(costs["empty_ranks"])
    without = f"{empty} of {num_ranks} ranks have none" if empty else "every rank has some"
    panel.set_title(f"Who owns which visual tokens (full colour; pale: text): {without}", pad=22)


def _label_shares(panel: Any, owners: Positions, bounds: list[int]) -> None:
    """The rank's number above each of its shares, where there is room for it."""
    room = np.diff(bounds) / len(owners)  # shares of the picture's width
    word = "rank " if room.min() > WIDE else ""
    colours = rank_colours(int(owners.max()) + 1)
    where = {"textcoords": "offset points", "va": "bottom"}
    if not word:
        panel.annotate("rank", (0, 1), (-6, 4), xycoords="axes fraction", ha="right", **where)
    for begin, end in pairwise(bounds):
        rank = int(owners[begin])
        if end - begin >= NARROW * len(owners):
            look = {"ha": "center", "color": colours[rank] * 0.8, "weight": "bold"}
            middle = (begin + end) / 2
            panel.annotate(f"{word}{rank}", (middle, 1), (0, 4), xycoords=("data", "axes fraction"), **look, **where)


def _draw_tokens(panel: Any, costs: dict[str, Any]) -> None:
    counts = [rank["visual_tokens"] for rank in costs["ranks"]]
    mean = sum(counts) / len(counts)
    bars = panel.bar(range(len(counts)), counts, 0.74, color=BLUE)
    if len(counts) * len(str(max(counts))) <= MOST_DIGITS:
        panel.bar_label(bars, fontsize=8, padding=2)
    panel.set(ylabel="visual tokens", ylim=(0, 1.1 * max(1, *counts)))
    panel.set_title(f"Visual tokens of each rank:\nthe busiest has {costs['imbalance']:.2f} x the mean")
    _finish(panel, len(counts), mean, f"mean\n{mean:.0f}")


def _draw_policies(panel: Any, policies: list[dict[str, Any]]) -> None:
    """The load of the vision encoder under each policy."""
    by_name = {policy["policy"]: policy for policy in policies}
    ranks, width = np.arange(len(policies[0]["loads"])), 0.8 / len(policies)
    for i, (name, colour) in enumerate(POLICY_COLOURS.items()):
        label = f"{name}: {by_name[name]['imbalance']:.2f}"
        panel.bar(ranks + (i - 1) * width, by_name[name]["loads"], width * 0.92, color=colour, label=label)
    panel.set(ylabel="load of the encoder, mean = 1")
    panel.set_ylim(0, 1.35 * max(max(policy["loads"]) for policy in policies))
    panel.set_title("Vision DP, who encodes how much:\nby policy, with its busiest rank over the mean")
    panel.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", columnspacing=1, handlelength=1)
    _finish(panel, len(ranks), 1, "mean")


def _finish(panel: Any, num_ranks: int, mean: float, label: str) -> None:
    """A line at the mean, and the ranks below the bars."""
    panel.axhline(mean, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    panel.annotate(label, (1, mean), (3, 0), ("axes fraction", "data"), "offset points", va="center")
    panel.set_xlabel("rank")
    panel.set_xticks(range(0, num_ranks, 1 if num_ranks <= 16 else -(-num_ranks // 10)))
