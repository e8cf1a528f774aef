"""The plan and the deepstack add as saved programs, for every batch, length and number of features.

    python examples/export_static.py

Saves the index builder of each of two ranks, and one program that adds; loads them, as a server would, and compares
what they compute with the package, bit for bit. docs/static-graphs.md has the inference predictor, packed sequences,
and fixed shapes for graph capture.
"""

import os
import tempfile
from pathlib import Path

import numpy as np

os.environ.setdefault("GLOG_minloglevel", "2")  # Paddle says how it executes a loaded program
import paddle

from paddle_vl_sp import SeqLayout, add_rows, plan_visual
from paddle_vl_sp.export import DeepstackAdd, IndexBuilder, save

IMAGE, VIDEO, HIDDEN, RANKS = 90, 91, 16, 2
SHAPES = ((1, 8), (3, 8), (2, 64))  # [B, S]


def write(folder):
    for rank in range(RANKS):
        builder = IndexBuilder((IMAGE, VIDEO), sequence_first=True, sp_size=RANKS, sp_rank=rank)
        save(builder, str(folder / f"plan_{rank}"))
    save(DeepstackAdd(), str(folder / "add"))  # for every layer and rank


def check(folder, rank, ids):
    """What the loaded programs compute for this rank, and whether that is what the package computes."""
    build, add = (paddle.jit.load(str(folder / name)) for name in (f"plan_{rank}", "add"))
    layout = SeqLayout(ids.shape[1], sp_size=RANKS, sp_rank=rank)
    plan = plan_visual(ids, (IMAGE, VIDEO), layout, sequence_first=True)
    hidden = paddle.randn([*plan.row_shape, HIDDEN])  # [S_local, B, H]
    features = paddle.randn([plan.num_features, HIDDEN])  # [N, H]
    update, gather, counts = build(ids)
    out = add(hidden, features, update, gather)
    pairs = ((update, plan.update_indices), (gather, plan.gather_indices), (out, add_rows(hidden, features, plan)))
    return counts.tolist(), all(np.array_equal(got.numpy(), wanted.numpy()) for got, wanted in pairs)


def main():
    paddle.set_device("cpu")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for file in sorted(folder.glob("*.json")):
            print(f"{file.name:12}{file.stat().st_size:>8} bytes")
        print(f"\n{'ids [B, S]':12}{'rank':>6}{'its visual rows of all':>26}{'equal to the package':>23}")
        for batch, length in SHAPES:
            ids = paddle.to_tensor(rng.choice([1, 2, IMAGE, VIDEO], [batch, length]))
            for rank in range(RANKS):
                (own, total), equal = check(folder, rank, ids)
                print(f"{[batch, length]!s:12}{rank:>6}{f'{own} of {total}':>26}{'yes' if equal else 'NO':>23}")


if __name__ == "__main__":
    main()
