"""inspect: what a batch costs each rank under a layout, or a data set each copy. Numbers need numpy only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from paddle_vl_sp.cli import Answer, UsageError, dataset
from paddle_vl_sp.cli import batch as batches
from paddle_vl_sp.cli.batch import Batch
from paddle_vl_sp.cli.model_sizes import QWEN3_VL, sizes_in
from paddle_vl_sp.cli.terminal import coloured, table
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.vision.share import POLICIES, imbalance, share_images, vision_items

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD = 6  # pairs that are shown of each plan
CUT = {"cut", "mode", "remainder"}
MODES = {  # what each takes beside what all take
    "npz": {"ids", *CUT},
    "dataset": {"dp", "batch", "steps", "split_frames"},
    "seq": {"batch", "images", "video", *CUT},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .png or .svg: who owns what, and the ranks' loads")
    batches.add_arguments(parser)
    dataset.add_arguments(parser)
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="its config.json has all sizes, its preprocessor_config.json a .jsonl's; without, Qwen3-VL's",
    )
    model.add_argument("--hidden", type=int, help="width of the hidden states (default the model's, else 4096)")
    model.add_argument("--dtype", choices=list(BYTES), default="bf16", help="of the hidden states (default bf16)")
    model.add_argument("--levels", type=int, help="deepstack layers (default the model's, else 3)")
    parser.set_defaults(unset=vars(parser.parse_args([])))


def run(arguments: argparse.Namespace) -> Answer:
    _check_flags(arguments)
    sizes = QWEN3_VL if arguments.model is None else sizes_in(arguments.model)
    hidden = _first(arguments.hidden, sizes.hidden, 4096)
    levels = _first(arguments.levels, sizes.levels, 3)
    if hidden < 1 or levels < 0:
        raise UsageError(f"--hidden must be at least 1 and --levels 0, got {hidden} and {levels}")
    if arguments.dataset is not None:
        return dataset.run(arguments, sizes, (levels + 1) * hidden * BYTES[arguments.dtype])
    batch = batches.batch_of(arguments, sizes)
    costs = costs_of(batch, hidden * BYTES[arguments.dtype], levels)
    parts = [str(batch), _ranks(costs), _vision(costs["vision_dp"]), _pairs(costs)]
    if arguments.out is not None:
        from paddle_vl_sp.cli.picture import draw_batch

        draw_batch(arguments.out, batch, costs)
        costs["out"] = str(arguments.out)
        parts.append(f"picture: {arguments.out}")
    return Answer(costs, "\n\n".join(parts))


def _check_flags(arguments: argparse.Namespace) -> None:
    """What is asked for, and no flag of another mode. A flag that is given its default is as one that is not given."""
    given = {name for name, value in arguments.unset.items() if getattr(arguments, name) != value}
    mode = next((mode for mode in ("dataset", "npz", "seq") if mode in given), None)
    if mode is None:
        raise UsageError(
            "there is no batch: give --npz FILE, or --seq with --images or --video, as --images 448x448; or a data "
            "set, by --dataset FILE"
        )
    others = set(MODES).union(*MODES.values()) - MODES[mode] - {mode}
    wrong = [f"--{name.replace('_', '-')}" for name in arguments.unset if name in given & others]
    if wrong:
        raise UsageError(
            f"{', '.join(wrong)} {'do' if wrong[1:] else 'does'} not go with --{mode}: leave out one or the other"
        )


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def costs_of(batch: Batch, row_bytes: int, levels: int) -> dict[str, Any]:
    """What --json prints; row_bytes are those of a row of hidden states."""
    plans = [plan_visual(batch.mask, None, layout, sequence_first=True) for layout in batch.layouts]
    counts = [len(plan.update_indices) for plan in plans]
    busiest = plans[int(np.argmax(counts))]
    one = batch.layouts[0]
    return {
        "batch": {"samples": batch.samples, "seq_len": batch.seq_len, "visual_tokens": batch.num_visual},
        "layout": {name: getattr(one, name) for name in ("cp_size", "cp_mode", "sp_size", "remainder")}
        | {"cut": batch.cut},
        "ranks": [_rank(rank, plan, batch) for rank, plan in enumerate(plans)],
        "imbalance": imbalance(counts),
        "empty_ranks": [rank for rank, count in enumerate(counts) if not count],
        # of the busiest rank's forward: a copy of its rows; for each pair two rows read and one written
        "deepstack_layer": {
            "bytes": (2 * busiest.num_rows + 3 * len(busiest.update_indices)) * row_bytes * bool(levels)
        },
        "vision_dp": _shares(batch, (levels + 1) * row_bytes),
    }


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


def _shares(batch: Batch, bytes_of_a_token: int) -> list[dict[str, Any]]:
    """Of each policy the ranks' loads in units of their mean, and how their rows are gathered; none without grids."""
    if not batch.grids:
        return []
    num_ranks, sizes, grids = len(batch.layouts), batch.sizes, np.array(batch.grids, dtype=np.int64)
    work, tokens, _ = vision_items(grids, sizes.merge, sizes.alpha, split_frames=False)
    shares = [share_images(work.tolist(), tokens.tolist(), num_ranks, policy) for policy in POLICIES]
    return [
        {
            "policy": share.policy,
            "loads": [float(load * num_ranks / work.sum()) for load in share.loads],
            "items": [list(items) for items in share.items],
            "rows": list(share.counts),
            "imbalance": share.imbalance,
            "gather_mode": share.rows.best_mode(bytes_of_a_token),
        }
        for share in shares
    ]


def _ranks(costs: dict[str, Any]) -> str:
    mean = costs["batch"]["visual_tokens"] / len(costs["ranks"]) or 1
    keys = ("rank", "cp_rank", "sp_rank", "positions", "visual_tokens")
    rows = [[*(rank[key] for key in keys), rank["visual_tokens"] / mean] for rank in costs["ranks"]]
    empty = ", ".join(map(str, costs["empty_ranks"])) or "none"
    return (
        f"{table(('rank', 'cp', 'sp', 'positions', 'visual tokens', 'x mean'), rows)}\n"
        f"imbalance {costs['imbalance']:.2f} (largest over mean); ranks without visual tokens: {empty}\n"
        f"{_moved(costs['deepstack_layer']['bytes'])}"
    )


def _moved(num_bytes: int) -> str:
    if not num_bytes:
        return "the model has no deepstack layer"
    return f"the busiest rank moves {num_bytes / 2**20:.1f} MiB in a deepstack layer's forward"


def _vision(policies: list[dict[str, Any]]) -> str:
    if not policies:
        return "vision DP: no image or video grids in this batch, so nothing to share"
    rows = [
        (p["policy"], p["imbalance"], " ".join(f"{load:.2f}" for load in p["loads"]), p["gather_mode"])
        for p in policies
    ]
    return table(("vision DP", "imbalance", "load of each rank, the mean is 1", "gather"), rows)


def _pairs(costs: dict[str, Any]) -> str:
    rows = "[S_local, B]" if costs["layout"]["cut"] == "sequence" else "[S_local]"
    lines = [coloured(f"first pairs (row of {rows}, feature row)", "bold")]
    for rank in costs["ranks"]:
        pairs = " ".join(f"({u}, {g})" for u, g in zip(rank["update_head"], rank["gather_head"], strict=True))
        lines.append(f"  rank {rank['rank']}  {pairs or 'none'}")
    return "\n".join(lines)
