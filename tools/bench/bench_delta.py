"""Gated DeltaNet over ranks: states that travel beside Ulysses. Bytes sent, and time as a ratio, after a check.

python tools/bench/bench_delta.py [--local 512] [--ranks 2 4] [--key-heads 4] [--value-heads 8] [--head-size 64]
    [--rounds 7]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import gated_delta_net_sp
from paddle_vl_sp.testing import run_ranks
from timing import add_table, machine, parse_sizes, write_json
from wire import Counted

MIB = 1 << 20
TAPS = 4
Shapes = tuple[int, int, int]  # key heads, value heads, head size
Way = tuple[Callable[..., Tensor], SeqLayout]
Measured = dict[str, tuple[float, float, list[float]]]  # MiB sent forward, backward, and seconds of each round


def measure(local: int, shapes: Shapes, rounds: int) -> Measured:
    """On one rank of many, every way in every round."""
    group = dist.get_group(0)
    length = local * group.nranks
    cp = {"cp_size": group.nranks, "cp_rank": group.rank}
    contiguous = SeqLayout(length, **cp, cp_mode="contiguous")
    layouts = {"Ulysses": contiguous, "states, contiguous": contiguous, "states, zigzag": SeqLayout(length, **cp)}
    arrays, weight = _whole(length, shapes)
    ways: dict[str, Way] = {}
    for name, layout in layouts.items():
        method = "ulysses" if name == "Ulysses" else "state"
        run = partial(gated_delta_net_sp, conv_weight=weight, group=group, layout=layout, method=method)
        ways[name] = (run, layout)
    _check(ways, arrays, partial(gated_delta_net_sp, conv_weight=weight, group=None, layout=SeqLayout(length)))
    sent = {name: _sent(way, arrays) for name, way in ways.items()}
    seconds = [{name: _seconds(way, arrays) for name, way in ways.items()} for _ in range(rounds)]
    return {name: (*sent[name], [each[name] for each in seconds]) for name in ways}


def _check(ways: dict[str, Way], arrays: list[np.ndarray], alone: Callable[..., Tensor]) -> None:
    """Against one process with the whole sequence: output and every gradient of this rank's share."""
    full = [_leaf(x) for x in arrays]
    expected = alone(*full)
    wanted = [expected, *paddle.grad(expected.sum(), full)]
    for name, (run, layout) in ways.items():
        positions = layout.positions()
        local = [_leaf(x[:, positions]) for x in arrays]
        out = run(*local)
        for got, want in zip([out, *paddle.grad(out.sum(), local)], wanted, strict=True):
            if not np.allclose(got.numpy(), want.numpy()[:, positions], atol=1e-4 * float(want.abs().max())):
                raise SystemExit(f"{name} differs from one process with the whole sequence: nothing is measured")


def _sent(way: Way, arrays: list[np.ndarray]) -> tuple[float, float]:
    run, layout = way
    local = [_leaf(x[:, layout.positions()]) for x in arrays]
    with Counted() as forward:
        out = run(*local)
    with Counted() as backward:
        out.sum().backward()
    return forward.sent / MIB, backward.sent / MIB


def _seconds(way: Way, arrays: list[np.ndarray]) -> float:
    run, layout = way
    local = [_leaf(x[:, layout.positions()]) for x in arrays]
    dist.barrier()
    start = time.perf_counter()
    run(*local).sum().backward()
    dist.barrier()
    return time.perf_counter() - start


def _whole(length: int, shapes: Shapes) -> tuple[list[np.ndarray], Tensor]:
    key_heads, value_heads, width = shapes
    rng = np.random.default_rng(0)
    forms = [(key_heads, width), (key_heads, width), (value_heads, width), (value_heads,), (value_heads,)]
    arrays = [rng.standard_normal((1, length, *form)).astype("float32") for form in forms]
    arrays[3], arrays[4] = -np.log1p(np.exp(arrays[3])), 1 / (1 + np.exp(-arrays[4]))
    channels = (2 * key_heads + value_heads) * width
    return arrays, _leaf(rng.standard_normal((channels, TAPS)).astype("float32"))


def _leaf(x: np.ndarray) -> Tensor:
    return paddle.to_tensor(x, stop_gradient=False)


def main() -> None:
    import bench_delta  # by its name, so that other processes find the functions

    chosen = parse_sizes(__doc__, local=512, ranks=[2, 4], key_heads=4, value_heads=8, head_size=64, rounds=7)
    shapes = (chosen.key_heads, chosen.value_heads, chosen.head_size)
    print(f"{machine()}\ngloo; fp32, B 1, {shapes[0]} key and {shapes[1]} value heads of {shapes[2]}, {TAPS} taps")
    print(f"every rank holds {chosen.local} positions; MiB that a rank sends; time forward and backward / Ulysses'")
    print(f"{'ranks':>6}  {'':20} {'sent fwd':>9} {'sent bwd':>9} {'median ms':>10} {'/ Ulysses':>10}")
    lines = add_table("Gated DeltaNet: bytes and time", f"{chosen.local} positions a rank")
    for size in chosen.ranks:
        results: list[Measured] = run_ranks(bench_delta.measure, size, chosen.local, shapes, chosen.rounds, timeout=500)
        rounds = {name: np.max([rank[name][2] for rank in results], axis=0) for name in results[0]}
        for name, (forward, backward, _) in results[0].items():
            ratio = median((rounds[name] / rounds["Ulysses"]).tolist())
            took = 1e3 * median(rounds[name].tolist())
            numbers = {"sent_forward_MiB": forward, "sent_backward_MiB": backward, "ms": took, "times_ulysses": ratio}
            lines.append({"name": name, "ranks": size} | numbers)
            print(f"{size:6d}  {name:20} {forward:9.3f} {backward:9.3f} {took:10.1f} {ratio:10.2f}")
    write_json(chosen.json)


if __name__ == "__main__":
    paddle.set_device("cpu")
    main()
