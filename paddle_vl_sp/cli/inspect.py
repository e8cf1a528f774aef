"""inspect: what a batch costs each rank under a layout. Needs numpy only."""

from __future__ import annotations

import argparse
from typing import Any

from paddle_vl_sp.cli import batch as batches
from paddle_vl_sp.cli.answer import Answer, WrongUse
from paddle_vl_sp.cli.costs import Model, costs_of
from paddle_vl_sp.cli.terminal import coloured, table

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batches.add_arguments(parser)
    model = parser.add_argument_group("the model")
    model.add_argument("--hidden", type=int, default=4096, help="width of the hidden states (default 4096)")
    model.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the hidden states (default bf16)")
    model.add_argument("--levels", type=int, default=3, help="deepstack layers (default 3)")


def run(arguments: argparse.Namespace) -> Answer:
    batch, model = batches.batch_of(arguments), model_of(arguments)
    costs = costs_of(batch, model)
    parts = [batch.told(), _ranks(costs), _moved(costs), _vision(costs["vision_dp"]), _indices(costs)]
    return Answer(costs, "\n\n".join(parts))


def model_of(arguments: argparse.Namespace) -> Model:
    if arguments.hidden < 1 or arguments.levels < 0:
        raise WrongUse(f"--hidden must be at least 1 and --levels 0, got {arguments.hidden} and {arguments.levels}")
    return Model(arguments.hidden, DTYPES[arguments.dtype], arguments.levels)


def _ranks(costs: dict[str, Any]) -> str:
    mean = costs["batch"]["visual_tokens"] / len(costs["ranks"]) or 1
    rows = [
        (r["rank"], r["cp_rank"], r["sp_rank"], r["positions"], r["visual_tokens"], r["visual_tokens"] / mean)
        for r in costs["ranks"]
    ]
    told = table(("rank", "cp", "sp", "positions", "visual tokens", "x mean"), rows)
    empty = ", ".join(map(str, costs["empty_ranks"])) or "none"
    return f"{told}\nimbalance {costs['imbalance']:.2f} (largest over mean); ranks without visual tokens: {empty}"


def _moved(costs: dict[str, Any]) -> str:
    return f"a deepstack layer's forward moves {mebibytes(costs['deepstack_layer']['bytes'])} on the busiest rank"


def _vision(policies: list[dict[str, Any]]) -> str:
    if not policies:
        return "vision DP: no image or video grids in this batch, so nothing to share out"
    rows = [
        (p["policy"], p["imbalance"], " ".join(f"{load:.2f}" for load in p["loads"]), p["gather_mode"])
        for p in policies
    ]
    headings = ("vision DP", "imbalance", "load of each rank, the mean is 1", "gather")
    return table(headings, rows)


def _indices(costs: dict[str, Any]) -> str:
    lines = [coloured("first pairs (row of [S_local, B], feature row)", "bold")]
    for rank in costs["ranks"]:
        pairs = " ".join(f"({u}, {g})" for u, g in zip(rank["update_head"], rank["gather_head"], strict=True))
        lines.append(f"  rank {rank['rank']}  {pairs or 'none'}")
    return "\n".join(lines)


def mebibytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB"
