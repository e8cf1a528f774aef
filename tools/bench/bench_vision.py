"""Vision DP in numbers: balance of the sharing rules, and bytes and time of the gather modes on gloo.

    python tools/bench/bench_vision.py [balance] [batches] [gather] [owners] [--batches 1000] [--ranks 4] [--json FILE]

balance   largest load over the least possible (the mean load, or the largest item), averaged over drawn batches
batches   what is shared, and what moves, for some realistic batches
gather    each mode over real processes; every result is compared with the expected rows before it is timed
owners    all rows to all ranks, and rows to their owners alone, over real processes; bytes are counted, and results
          compared
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.comm.uneven import MODES, UnevenRows
from paddle_vl_sp.vision.share import share_images, tower_alpha, vision_items
from timing import add_table, keep_memory, write_json
from wire import Counted

Costs = npt.NDArray[np.int64]

ALPHA = tower_alpha(1152, 4304)
LEVELS, HIDDEN, BYTES = 4, 4096, 2  # features and three deepstack levels in bf16
DRAWS: dict[str, Callable[[np.random.Generator, int], npt.NDArray[np.float64]]] = {
    "lognormal": lambda rng, number: rng.lognormal(6, 1, number),
    "one huge": lambda rng, number: np.append(rng.uniform(64, 256, number - 1), 16384),
    "uniform": lambda rng, number: rng.uniform(64, 4096, number),
}


def dynamic_greedy(costs: Costs, num_ranks: int) -> int:
    """Each rank takes images, at least one, until it has the mean of what is left for it and the ranks after it."""
    largest, at = 0, 0
    left = int(costs.sum())
    for rank in range(num_ranks):
        load, mean = 0, left / (num_ranks - rank)
        while at < len(costs) and (not load or load < mean) and (not load or len(costs) - at >= num_ranks - rank):
            load, at = load + int(costs[at]), at + 1
        largest, left = max(largest, load), left - load
    return largest


def running_greedy(costs: Costs, num_ranks: int) -> int:
    """An image belongs to the rank in whose equal part of the total cost its middle lies."""
    middle = np.cumsum(costs) - costs / 2
    rank = np.minimum((middle * num_ranks / costs.sum()).astype(int), num_ranks - 1)
    return int(np.bincount(rank, costs, num_ranks).max())


def policy(name: str) -> Callable[[Costs, int], int]:
    return lambda costs, num_ranks: int(max(share_images(costs.tolist(), [1] * len(costs), num_ranks, name).loads))


RULES = {
    "count": policy("count"),
    "greedy, mean of the rest": dynamic_greedy,
    "greedy, part of the total": running_greedy,
    "contiguous": policy("contiguous"),
    "longest": policy("longest"),
}


def balance(batches: int) -> None:
    lines = add_table("vision DP: load over the least", f"{batches} draws")
    print("| drawn | images | ranks | " + " | ".join(RULES) + " | contiguous worse than greedy |")
    print("|---" * (len(RULES) + 4) + "|")
    for name, draw in DRAWS.items():
        for images, ranks in ((4, 2), (4, 8), (16, 4), (16, 16), (64, 2), (64, 8), (64, 16)):
            rng = np.random.default_rng(0)
            drawn = [draw(rng, images).astype(np.int64) for _ in range(batches)]
            drawn = [rng.permutation(patches * (patches + ALPHA)) for patches in drawn]
            bound = np.array([max(costs.sum() / ranks, costs.max()) for costs in drawn])
            loads = {rule: np.array([share(costs, ranks) for costs in drawn]) for rule, share in RULES.items()}
            worse = int((loads["contiguous"] > loads["greedy, mean of the rest"]).sum())
            line = {rule: float((load / bound).mean()) for rule, load in loads.items()}
            lines.append({"name": f"{name}, {images} images, {ranks} ranks"} | line)
            cells = " | ".join(f"{mean:.3f}" for mean in line.values())
            print(f"| {name} | {images} | {ranks} | {cells} | {worse} of {batches} |", flush=True)


BATCHES = {
    "32 photos and 8 pages": [[1, 32, 42]] * 20 + [[1, 98, 70]] * 8 + [[1, 24, 24]] * 12,
    "one page, 15 icons": [[1, 140, 98]] + [[1, 8, 8]] * 15,
    "2 videos of 64 frames, 4 photos": [[64, 28, 50], [1, 40, 40], [1, 40, 40], [64, 20, 36], [1, 64, 48], [1, 16, 16]],
    "3 photos": [[1, 40, 40], [1, 32, 42], [1, 24, 24]],
}


def batches(ranks: int) -> None:
    row_bytes = LEVELS * HIDDEN * BYTES
    for name, grids in BATCHES.items():
        has_video = any(grid[0] > 1 for grid in grids)
        for split_frames in (False, True) if has_video else (True,):
            costs, tokens, _ = vision_items(np.array(grids, dtype=np.int64), 2, ALPHA, split_frames)
            for rule in ("contiguous", "longest"):
                share = share_images(costs.tolist(), tokens.tolist(), ranks, rule)
                how = (", frames split" if split_frames else ", videos whole") if has_video else ""
                print(f"\n{name}{how}")
                print(share.report(row_bytes))


def count_sets(ranks: int, total: int) -> Iterator[tuple[str, list[int]]]:
    even = total // ranks
    yield "even", [even] * ranks
    yield "share of 40 %", [int(total * 0.4)] + [int(total * 0.6) // (ranks - 1)] * (ranks - 1)
    yield "share of 80 %", [int(total * 0.8)] + [int(total * 0.2) // (ranks - 1)] * (ranks - 1)
    yield "two owners", [total // 2, total // 2] + [0] * (ranks - 2)
    yield "one owner", [total] + [0] * (ranks - 1)


def timed_gathers(total: int, width: int, repeats: int) -> list[tuple[str, str, float]]:
    """(counts, mode, seconds) of the forward; run on every rank."""
    import paddle
    import paddle.distributed as dist

    from paddle_vl_sp.comm.gather import all_gather_rows

    group, found = dist.get_group(0), []
    for name, counts in count_sets(group.nranks, total):
        expected = np.repeat(np.arange(group.nranks, dtype=np.float32), counts)
        x = paddle.full([counts[group.rank], width], float(group.rank))
        x.stop_gradient = False
        for mode in ("auto", *MODES):
            assert (all_gather_rows(x, counts, group, mode=mode)[:, 0].numpy() == expected).all()
            seconds = []
            for _ in range(repeats):
                dist.barrier(group)
                begin = time.perf_counter()
                all_gather_rows(x, counts, group, mode=mode)
                seconds.append(time.perf_counter() - begin)
            found.append((name, mode, float(np.median(seconds))))
    return found


def gather(ranks: int) -> None:
    from bench_vision import timed_gathers as task  # importable, as the ranks need it
    from paddle_vl_sp.testing import run_ranks

    keep_memory()
    total, width = 4096, 2048
    results = run_ranks(task, ranks, total, width, 9, timeout=300)
    slowest = {(name, mode): max(result[i][2] for result in results) for i, (name, mode, _) in enumerate(results[0])}
    print(f"\n{ranks} gloo processes, {total} rows of {width} float32 together; MiB that each rank sends, forward ms")
    print("| counts | " + " | ".join(MODES) + " | auto |")
    print("|---" * (len(MODES) + 2) + "|")
    lines = add_table("gather modes, forward ms", f"{ranks} gloo processes")
    for name, counts in count_sets(ranks, total):
        lines.append({"name": name} | {mode: slowest[name, mode] * 1e3 for mode in ("auto", *MODES)})
        rows = UnevenRows(tuple(counts))
        scale = width * 4 * (ranks - 1) / ranks / 2**20
        cells = [f"{rows.wire_rows(mode) * scale:.0f} MiB, {slowest[name, mode] * 1e3:.0f} ms" for mode in MODES]
        print(f"| {name} | {' | '.join(cells)} | {rows.best_mode(width * 4)}, {slowest[name, 'auto'] * 1e3:.0f} ms |")


def page_of_images(rng: np.random.Generator, images: int, unit: int) -> tuple[Costs, npt.NDArray[np.bool_]]:
    """Grids of lognormal images, and the mask [1, S] of a text of which each image is followed by as many words."""
    rows = np.maximum(rng.lognormal(5.3, 0.8, images) / 8, 1).astype(np.int64) * 8  # feature rows, 8 in each line
    grid = np.stack([np.ones_like(rows), rows // 4, np.full_like(rows, 16)], axis=1)
    mask = np.concatenate([np.repeat([True, False], [count, count]) for count in rows])
    return grid, np.pad(mask, (0, -len(mask) % unit))[None]


CUTS = {
    ("contiguous", "partial"): "contiguous",
    ("zigzag", "partial"): "zigzag",
    ("contiguous", "whole"): "contiguous, features before it",
}


def counted_owners(images: int, width: int, levels: int, repeats: int) -> list[tuple[str, str, list[float]]]:
    """(cut, way, [bytes sent in forward and backward, seconds, rows that this rank then holds of each, N]); on a rank.

    Before the cut, features enter the whole sequence on every rank, and levels this rank's part, as in the plain models
    under sequence parallelism.
    """
    import paddle
    import paddle.distributed as dist

    from paddle_vl_sp import SeqLayout, complete_grad, encode_shared, plan_visual, replace_rows

    group, found = dist.get_group(0), []
    grid, mask = page_of_images(np.random.default_rng(0), images, 2 * group.nranks)
    pixels = paddle.randn([int(grid.prod(axis=1).sum()), width // 4])
    pixels.stop_gradient = False
    hidden, uncut = (paddle.zeros([1, length, width]) for length in (mask.shape[1] // group.nranks, mask.shape[1]))
    everything = plan_visual(mask, None, SeqLayout(mask.shape[1]), sequence_first=False).to("cpu")

    def encode(x: paddle.Tensor, _: object) -> tuple[paddle.Tensor, list[paddle.Tensor]]:
        rows = x.reshape([-1, width])
        return rows * 2, [rows * (level + 3) for level in range(levels)]

    for (cut, grad), name in CUTS.items():
        layout = SeqLayout(mask.shape[1], cp_size=group.nranks, cp_rank=group.rank, cp_mode=cut)
        plan = plan_visual(mask, None, layout, sequence_first=False).to("cpu")
        start, of_features = (hidden, None) if grad == "partial" else (uncut, everything)
        placed = []
        for way in ("all rows", "owners"):
            seconds = []
            for _ in range(repeats):
                dist.barrier(group)
                begin = time.perf_counter()
                with Counted() as counted:
                    share = functools.partial(encode_shared, encode, pixels, grid, group=group, merge_size=2, grad=grad)
                    (features, by_level), own = share(plan=plan) if way == "owners" else (share(), plan)
                    if grad == "whole" and way == "all rows":
                        by_level = complete_grad(by_level, plan, group)
                    first = replace_rows(start, features, of_features or own)
                    out = replace_rows(hidden, by_level[0], own)
                    for level in by_level[1:]:
                        out = out + replace_rows(hidden, level, own)
                    (first.sum() + out.sum()).backward()
                seconds.append(time.perf_counter() - begin)
            placed.append((first.numpy(), out.numpy()))
            held = (features.shape[0] + levels * by_level[0].shape[0]) / (levels + 1)
            found.append((name, way, [counted.sent, float(np.median(seconds)), held, plan.num_features]))
        assert all((one == other).all() for one, other in zip(*placed, strict=True))
    return found


def owners(ranks: int) -> None:
    from bench_vision import counted_owners as task  # importable, as the ranks need it
    from paddle_vl_sp.testing import run_ranks

    keep_memory()
    width, levels = 1024, 3
    results = run_ranks(task, ranks, 16, width, levels, 7, timeout=300)
    num_rows = int(results[0][0][2][3])
    whole = num_rows * (levels + 1) * width * 4
    print(f"\n{ranks} gloo processes, 16 images, N = {num_rows} rows of {levels + 1} x {width} float32: N * H is")
    print(f"{whole / 2**20:.1f} MiB; forward and backward, all ranks together, in N * H, and of the slowest rank ms")
    print("| cut | rows go to | sent | most rows on a rank | ms |")
    print("|---|---|---|---|---|")
    lines = add_table("rows to their owners", f"{ranks} gloo processes")
    for i, (cut, way, _) in enumerate(results[0]):
        sent, seconds, rows, _ = np.array([result[i][2] for result in results]).T
        line = {"sent": sent.sum() / whole, "rows": rows.max() / num_rows, "ms": seconds.max() * 1e3}
        lines.append({"name": f"{cut}, {way}"} | line)
        print(f"| {cut} | {way} | {line['sent']:.2f} | {line['rows']:.2f} N | {line['ms']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["balance", "batches", "gather", "owners", []], default=[])
    parser.add_argument("--batches", type=int, default=1000, help="drawn batches for each line of the balance table")
    parser.add_argument("--ranks", type=int, default=4, help="ranks of batches, gather and owners")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args()
    parts = options.parts or ["balance", "batches", "gather", "owners"]
    if "balance" in parts:
        balance(options.batches)
    if "batches" in parts:
        batches(options.ranks)
    if "gather" in parts:
        gather(options.ranks)
    if "owners" in parts:
        owners(options.ranks)
    write_json(options.json)


if __name__ == "__main__":
    main()
