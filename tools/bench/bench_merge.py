"""Writing the main features into the embeddings of the uncut sequence: ours beside Qwen2.5-VL's own way.

Takes `get_placeholder_mask` from the installed PaddleFormers, with the `masked_scatter` that its forward does, checks
that every way gives the same embeddings and gradients, then times forward, and that with backward.

    python tools/bench/bench_merge.py [--batch 4] [--seq 8192] [--hidden 1024] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import paddle

from bench_rows import FORMERS, Inputs, Way, check
from paddle_vl_sp import SeqLayout, VisualPlan, plan_visual, replace_rows
from paddle_vl_sp.backends import plain
from timing import Contender, copied, parse_sizes, race, runs_of_visual, show, start_race, write_json

IMAGE, VIDEO = 7, 8
UPSTREAM = "PaddleFormers' Qwen2.5-VL"


def upstream_merge(ids: paddle.Tensor) -> Way:
    from paddleformers.transformers.qwen2_5_vl.modeling import Qwen2_5_VLModel

    model = SimpleNamespace(config=SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO))

    def merge(embeds: paddle.Tensor, features: paddle.Tensor) -> paddle.Tensor:
        mask, _ = Qwen2_5_VLModel.get_placeholder_mask(model, ids, inputs_embeds=embeds, image_features=features)
        return embeds.masked_scatter(mask, features)

    return merge


def ways(ids: paddle.Tensor, plan: VisualPlan) -> tuple[dict[str, Way], str]:
    """The contenders by name, and why one is left out: empty where none is."""

    def planning_too(embeds: paddle.Tensor, features: paddle.Tensor) -> paddle.Tensor:
        layout = SeqLayout(ids.shape[1])
        fresh = plan_visual(ids, (IMAGE,), layout, sequence_first=False, num_features=features.shape[0])
        return replace_rows(embeds, features, fresh)

    def scattered(embeds: paddle.Tensor, features: paddle.Tensor) -> paddle.Tensor:
        rows = embeds.reshape([-1, embeds.shape[-1]])
        return paddle.scatter(rows, plan.update_indices, features).reshape(embeds.shape)

    try:
        upstream, left_out = {UPSTREAM: upstream_merge(ids)}, ""
    except ImportError as error:
        upstream, left_out = {}, f"{UPSTREAM} is left out, since it cannot be imported ({error}): {FORMERS}"
    return upstream | {
        "indices known, scatter": scattered,
        "plain Paddle, with a plan of the loader": lambda embeds, features: plain.replace_rows(
            embeds, features, plan.update_indices, plan.gather_indices
        ),
        "ours, with a plan of the loader": lambda embeds, features: replace_rows(embeds, features, plan),
        "ours, planning too": planning_too,
    }, left_out


def main() -> None:
    args = parse_sizes(__doc__, batch=4, seq=8192, hidden=1024, rounds=9)
    start_race()
    visual = runs_of_visual(args.batch, args.seq, 256, 4096)
    ids = paddle.to_tensor(np.where(visual, IMAGE, 5))
    plan = plan_visual(ids, (IMAGE,), SeqLayout(args.seq), sequence_first=False)
    inputs = Inputs(plan, plan.num_features, args.hidden)
    all_ways, left_out = ways(ids, plan)
    check(inputs, all_ways)

    row, n, total = args.hidden * 4, plan.num_features, args.batch * args.seq
    shape = f"B {args.batch}, S {args.seq}, H {args.hidden}, float32, {n} of {total} rows visual"
    forward = [Contender(name, way, inputs.prepare) for name, way in all_ways.items()]
    moved = 2 * total * row
    lines = race(forward[-1], forward[:-1], copied(moved), args.rounds, UPSTREAM)
    show(
        f"merge, forward: {shape}", lines, f"must move {moved >> 20} MiB: read and write every row\n{left_out}".strip()
    )

    def with_backward(way: Way) -> Callable[..., object]:
        return lambda embeds, features: inputs.backward(way, embeds, features)

    both = [Contender(name, with_backward(way), inputs.prepare) for name, way in all_ways.items()]
    moved += 2 * total * row
    lines = race(both[-1], both[:-1], copied(moved), args.rounds, UPSTREAM)
    show(f"merge, forward and backward: {shape}", lines, f"must move {moved >> 20} MiB")
    write_json(args.json)


if __name__ == "__main__":
    main()
