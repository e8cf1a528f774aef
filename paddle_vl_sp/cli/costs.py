"""What a batch costs under a layout, rank by rank: numbers that need no device. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paddle_vl_sp.cli.batch import MERGE, Batch
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.vision.share import POLICIES, imbalance, share_images, tower_alpha, vision_items

ALPHA = tower_alpha(1152, 4304)  # of Qwen3-VL's tower
HEAD = 6


@dataclass(frozen=True)
class Model:
    """hidden: the width of a row; row_bytes: of one row of one level; levels: deepstack layers."""

    hidden: int
    bytes_each: int
    levels: int

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.bytes_each


def plans_of(batch: Batch) -> list[VisualPlan]:
    return [plan_visual(batch.mask, None, layout, sequence_first=True) for layout in batch.layouts]


def costs_of(batch: Batch, model: Model) -> dict[str, Any]:
    """Everything `inspect` tells."""
    plans = plans_of(batch)
    counts = [len(plan.update_indices) for plan in plans]
    busiest = max(range(len(counts)), key=counts.__getitem__)
    return {
        "batch": {"samples": batch.mask.shape[0], "seq_len": batch.mask.shape[1], "visual_tokens": batch.num_visual},
        "layout": layout_of(batch),
        "ranks": [_rank(r, plan, batch) for r, plan in enumerate(plans)],
        "imbalance": imbalance(counts),
        "empty_ranks": [r for r, count in enumerate(counts) if not count],
        "deepstack_layer": _deepstack(plans[busiest], model),
        "vision_dp": vision_of(batch, model),
    }


def layout_of(batch: Batch) -> dict[str, Any]:
    one = batch.layouts[0]
    return {"cp_size": one.cp_size, "cp_mode": one.cp_mode, "sp_size": one.sp_size, "remainder": one.remainder}


def vision_of(batch: Batch, model: Model) -> list[dict[str, Any]]:
    """For every policy the loads of the ranks and how their rows come together; empty where no grids are known."""
    if not batch.grids:
        return []
    grid = np.array(batch.grids, dtype=np.int64)
    costs, tokens, _ = vision_items(grid, MERGE, ALPHA, split_frames=False)
    shares = [share_images(costs.tolist(), tokens.tolist(), len(batch.layouts), policy) for policy in POLICIES]
    mean = costs.sum() / len(batch.layouts)
    return [
        {
            "policy": share.policy,
            "loads": [float(load / mean) for load in share.loads],  # 1.0 is the mean
            "items": [list(items) for items in share.items],
            "rows": list(share.counts),
            "imbalance": share.imbalance,
            "gather_mode": share.rows.best_mode((model.levels + 1) * model.row_bytes),
        }
        for share in shares
    ]


def _rank(rank: int, plan: VisualPlan, batch: Batch) -> dict[str, Any]:
    layout = batch.layouts[rank]
    return {
        "rank": rank,
        "cp_rank": layout.cp_rank,
        "sp_rank": layout.sp_rank,
        "positions": layout.local_len,
        "visual_tokens": len(plan.update_indices),
        "update_head": plan.update_indices[:HEAD].tolist(),
        "gather_head": plan.gather_indices[:HEAD].tolist(),
    }


def _deepstack(plan: VisualPlan, model: Model) -> dict[str, Any]:
    """Bytes that the busiest rank moves in the forward of one layer: all rows are copied, the visual ones added to."""
    return {"bytes": (2 * plan.num_rows + 3 * len(plan.update_indices)) * model.row_bytes}
