"""Memory of a training step against the length of the sequence: one rank, and 2 and 4 that share it.

    python tools/bench/bench_context.py [docs/context-memory.csv]

PaddleFormers' own Qwen3-VL, tiny, on the CPU: the peak of forward and backward above the model, as the system counts
the process, each case in new processes. The gradients must be those of one rank.
"""

from __future__ import annotations

import csv
import itertools
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from paddle_vl_sp.testing import run_ranks

LENGTHS, SAMPLES = (1024, 2048, 4096), [["image"] * 6]
KINDS = ("gather", "ring", "ulysses")
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def peak_mib(run: Any) -> float:
    """How far the process grows while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def measured(kind: str | None, seq_len: int) -> tuple[float, float]:
    """MiB, and the norm of all gradients together."""
    group = dist.get_group(0)
    setting = None if kind is None else ContextParallel(kind, group=group)
    with apply_to_qwen3_vl(context_parallel=setting):
        model = tiny.tiny_qwen3_vl(_attn_implementation="sdpa", max_position_embeddings=seq_len, **RECOMPUTE)
        batch = tiny.draw_batch(SAMPLES, seq_len)
        batch["position_ids"] = tiny.positions(model, batch)
        peak = peak_mib(lambda: model(**batch).loss.backward())
    total = 0.0
    for parameter in model.parameters():
        grad = parameter.grad.clone()
        if kind is not None:
            dist.all_reduce(grad, group=group)
        total += float(grad.square().sum())
    return peak, total**0.5


def on_ranks(kind: str | None, seq_len: int) -> tuple[float, float]:
    paddle.set_device("cpu")
    return measured(kind, seq_len)


def main(path: str | None = None) -> None:
    import bench_context  # the ranks import their function, so it must not be that of __main__

    rows, right = [], {}
    for nranks, kinds in ((1, (None,)), (2, KINDS), (4, KINDS)):
        for kind, seq_len in itertools.product(kinds, LENGTHS):
            ranks = run_ranks(bench_context.on_ranks, nranks, kind, seq_len, timeout=300)
            norm = right.setdefault(seq_len, ranks[0][1])
            assert np.isclose(ranks[0][1], norm, rtol=1e-4), (kind, seq_len, ranks, norm)
            peak = max(rank[0] for rank in ranks)
            rows.append([nranks, kind or "", seq_len, f"{peak:.1f}"])
            print(f"{nranks} ranks, {kind or 'upstream':8} S {seq_len:5}  {peak:7.1f} MiB above the model", flush=True)
    if path:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(["ranks", "attention", "S", "MiB", f"{platform.machine()}, Paddle {paddle.__version__} CPU"])
            out.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
