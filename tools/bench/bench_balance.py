"""Vision towers balanced over data-parallel ranks, beside other rules: loads, what moves, and time on gloo.

    python tools/bench/bench_balance.py [loads] [time] [--steps 300] [--ranks 2] [--json FILE]

loads  of drawn steps: the busiest rank over the least possible load, and the pixels that move over those that had to
time   the encoder stage, forward and backward, over real processes: every rank its own images, and balanced; results
       are compared bit for bit first, and bytes are counted. CPU seconds of the busiest rank, since ranks may share a
       core, and the time until the last one has ended

Samples are drawn from kinds of data whose image sizes are those that public data sets of the kind have: photos of a web
crawl (COCO: the long side 640), larger photos (Open Images, TextVQA: 1024), pages (DocVQA: about 1700 x 2200), charts
(ChartQA: about 850 x 600), screenshots (1920 x 1080) and short videos (16 frames of 480 x 270); a fifth has text only.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.vision.balance import longest_first
from paddle_vl_sp.vision.homes import BalancedShare, balance_images
from paddle_vl_sp.vision.moves import rank_of_each
from paddle_vl_sp.vision.share import tower_alpha
from timing import add_table, keep_memory, write_json
from wire import Counted

if TYPE_CHECKING:
    from paddle import Tensor

Integers = npt.NDArray[np.int64]

PATCH, MERGE, CHANNELS, ALPHA = 16, 2, 192, tower_alpha(1152, 4304)
KINDS = {  # name: (share of the samples, height, width, frames, how many images: from, to)
    "text": (0.2, 0, 0, 0, 0, 0),
    "photo": (0.35, 480, 640, 1, 1, 2),
    "several photos": (0.1, 480, 640, 1, 3, 8),
    "large photo": (0.1, 768, 1024, 1, 1, 2),
    "chart": (0.1, 600, 850, 1, 1, 1),
    "page": (0.08, 2200, 1700, 1, 1, 3),
    "screenshot": (0.05, 1080, 1920, 1, 1, 4),
    "video": (0.02, 270, 480, 8, 1, 1),  # frames in pairs
}


def draw_sample(rng: np.random.Generator) -> Integers:
    """The grids [I, 3] of one sample; sizes vary by a fifth around those of their kind."""
    names = list(KINDS)
    _, height, width, frames, least, most = KINDS[names[rng.choice(len(names), p=[KINDS[n][0] for n in names])]]
    grids = []
    for _ in range(rng.integers(least, most + 1)):
        sides = np.array([height, width]) * rng.lognormal(0, 0.2)
        h, w = np.maximum(np.rint(sides / (PATCH * MERGE)).astype(int), 1) * MERGE
        grids.append([frames, h, w] if rng.random() < 0.5 or frames > 1 else [frames, w, h])
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def draw_step(rng: np.random.Generator, copies: int, batch: int) -> list[Integers]:
    return [np.concatenate([draw_sample(rng) for _ in range(batch)]) for _ in range(copies)]


def longest_anywhere(grids: list[Integers]) -> BalancedShare:
    """Longest first over all ranks, wherever the pixels are: what moves is not looked at."""
    home = balance_images(grids, MERGE, ALPHA, "home")
    encoder = rank_of_each(longest_first(home.costs, home.num_ranks), len(home.items))
    return BalancedShare(
        home.items, home.image, home.batch, home.costs, home.home, encoder, home.num_ranks, 1, MERGE, "longest anywhere"
    )


def of(policy: str) -> Callable[[list[Integers]], BalancedShare]:
    return lambda grids: balance_images(grids, MERGE, ALPHA, policy)


RULES: dict[str, Callable[[list[Integers]], BalancedShare]] = {
    "home": of("home"),
    "count": of("count"),
    "contiguous": of("contiguous"),
    "longest anywhere": longest_anywhere,
    "longest": of("longest"),
}


def had_to_move(share: BalancedShare) -> float:
    """A bound from below of the patches that any way must move whose busiest rank has no more than this one's.

    A rank above that load must give away what is above it; the largest images cost the most for a patch, so it gives
    away at least as many patches as those need for it, or its smallest image.
    """
    bound, needed = int(share.loads.max(initial=0)), 0.0
    for rank in np.flatnonzero(share.loads_at_home > bound):
        own = np.flatnonzero(share.home == rank)
        own = own[np.argsort(-share.costs[own])]
        excess, patches = int(share.loads_at_home[rank]) - bound, 0.0
        for item in own:
            part = min(1.0, excess / share.costs[item])
            patches, excess = patches + part * share.patches[item], excess - int(part * share.costs[item])
            if part < 1 or excess <= 0:
                break
        needed += max(patches, share.patches[own].min())
    return needed


def loads(steps: int) -> None:
    print(f"{steps} drawn steps; busiest rank over the least possible load (mean, worst), and over the mean load")
    print("| copies | samples | rule | over least | worst | over mean | encoder faster | moves | over what had to |")
    print("|---" * 9 + "|")
    lines = add_table("balanced towers, loads", f"{steps} steps")
    for copies, batch in ((4, 2), (8, 2), (8, 8), (32, 4), (64, 8)):
        rng = np.random.default_rng([copies, batch])
        drawn = [draw_step(rng, copies, batch) for _ in range(steps)]
        at_home = 0.0
        for name, rule in RULES.items():
            shares = [rule(grids) for grids in drawn]
            busiest = np.array([share.loads.max() for share in shares], dtype=float)
            at_home = at_home or busiest.sum()
            over = busiest / np.maximum([share.least_load for share in shares], 1)
            needed = [had_to_move(share) for share in shares]
            ratios = [share.moved_patches / need for share, need in zip(shares, needed, strict=True) if need]
            line = {
                "over least": float(over.mean()),
                "worst": float(over.max()),
                "over mean": float(np.mean([share.imbalance for share in shares])),
                "faster": float(at_home / busiest.sum()),
                "moves": sum(share.moved_patches for share in shares) / sum(int(s.patches.sum()) for s in shares),
                "over needed": float(np.mean(ratios)) if ratios else 0.0,
                "worst over needed": float(np.max(ratios)) if ratios else 0.0,
            }
            lines.append({"name": f"{copies} copies of {batch}, {name}"} | line)
            print(
                f"| {copies} | {batch} | {name} | {line['over least']:.3f} | {line['worst']:.2f} | "
                f"{line['over mean']:.2f} | {line['faster']:.2f} x | {line['moves']:.1%} | {line['over needed']:.2f}, "
                f"at worst {line['worst over needed']:.2f} |",
                flush=True,
            )


class Tower:
    """Image by image, without attention: the work is that of its patches, and images do not meet."""

    def __init__(self, width: int, hidden: int) -> None:
        import paddle
        from paddle.nn import GELU, LayerList, Linear, Sequential

        paddle.seed(0)
        self.embed, self.out = Linear(CHANNELS, width), Linear(MERGE**2 * width, hidden)
        self.blocks = LayerList(
            [Sequential(Linear(width, 4 * width), GELU(), Linear(4 * width, width)) for _ in range(4)]
        )

    def __call__(self, pixels: Tensor, grid: Integers) -> Tensor:
        import paddle

        parts = []
        for patches in paddle.split(pixels, np.asarray(grid).prod(axis=1).tolist()):
            x = self.embed(patches)
            for block in self.blocks:
                x = x + block(x)
            parts.append(self.out(x.reshape([-1, MERGE**2 * x.shape[1]])))
        return paddle.concat(parts)


def small(grids: Integers) -> Integers:
    """A sixteenth of the patches."""
    return np.maximum(grids // [1, 4 * MERGE, 4 * MERGE] * [1, MERGE, MERGE], [1, MERGE, MERGE])


def timed_steps(steps: int, batch: int, repeats: int) -> list[list[float]]:
    """Of each step on this rank: CPU seconds at home and balanced, until the last rank has ended, bytes sent; loads."""
    import paddle
    import paddle.distributed as dist

    from paddle_vl_sp import encode_balanced

    group, rng, found = dist.get_group(0), np.random.default_rng(0), []
    hidden, alpha = 512, 10**6  # so that a patch costs the same in every image
    tower = Tower(256, hidden)
    for _ in range(steps):
        grids = [small(own) for own in draw_step(rng, group.nranks, batch)]
        grid = grids[group.rank]
        pixels = paddle.randn([int(grid.prod(axis=1).sum()), CHANNELS])

        def at_home(grid: Integers = grid, pixels: Tensor = pixels) -> Tensor:
            return tower(pixels, grid) if len(grid) else paddle.zeros([0, hidden])

        def balanced(grid: Integers = grid, pixels: Tensor = pixels) -> Tensor:
            return encode_balanced(tower, pixels, grid, group=group, merge_size=MERGE, alpha=alpha)

        rows, seconds, until_end = {}, {}, {}
        for way in (at_home, balanced):
            of_rounds, of_all = [], []
            for _ in range(repeats):
                dist.barrier(group)
                begin, cpu = time.perf_counter(), time.process_time()
                with Counted() as counted:
                    out = way()
                    if not out.stop_gradient:
                        out.sum().backward()
                of_rounds.append(time.process_time() - cpu)
                dist.barrier(group)
                of_all.append(time.perf_counter() - begin)
            rows[way] = out.numpy().tobytes()
            seconds[way], until_end[way] = float(np.median(of_rounds)), float(np.median(of_all))
        assert rows[at_home] == rows[balanced]
        share = balance_images(grids, MERGE, alpha)
        loads_of = [float(share.loads_at_home.max()), float(share.loads.max())]
        times = [seconds[at_home], seconds[balanced], until_end[at_home], until_end[balanced]]
        found.append([*times, counted.sent, *loads_of])
    return found


def timed(ranks: int) -> None:
    from bench_balance import timed_steps as task  # importable, as the ranks need it
    from paddle_vl_sp.testing import run_ranks

    keep_memory()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    results = np.array(run_ranks(task, ranks, 8, 4, 3, timeout=500))  # [ranks, steps, numbers]
    seconds = results[:, :, :4].max(axis=0)  # of the busiest rank
    sent = results[:, :, 4].sum(axis=0)
    work = results[0, :, 5:]
    lines = add_table("balanced towers, time", f"{ranks} gloo processes")
    print(f"\n{ranks} gloo processes; the encoder stage, forward and backward, CPU ms of the busiest rank")
    print("| step | at home | balanced | less | by the loads | until all have ended | sent MiB |")
    print("|---" * 7 + "|")
    for step, ((home, balanced, *both), (before, after)) in enumerate(zip(seconds, work, strict=True)):
        line = {"home": home * 1e3, "balanced": balanced * 1e3, "less": home / balanced, "loads": before / after}
        line["faster"] = both[0] / both[1]
        lines.append({"name": f"step {step}", "MiB": sent[step] / 2**20} | line)
        cells = f"{line['home']:.0f} | {line['balanced']:.0f} | {line['less']:.2f} x | {line['loads']:.2f} x"
        print(f"| {step} | {cells} | {line['faster']:.2f} x | {sent[step] / 2**20:.1f} |")
    total, by_loads = seconds.sum(axis=0), work[:, 0].sum() / work[:, 1].sum()
    print(
        f"all steps: {total[0] / total[1]:.2f} x less CPU time of the busiest rank, by the loads {by_loads:.2f} x; "
        f"{total[2] / total[3]:.2f} x faster until all have ended"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["loads", "time", []], default=[])
    parser.add_argument("--steps", type=int, default=300, help="drawn steps for each line of the loads")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the time")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args()
    parts = options.parts or ["loads", "time"]
    if "loads" in parts:
        loads(options.steps)
    if "time" in parts:
        timed(options.ranks)
    write_json(options.json)


if __name__ == "__main__":
    main()
