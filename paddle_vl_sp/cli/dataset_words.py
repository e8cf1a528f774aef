"""What inspect --dataset prints of its numbers."""

from __future__ import annotations

from typing import Any

from paddle_vl_sp.cli.terminal import table


def head(costs: dict[str, Any], batch: int) -> str:
    ranks, steps, empty, shrunk = (costs[name] for name in ("ranks", "steps", "steps_without_images", "shrunk_images"))
    lines = [
        f"{costs['samples']} samples with {costs['images']} images; {_counted(steps, 'step')} of "
        f"{_counted(ranks['dp'], 'copy')}, {_counted(batch, 'sample')} and {_counted(ranks['within'], 'rank')} each"
    ]
    if empty:
        lines.append(
            f"{empty} of the steps have no image; the loads, the prediction and MiB are of the other {steps - empty}"
        )
    if shrunk:
        lines.append(
            f"{shrunk} of the images looked at have more than 768 x 768 pixels: PaddleFormers shrinks them to that"
        )
    return "\n".join(lines)


def _counted(number: int, name: str) -> str:
    return f"{number} {name if number == 1 else 'copies' if name == 'copy' else name + 's'}"


def token_table(costs: dict[str, Any]) -> str:
    ranks = costs["ranks"]
    names = {
        "of_a_copy": "in the batch of a copy",
        "home": "encoded by a rank, home",
        "longest": "encoded by a rank, longest",
    }
    if ranks["within"] == 1:
        del names["home"]  # the rank is the copy
    rows = [(words, *costs["visual_tokens"][name].values()) for name, words in names.items()]
    return table(("visual tokens in a step", "fewest", "mean", "most"), rows)


def policy_table(costs: dict[str, Any]) -> str:
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
        for p in costs["policies"]
    ]
    head = ("who encodes", "busiest/mean", "worst step", "busiest/least", "predicted x", "pixels MiB", "rows MiB")
    return f"{table(head, rows)}\n{_legend(costs['ranks'])}"


def _legend(ranks: dict[str, int]) -> str:
    within, number = ranks["within"], ranks["dp"] * ranks["within"]
    home = "every rank the images of its own batch, as without balance"
    if within > 1:
        home = (
            f"the {within} ranks of a copy share the images of its batch, as by vision_dp=True;\n"
            "each needs all rows of the batch, so those of the others travel to it even if no image leaves its copy"
        )
    return (
        f"home: {home}\n"
        "longest: over all copies, as by vision_dp='data'\n"
        "busiest: the load of the busiest rank, by the cost of the model's tower, over the mean of all "
        f"{number} ranks and\n"
        "over the least possible; worst step: the largest busiest/mean; predicted: how many times faster the encoder\n"
        "stage. MiB: what travels in a step, all ranks together, for --hidden, --levels and --dtype. Without --model\n"
        "the sizes are Qwen3-VL's, with a width of 4096"
    )
