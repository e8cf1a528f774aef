"""inspect --dataset: is it worth to balance the vision towers of data-parallel ranks. Numpy only."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paddle_vl_sp.cli import Answer, UsageError
from paddle_vl_sp.cli.batch import MAX_RANKS
from paddle_vl_sp.cli.data_files import NUMBERS, DataSet, Grids, Integers, data_set_in
from paddle_vl_sp.cli.dataset_words import head, policy_table, token_table
from paddle_vl_sp.cli.model_sizes import ModelSizes
from paddle_vl_sp.vision.homes import BalancedShare, balance_images

POLICIES = ("home", "count", "contiguous", "longest")
MAX_STEPS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("a data set", "instead of a batch: the vision towers' work of data-parallel ranks")
    data.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="PaddleFormers' .jsonl, with --model; or an .npz with image_grid_thw [I, 3] of all samples, one after the "
        f"other, and {NUMBERS} [D]",
    )
    data.add_argument("--dp", type=int, default=1, help="data-parallel copies, of --sp x --cp ranks each (default 1)")
    data.add_argument("--steps", type=int, default=100, help="steps that are looked at (default 100)")
    data.add_argument("--split-frames", action="store_true", help="share videos by frames")


def run(arguments: argparse.Namespace, sizes: ModelSizes, row_bytes: int) -> Answer:
    """row_bytes: of a feature row with its levels."""
    within, batch = arguments.cp * arguments.sp, arguments.batch or 1
    _check_sizes(arguments)
    data = data_set_in(arguments.dataset, arguments.model, sizes)
    steps, shrunk = _drawn_steps(data, arguments)
    shares = {
        policy: [
            balance_images(step, sizes.merge, sizes.alpha, policy, arguments.split_frames, within) for step in steps
        ]
        for policy in POLICIES
    }
    full = {policy: [share for share in own if len(share.items)] for policy, own in shares.items()}
    if not full["home"]:
        raise UsageError(
            f"--dataset {arguments.dataset}: none of the {len(steps)} steps has an image: nothing to share"
        )
    pixel_bytes = sizes.numbers_of_a_patch * 2  # of bf16
    costs: dict[str, Any] = {
        "ranks": {"dp": arguments.dp, "within": within},
        "samples": len(data.images),
        "images": sum(data.images),
        "steps": len(steps),
        "steps_without_images": len(steps) - len(full["home"]),
        "shrunk_images": shrunk,
        "visual_tokens": _tokens(steps, shares, sizes),
        "policies": [_summary(policy, full[policy], full["home"], pixel_bytes, row_bytes) for policy in POLICIES],
    }
    parts = [head(costs, batch), token_table(costs), policy_table(costs)]
    if arguments.out is not None:
        from paddle_vl_sp.cli.balance_picture import draw_balance

        draw_balance(arguments.out, parts[0].splitlines()[0], full)
        costs["out"] = str(arguments.out)
        parts.append(f"picture: {arguments.out}")
    return Answer(costs, "\n\n".join(parts))


def _check_sizes(arguments: argparse.Namespace) -> None:
    sizes = [
        arguments.dp,
        arguments.sp,
        arguments.cp,
        1 if arguments.batch is None else arguments.batch,
        arguments.steps,
    ]
    if min(sizes) < 1 or int(np.prod(sizes[:3], dtype=object)) > MAX_RANKS or arguments.steps > MAX_STEPS:
        raise UsageError(
            f"--dp, --sp, --cp, --batch and --steps must be at least 1, their ranks at most {MAX_RANKS}, and the steps "
            f"at most {MAX_STEPS}, got {', '.join(map(str, sizes))}"
        )


def _drawn_steps(data: DataSet, arguments: argparse.Namespace) -> tuple[list[list[Integers]], int | None]:
    """The grids of every copy's batch, step by step, in a drawn order; and how many images are shrunk, if it is known.

    Of a data set with more steps, only the samples that are looked at are read.
    """
    samples, copies, batch = len(data.images), arguments.dp, arguments.batch or 1
    number = samples // (copies * batch)
    if not number:
        raise UsageError(
            f"--dp {copies} x --batch {batch} is {copies * batch} samples a step, and --dataset {arguments.dataset} "
            f"has {samples}: a step must be smaller"
        )
    order = np.random.default_rng(0).permutation(samples)
    drawn = order[: min(number, arguments.steps) * copies * batch].reshape(-1, copies, batch)
    looked_at = np.arange(samples) if number <= arguments.steps else np.sort(drawn, axis=None)
    found: Grids = data.read(looked_at.tolist())
    grids = dict(zip(looked_at.tolist(), found.of_samples, strict=True))
    steps = [[np.concatenate([grids[sample] for sample in own]) for own in step] for step in drawn.tolist()]
    return steps, found.shrunk


def _tokens(
    steps: Sequence[Sequence[Integers]], shares: Mapping[str, Sequence[BalancedShare]], sizes: ModelSizes
) -> dict[str, Any]:
    """The fewest, the mean and the most in a step, of all that are looked at."""
    patches: dict[str, list[Any]] = {"of_a_copy": [[own.prod(axis=1).sum() for own in step] for step in steps]}
    patches |= {policy: [share.patches_encoded for share in shares[policy]] for policy in ("home", "longest")}
    tokens = {name: np.array(each) // sizes.merge**2 for name, each in patches.items()}  # [steps, copies or ranks]
    return {
        name: {"fewest": int(each.min()), "mean": float(each.mean()), "most": int(each.max())}
        for name, each in tokens.items()
    }


def _summary(
    policy: str, shares: list[BalancedShare], home: list[BalancedShare], pixel_bytes: int, row_bytes: int
) -> dict[str, Any]:
    """Of steps that have images. pixel_bytes: of a patch."""
    busiest = np.array([share.loads.max() for share in shares], dtype=float)
    least = np.array([share.least_load for share in shares])
    moved = [share.moved_patches * pixel_bytes for share in shares]
    sent = [share.sent_rows * row_bytes for share in shares]
    return {
        "policy": policy,
        "imbalance": float(np.mean([share.imbalance for share in shares])),
        "worst_imbalance": float(np.max([share.imbalance for share in shares])),
        "over_least": float(np.mean(busiest / least)),
        "faster": float(sum(share.loads.max() for share in home) / busiest.sum()),
        "pixel_bytes": float(np.mean(moved)),
        "row_bytes": float(np.mean(sent)),
    }
