"""Two pictures: who owns which visual tokens, and what that does to the vision tower, in four panels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.cli.picture import BLUE, owners_image, owners_of, rank_colours, show_owners

GREY, RED = "#888888", "#c8401e"
HEIGHT, OWNERS_HEIGHT = 7.2, 2.6
FLOOR = 1e-8


def draw(figure: Any, found: list[dict[str, Any]]) -> None:
    """`found` is what each rank found (training.on_ranks)."""
    panels = figure.subplots(2, 2)
    _loss(panels[0, 0], found)
    _error(panels[0, 1], found)
    _drift(panels[1, 0], found)
    _costs(panels[1, 1], found)
    figure.suptitle(f"Training Qwen3-VL on {len(found)} sequence-parallel ranks (tiny model, CPU)", fontsize=13)
    figure.tight_layout(rect=(0, 0, 1, 0.97), h_pad=2.5, w_pad=2)


def draw_owners(figure: Any, mask: npt.NDArray[np.bool_], nranks: int, is_flattened: bool = True) -> None:
    """mask [B, S]: where a batch's visual tokens are; the plain classes cut the flattened batch, others each sample."""
    samples, seq_len = mask.shape
    flat = mask.reshape(1, -1)
    length = flat.shape[1] if is_flattened else seq_len
    owners = owners_of([SeqLayout(length, sp_size=nranks, sp_rank=rank) for rank in range(nranks)])
    owners = np.tile(owners, flat.shape[1] // length)
    panel = figure.subplots()
    show_owners(panel, owners_image(flat, owners, nranks), flat.shape[1], 1)
    for sample in range(1, samples):
        panel.axvline(sample * seq_len, color="white", linewidth=3)
    middles = [(sample + 0.5) * seq_len for sample in range(samples)]
    panel.set_xticks(middles, [f"sample {sample + 1}" for sample in range(samples)])
    panel.set_yticks([])
    panel.tick_params(bottom=False)
    for rank, colour in enumerate(rank_colours(nranks) * 0.8):
        text = f"rank {rank}: {int(flat[0, owners == rank].sum())} of {int(mask.sum())} visual tokens"
        shares = np.flatnonzero(owners == rank)
        where = (float(shares.mean()) if is_flattened else flat.shape[1] * (rank + 0.5) / nranks, 0)
        panel.annotate(text, where, (0, 4), textcoords="offset points", ha="center", color=colour, fontsize=8.5)
    figure.suptitle(
        "Why: sequence parallelism gives each rank a part of every batch (full colour: visual tokens, pale: text),\n"
        "and its tower learns from that part alone, unless the gradients are summed over the ranks",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 1, 1.03))


def _loss(panel: Any, found: list[dict[str, Any]]) -> None:
    losses = {run: found[0][run]["loss"] for run in ("without SP", "upstream", "patched")}
    steps = range(1, len(losses["upstream"]) + 1)
    panel.plot(steps, losses["without SP"], color=GREY, linewidth=5, alpha=0.5, label="without sequence parallelism")
    panel.plot(steps, losses["upstream"], color=RED, linewidth=1.8, label="upstream")
    panel.plot(steps, losses["patched"], color=BLUE, linewidth=1.8, linestyle=(0, (4, 3)), label="with paddle_vl_sp")
    panel.set(title="The loss hardly shows the fault:\nall three curves fall alike", xlabel="step", ylabel="loss")
    panel.legend(frameon=False, fontsize=8)


def _error(panel: Any, found: list[dict[str, Any]]) -> None:
    lines = {
        "upstream": (RED, 1e-1, "upstream: off by about 100 %"),
        "patched": (BLUE, 3e-4, "with paddle_vl_sp: rounding"),
    }
    for run, (color, height, words) in lines.items():
        worst = [max(max(values), FLOOR) for values in zip(*(rank[run]["error"] for rank in found), strict=True)]
        panel.plot(range(1, len(worst) + 1), worst, color=color, marker="o", markersize=3, linewidth=1.5)
        panel.text(len(worst), height, words, color=color, ha="right", va="top")
    panel.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
    panel.set(yscale="log", ylim=(FLOOR * 3, 30), xlabel="step", ylabel="relative error (log scale)")
    panel.set_title("But the vision tower's gradients are wrong:\nits worst parameter, against no SP")


def _drift(panel: Any, found: list[dict[str, Any]]) -> None:
    for run, color, below in (("upstream", RED, -62), ("patched", BLUE, 7)):
        drift = [100 * max(values) for values in zip(*(rank[run]["drift"] for rank in found), strict=True)]
        panel.plot(range(1, len(drift) + 1), drift, color=color, linewidth=2.2)
        apart = "equal to the last bit" if max(drift) == 0 else f"{drift[-1]:.1f} % apart"
        name = "upstream" if run == "upstream" else "with paddle_vl_sp"
        look = {"textcoords": "offset points", "ha": "right", "color": color}
        panel.annotate(f"{name}: {apart}", (len(drift), drift[-1]), (0, below), **look)
    panel.set(title="And the ranks' copies of the tower,\nwhich should be equal, drift apart", xlabel="step")
    panel.set(ylabel="distance between copies, %", ylim=(-0.3, None))


def _costs(panel: Any, found: list[dict[str, Any]]) -> None:
    counts = found[-1]["counts"]
    runs = ("upstream", "patched", "patched, planned by the loader")
    for key, offset, shade, label in (
        ("syncs", -0.19, 1.0, "host syncs"),
        ("searches", 0.19, 0.45, "searches for the visual rows"),
    ):
        values, places = [counts[run][key] for run in runs], [row + offset for row in range(len(runs))]
        bars = panel.barh(places, values, 0.36, color=(RED, BLUE, BLUE), alpha=shade)
        panel.bar_label(bars, [f"{label}: {value}" for value in values], padding=3, fontsize=8)
    panel.set_yticks(range(len(runs)), ("upstream", "with\npaddle_vl_sp", "+ plan made\nby the loader"))
    panel.invert_yaxis()
    panel.set_title("What placing the features costs\nin one forward of the plain class")
    panel.set_xlim(0, 1.9 * max(count for run in counts.values() for count in run.values()))
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
