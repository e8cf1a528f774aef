"""Building the indices of one rank: ours beside the ways it is done elsewhere. Checks that all agree, then times.

python tools/bench/bench_plan.py [--batch 8] [--seq 131072] [--sp 8] [--rounds 30] [--json FILE]
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import paddle

from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.backends import plain
from timing import Contender, copied, parse_sizes, race, runs_of_visual, show, start_race, write_json

RUN = (256, 4096)  # visual tokens of an image or a few frames
IMAGE = 151655
PEER = "sample by sample"


def sample_by_sample(mask: paddle.Tensor, rank: int, size: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The loop of training code: per sample, count before, inside and in all, each read by the host."""
    batch, seq_len = mask.shape
    chunk = seq_len // size
    begin = rank * chunk
    update, gather, sample_start = [], [], 0
    for b in range(batch):
        before = int(mask[b, :begin].astype("int64").sum().item())
        inside = int(mask[b, begin : begin + chunk].astype("int64").sum().item())
        if inside:
            local = paddle.nonzero(mask[b, begin : begin + chunk]).squeeze(1)
            update.append(local * batch + b)
            gather.append(paddle.arange(sample_start + before, sample_start + before + inside))
        sample_start += int(mask[b].astype("int64").sum().item())
    if not update:
        return paddle.zeros([0], dtype="int64"), paddle.zeros([0], dtype="int64")
    return paddle.concat(update), paddle.concat(gather)


def vectorised(mask: paddle.Tensor, rank: int, size: int) -> tuple[paddle.Tensor, paddle.Tensor]:
    """The same without the loop: a running count over all tokens, then selections by the mask."""
    batch, seq_len = mask.shape
    chunk = seq_len // size
    feature_row = paddle.cumsum(mask.flatten().astype("int64")).reshape([batch, seq_len]) - 1
    own = mask[:, rank * chunk : (rank + 1) * chunk]
    place = paddle.nonzero(own)
    update = place[:, 1] * batch + place[:, 0]
    gather = paddle.masked_select(feature_row[:, rank * chunk : (rank + 1) * chunk], own)
    return update, gather


def check(found: tuple[paddle.Tensor, paddle.Tensor], expected: tuple[np.ndarray, np.ndarray], name: str) -> None:
    for got, want in zip(found, expected, strict=True):
        if not np.array_equal(np.asarray(got), want):
            raise SystemExit(f"{name} gives other indices: nothing is timed")


def main() -> None:
    args = parse_sizes(__doc__, batch=8, seq=131072, sp=8, rounds=30)
    start_race()

    host_mask = runs_of_visual(args.batch, args.seq, *RUN)
    rank = args.sp // 2
    layout = SeqLayout(args.seq, sp_size=args.sp, sp_rank=rank)
    mask = paddle.to_tensor(host_mask)
    ids = paddle.to_tensor(np.where(host_mask, IMAGE, 1))

    def ours(tokens: object, placeholders: tuple[int, ...] | None) -> tuple[object, object]:
        plan = plan_visual(tokens, placeholders, layout, sequence_first=True)
        return plan.update_indices, plan.gather_indices

    others = [
        Contender(PEER, lambda: sample_by_sample(mask, rank, args.sp)),
        Contender("vectorised", lambda: vectorised(mask, rank, args.sp)),
        Contender("plain Paddle, from a mask", lambda: plain.build_plan(mask, None, layout, True, -1, False)[:2]),
        Contender("plain Paddle, from int64 ids", lambda: plain.build_plan(ids, (IMAGE,), layout, True, -1, False)[:2]),
        Contender("plain Paddle, as on a device", lambda: _as_on_a_device(mask, layout)),
        Contender("ours, numpy", lambda: ours(host_mask, None)),
        Contender("ours, from int64 ids", lambda: ours(ids, (IMAGE,))),
        Contender("ours, padded", lambda: _padded(mask, layout)),
    ]
    best = Contender("ours, from a mask", lambda: ours(mask, None))
    expected = tuple(np.asarray(x) for x in ours(host_mask, None))
    pairs = len(expected[0])
    for contender in [best, *others[:-1]]:
        check(contender.run(), expected, contender.name)

    moved = host_mask.size + 16 * pairs
    note = f"one rank of {args.sp}, {pairs} pairs; must read {host_mask.size} and write {16 * pairs} bytes"
    show(
        f"index building, B {args.batch}, S {args.seq}, half visual, runs of {RUN[0]} to {RUN[1]}",
        race(best, others, copied(moved), args.rounds, PEER),
        note,
    )
    write_json(args.json)


def _as_on_a_device(mask: paddle.Tensor, layout: SeqLayout) -> tuple[paddle.Tensor, paddle.Tensor]:
    """What plain Paddle does where the host must not read the tokens."""
    with mock.patch.object(plain, "is_on_host", return_value=False):
        update, gather, _ = plain.build_plan(mask, None, layout, True, -1, False)
    return update, gather


def _padded(mask: paddle.Tensor, layout: SeqLayout) -> tuple[paddle.Tensor, paddle.Tensor]:
    plan = plan_visual(mask, None, layout, sequence_first=True, padded=True)
    return plan.update_indices, plan.gather_indices


if __name__ == "__main__":
    main()
