"""inspect --dataset: is it worth to balance the vision towers of data-parallel ranks. Numpy only."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.cli import Answer, UsageError
from paddle_vl_sp.cli.batch import GRIDS, MAX_RANKS, arrays_in, grids_in
from paddle_vl_sp.cli.model_sizes import ModelSizes
from paddle_vl_sp.cli.terminal import table
from paddle_vl_sp.vision.homes import BalancedShare, balance_images

POLICIES = ("home", "count", "contiguous", "longest")
NUMBERS = "images_per_sample"
MAX_STEPS = 1000

Integers = npt.NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("a data set", "instead of a batch: the vision towers' work of data-parallel ranks")
    data.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help=f"an .npz with image_grid_thw [I, 3] of all samples, one after the other, and {NUMBERS} [D]",
    )
    data.add_argument("--dp", type=int, default=1, help="data-parallel copies, of --sp x --cp ranks each (default 1)")
    data.add_argument("--steps", type=int, default=100, help="steps that are looked at (default 100)")
    data.add_argument("--split-frames", action="store_true", help="share videos by frames")


def run(arguments: argparse.Namespace, sizes: ModelSizes, row_bytes: int) -> Answer:
    """row_bytes: of a feature row with its levels."""
    within, batch = arguments.cp * arguments.sp, arguments.batch or 1
    if min(arguments.dp, within, batch, arguments.steps) < 1 or arguments.dp * within > MAX_RANKS:
        raise UsageError(
            f"--dp, --sp, --cp, --batch and --steps must be at least 1, and their ranks at most {MAX_RANKS}, got "
            f"{arguments.dp}, {arguments.sp}, {arguments.cp}, {batch} and {arguments.steps}"
        )
    samples = _samples_in(arguments.dataset, sizes.merge)
    steps = list(_steps(samples, arguments.dp, batch, min(arguments.steps, MAX_STEPS)))
    shares = {
        policy: [
            balance_images(step, sizes.merge, sizes.alpha, policy, arguments.split_frames, within) for step in steps
        ]
        for policy in POLICIES
    }
    pixel_bytes = sizes.pixels * 2  # of bf16
    costs: dict[str, Any] = {
        "ranks": {"dp": arguments.dp, "within": within},
        "samples": len(samples),
        "images": sum(map(len, samples)),
        "steps": len(steps),
        "policies": [_summary(policy, shares[policy], shares["home"], pixel_bytes, row_bytes) for policy in POLICIES],
    }
    parts = [_head(costs, batch), _policies(costs["policies"])]
    if arguments.out is not None:
        from paddle_vl_sp.cli.balance_picture import draw_balance

        draw_balance(arguments.out, parts[0], shares)
        costs["out"] = str(arguments.out)
        parts.append(f"picture: {arguments.out}")
    return Answer(costs, "\n\n".join(parts))


def _samples_in(path: Path, merge: int) -> list[Integers]:
    """The grids [I, 3] of every sample."""
    arrays = arrays_in(path, "dataset")
    try:
        name = GRIDS[0]
        if name not in arrays or NUMBERS not in arrays:
            raise UsageError(f"it has {', '.join(arrays) or 'nothing'}; needed are {name} and {NUMBERS}")
        grids = np.array(grids_in(arrays[name], name, merge), dtype=np.int64).reshape(-1, 3)
        numbers = arrays[NUMBERS]
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers) or numbers.min() < 0:
            raise UsageError(f"{NUMBERS} is whole numbers [D], got {numbers.dtype} {list(numbers.shape)}")
        if numbers.sum() != len(grids):
            raise UsageError(f"{NUMBERS} is {int(numbers.sum())} in all, and there are {len(grids)} grids")
    except UsageError as error:
        raise UsageError(f"--dataset {path}: {error}") from None
    return np.split(grids, np.cumsum(numbers)[:-1])


def _steps(samples: list[Integers], copies: int, batch: int, most: int) -> Iterator[list[Integers]]:
    """The grids of every copy's batch, step by step, in a drawn order; small data sets come round again."""
    order = np.random.default_rng(0).permutation(len(samples))
    number = min(max(len(samples) // (copies * batch), 1), most)
    for step in np.resize(order, [number, copies, batch]):
        yield [np.concatenate([samples[sample] for sample in own]) for own in step]


def _summary(
    policy: str, shares: list[BalancedShare], home: list[BalancedShare], pixel_bytes: int, row_bytes: int
) -> dict[str, Any]:
    """pixel_bytes: of a patch."""
    busiest = np.array([share.loads.max() for share in shares], dtype=float)
    least = np.array([share.least_load for share in shares])
    moved = [share.moved_patches * pixel_bytes for share in shares]
    sent = [share.sent_rows * row_bytes for share in shares]
    return {
        "policy": policy,
        "imbalance": float(np.mean([share.imbalance for share in shares])),
        "worst_imbalance": float(np.max([share.imbalance for share in shares])),
        "over_least": float(np.mean(busiest / np.maximum(least, 1))),
        "faster": float(sum(share.loads.max() for share in home) / max(busiest.sum(), 1)),
        "pixel_bytes": float(np.mean(moved)),
        "row_bytes": float(np.mean(sent)),
    }


def _head(costs: dict[str, Any], batch: int) -> str:
    ranks = costs["ranks"]
    within = f"{ranks['within']} rank{'s' * (ranks['within'] > 1)}"
    return (
        f"{costs['samples']} samples with {costs['images']} images; {costs['steps']} steps of {ranks['dp']} copies, "
        f"{batch} samples and {within} each"
    )


def _policies(policies: list[dict[str, Any]]) -> str:
    rows = [
        (
            p["policy"],
            p["imbalance"],
            p["worst_imbalance"],
            p["over_least"],
            p["faster"],
            p["pixel_bytes"] / 2**20,
            p["row_bytes"] / 2**20,
        )
        for p in policies
    ]
    head = ("who encodes", "busiest/mean", "worst step", "busiest/least", "predicted x", "pixels MiB", "rows MiB")
    return (
        f"{table(head, rows)}\n"
        "home: every rank its own images, as without balance; longest: what vision_dp='data' does. busiest: the load\n"
        "of the busiest rank, by the cost of the model's tower, over the mean and over the least possible; predicted:\n"
        "how many times faster the encoder stage. MiB: what travels in a step, all ranks together, for --hidden,\n"
        "--levels and --dtype. The model is Qwen3-VL's, with a width of 4096, or that of --model"
    )
