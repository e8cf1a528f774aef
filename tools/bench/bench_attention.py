"""What sequence-parallel attention costs a rank: memory, bytes sent, work. Checks every result first, then reports.

python tools/bench/bench_attention.py [--local 512] [--ranks 2 4] [--heads 8] [--kv-heads 4] [--head-size 64]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import gather_attention, packed_attention, ring_attention, ulysses_attention
from paddle_vl_sp.attention.reference import full_attention
from paddle_vl_sp.attention.schedule import num_pairs, ring_schedule
from paddle_vl_sp.testing import run_ranks
from timing import add_table, parse_sizes, write_json
from wire import Counted

MIB = 1 << 20
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Shapes = tuple[int, int, int]  # query heads, key heads, head size


def measure(local: int, shapes: Shapes) -> dict[str, tuple[float, float, float]]:
    """On one rank of many: for each kind (MiB at the peak above the inputs, MiB sent forward, backward)."""
    group = dist.get_group(0)
    size, rank = group.nranks, group.rank
    ring = SeqLayout(local * size, cp_size=size, cp_rank=rank)
    ulysses = SeqLayout(local * size, sp_size=size, sp_rank=rank)
    return {
        "gather": _cost(partial(gather_attention, layout=ring, group=group), ring, shapes),
        "ring": _cost(partial(ring_attention, layout=ring, group=group), ring, shapes),
        "Ulysses": _cost(partial(ulysses_attention, group=group), ulysses, shapes),
    }


def alone(length: int, shapes: Shapes) -> dict[str, tuple[float, float, float]]:
    """The same on one process with the whole sequence: all scores at once, and a tile of them at a time."""
    layout = SeqLayout(length)
    return {"all scores": _cost(full_attention, layout, shapes), "blockwise": _cost(packed_attention, layout, shapes)}


def _cost(attention: Attention, layout: SeqLayout, shapes: Shapes) -> tuple[float, float, float]:
    whole = _whole(layout.seq_len, shapes)
    _check(attention, layout, whole)
    local = [_leaf(x[:, layout.positions()]) for x in whole]
    weight = paddle.ones([1, layout.local_len, shapes[0], shapes[2]])
    del whole
    before = _memory("current_value")
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    with Counted() as forward:
        out = attention(*local)
    with Counted() as backward:
        out.backward(weight)
    return (_memory("peak_value") - before) / MIB, forward.sent / MIB, backward.sent / MIB


def _check(attention: Attention, layout: SeqLayout, whole: list[np.ndarray]) -> None:
    """Against blockwise attention on the whole sequence: output and gradients of this rank's share."""
    positions = layout.positions()
    local, full = [_leaf(x[:, positions]) for x in whole], [_leaf(x) for x in whole]
    out, expected = attention(*local), packed_attention(*full)
    pairs = [(out, expected), *zip(paddle.grad(out.sum(), local), paddle.grad(expected.sum(), full), strict=True)]
    for got, want in pairs:
        if not np.allclose(got.numpy(), want.numpy()[:, positions], atol=1e-4):
            raise SystemExit(f"{attention} differs from attention on the whole sequence: nothing is measured")


def _whole(length: int, shapes: Shapes) -> list[np.ndarray]:
    heads, kv_heads, width = shapes
    rng = np.random.default_rng(0)
    return [rng.standard_normal((1, length, n, width)).astype("float32") for n in (heads, kv_heads, kv_heads)]


def _leaf(x: np.ndarray) -> Tensor:
    return paddle.to_tensor(x, stop_gradient=False)


def _memory(which: str) -> int:
    return int(getattr(paddle.base.core, f"host_memory_stat_{which}")("Allocated", 0))


def show_balance(sizes: tuple[int, ...] = (2, 4, 8, 16, 32)) -> None:
    """Pairs computed: busiest rank over the mean, summed over the steps, and where each step waits for its busiest."""
    print("\nwork of the busiest rank / mean (1.00 is balanced); in brackets with the ring waiting at every step")
    print(f"{'ranks':>6} {'zigzag':>15} {'contiguous':>15} {'zigzag, packed':>15} {'contiguous, packed':>19}")
    for size in sizes:
        cells = []
        for segments in ([64], [1, 2, 5, 24, 32]):
            for mode in ("zigzag", "contiguous"):
                bounds = tuple(np.cumsum([0, *(2 * size * n for n in segments)]).tolist())
                cells.append("{:.2f} ({:.2f})".format(*_imbalance(bounds, size, mode)))
        print(f"{size:6d} {cells[0]:>15} {cells[1]:>15} {cells[2]:>15} {cells[3]:>19}")


def _imbalance(bounds: tuple[int, ...], size: int, mode: str) -> tuple[float, float]:
    def steps(rank: int) -> list[int]:
        layout = SeqLayout(bounds[-1], cp_size=size, cp_rank=rank, cp_mode=mode, cu_seqlens=bounds)
        pairs = num_pairs(ring_schedule(layout, True))
        return [pairs[(rank - step) % size] for step in range(size)]

    work = np.array([steps(rank) for rank in range(size)])  # [rank, step]
    mean = work.sum() / size
    return work.sum(axis=1).max() / mean, work.max(axis=0).sum() / mean


def show_costs(local: int, ranks: list[int], shapes: Shapes) -> None:
    import bench_attention  # by its name, so that other processes find the functions

    heads, kv_heads, width = shapes
    print(f"Paddle {paddle.version.full_version}, CPU, gloo; fp32, B 1, {heads} heads, {kv_heads} key heads of {width}")
    print(f"every rank holds {local} positions; MiB at the peak, forward and backward, above q, k and v; MiB sent")
    print(f"{'ranks':>6} {'S':>6}  {'':12} {'peak MiB':>9} {'sent fwd':>9} {'sent bwd':>9}")
    lines = add_table("attention: memory and bytes", f"{local} positions")
    for size in ranks:
        results = run_ranks(bench_attention.measure, size, local, shapes, timeout=300)
        rows = {name: np.max([rank[name] for rank in results], axis=0) for name in results[0]}
        rows |= bench_attention.alone(local * size, shapes)
        for name, (peak, forward, backward) in rows.items():
            line = {"name": name, "peak_MiB": peak, "sent_forward_MiB": forward, "sent_backward_MiB": backward}
            lines.append(line | {"ranks": size})
            sent = f"{forward:9.2f} {backward:9.2f}" if name in results[0] else f"{'one process':>19}"
            print(f"{size:6d} {local * size:6d}  {name:12} {peak:9.1f} {sent}")


def main() -> None:
    chosen = parse_sizes(__doc__, local=512, ranks=[2, 4], heads=8, kv_heads=4, head_size=64)
    paddle.set_device("cpu")
    show_costs(chosen.local, chosen.ranks, (chosen.heads, chosen.kv_heads, chosen.head_size))
    show_balance()
    write_json(chosen.json)


if __name__ == "__main__":
    main()
