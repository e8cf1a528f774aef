"""Saves the index builder of every rank of a cut, and the deepstack add, as programs; checks them in a fresh process.

    python tools/export_static.py OUT --ids 151655 151656 --sp-size 4 --sequence-first
    python tools/export_static.py OUT --mask --cp-size 2 --sp-size 2 --padded --backend python

OUT/plan_cp0_sp1.json is the builder of cp rank 0, sp rank 1; with --packed, OUT/plan_packed.json is for all ranks.
OUT/deepstack_add.json adds. Each is run by paddle.jit.load and by the inference predictor on text-only, image-only
and mixed inputs of several shapes, and held, bit for bit, against what the package computes without a graph.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from paddle_vl_sp import SeqLayout, VisualPlan, add_rows, plan_visual
from paddle_vl_sp.export import DeepstackAdd, IndexBuilder, interval_table, save
from paddle_vl_sp.layout import CP_MODES, REMAINDERS, length_multiple

RUNNER = Path(__file__).with_name("run_static.py")
WAYS = ("jit", "predictor")
Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Case:
    """One run of a program; expected is None where the program must stop."""

    program: str
    inputs: Arrays
    expected: list[npt.NDArray[Any]] | None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder; made where it is missing")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--ids", type=int, nargs="+", help="the placeholder ids to look for")
    tokens.add_argument("--mask", action="store_true", help="the tokens are a bool mask")
    parser.add_argument("--cp-size", type=int, default=1)
    parser.add_argument("--cp-mode", choices=CP_MODES, default="zigzag")
    parser.add_argument("--sp-size", type=int, default=1)
    parser.add_argument("--remainder", choices=REMAINDERS, default="error")
    parser.add_argument("--sequence-first", action="store_true", help="hidden states are [S_local, B, H]")
    parser.add_argument("--packed", action="store_true", help="what is owned is an input (several sequences, B = 1)")
    parser.add_argument("--padded", action="store_true", help="fixed sizes, -1 where unused: for graph capture")
    parser.add_argument("--backend", choices=("auto", "op", "python"), default="auto")
    parser.add_argument("--dtype", default="float32", help="of hidden states and features (default: %(default)s)")
    return parser.parse_args()


class Cut:
    """The cut that was asked for, and its ranks."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.sizes: dict[str, Any] = {
            "cp_size": asked.cp_size,
            "cp_mode": asked.cp_mode,
            "sp_size": asked.sp_size,
            "remainder": asked.remainder,
        }
        self.multiple = length_multiple(cp_size=asked.cp_size, cp_mode=asked.cp_mode, sp_size=asked.sp_size)
        self.ranks: list[dict[str, Any]] = [
            {"cp_rank": cp_rank, "sp_rank": sp_rank}
            for cp_rank in range(asked.cp_size)
            for sp_rank in range(asked.sp_size)
        ]

    def layout(self, rank: dict[str, Any], seq_len: int, cu_seqlens: list[int] | None = None) -> SeqLayout:
        return SeqLayout(seq_len, cu_seqlens=cu_seqlens, **self.sizes, **rank)


def write_programs(asked: argparse.Namespace, cut: Cut) -> None:
    asked.out.mkdir(parents=True, exist_ok=True)
    for rank in cut.ranks[:1] if asked.packed else cut.ranks:
        builder = IndexBuilder(
            asked.ids,
            sequence_first=asked.sequence_first,
            packed=asked.packed,
            padded=asked.padded,
            backend=asked.backend,
            **cut.sizes,
            **rank,
        )
        save(builder, str(asked.out / program_of(asked, rank)))
    adder = DeepstackAdd(backend=asked.backend)
    save(adder, str(asked.out / "deepstack_add"), adder.input_spec(dtype=asked.dtype))


def program_of(asked: argparse.Namespace, rank: dict[str, Any]) -> str:
    return "plan_packed" if asked.packed else f"plan_cp{rank['cp_rank']}_sp{rank['sp_rank']}"


def drawn_tokens(rng: np.random.Generator, batch: int, seq_len: int, share: float, asked: Any) -> npt.NDArray[Any]:
    """ids or a mask [B, S] of which a share is visual."""
    visual = rng.random((batch, seq_len)) < share
    if asked.mask:
        return visual
    text = max(asked.ids) + 1
    return np.where(visual, rng.choice(asked.ids, (batch, seq_len)), text)


def plan_cases(asked: argparse.Namespace, cut: Cut) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for rank in cut.ranks:
        name = program_of(asked, rank)
        for batch, units in ((1, 1), (1, 5)) if asked.packed else ((1, 1), (3, 1), (2, 5)):
            seq_len = units * cut.multiple
            cu_seqlens = [0, cut.multiple, seq_len][: 1 + min(units, 2)] if asked.packed else None
            layout = cut.layout(rank, seq_len, cu_seqlens)
            for share in (0.0, 0.5, 1.0):
                tokens = drawn_tokens(rng, batch, seq_len, share, asked)
                plan = plan_visual(tokens, asked.ids, layout, sequence_first=asked.sequence_first, padded=asked.padded)
                inputs = {"tokens": tokens} | ({"intervals": interval_table(layout)} if asked.packed else {})
                yield Case(name, inputs, [plan.update_indices, plan.gather_indices, plan.counts])
        if asked.remainder == "error" and cut.multiple > 1:
            wrong = {**inputs, "tokens": drawn_tokens(rng, 1, cut.multiple + 1, 0.5, asked)}
            yield Case(name, wrong, None)


def add_cases(dtype: str) -> Iterator[Case]:
    rng = np.random.default_rng(1)
    for batch, seq_len, share in ((1, 8, 0.5), (3, 5, 0.0), (2, 16, 1.0)):
        for padded in (False, True):
            layout = SeqLayout(seq_len)
            mask = rng.random((batch, seq_len)) < share
            plan = plan_visual(mask, None, layout, sequence_first=False, padded=padded)
            inputs = {
                "hidden": rng.standard_normal((batch, seq_len, 6)).astype(dtype),
                "features": rng.standard_normal((int(mask.sum()), 6)).astype(dtype),
                "update_indices": plan.update_indices,
                "gather_indices": plan.gather_indices,
            }
            yield Case("deepstack_add", inputs, [added(plan, inputs)])


def added(plan: VisualPlan, inputs: Arrays) -> npt.NDArray[Any]:
    hidden, features = (paddle.to_tensor(inputs[name]) for name in ("hidden", "features"))
    out: npt.NDArray[Any] = add_rows(hidden, features, plan.to("cpu")).numpy()
    return out


def failures(asked: argparse.Namespace, cases: list[Case]) -> list[str]:
    """Runs the cases in a fresh process, and says where a program did not do what was expected."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for program in {case.program for case in cases}:
            for file in asked.out.glob(f"{program}.*"):
                (folder / file.name).write_bytes(file.read_bytes())
        for number, case in enumerate(cases):
            np.savez(folder / f"{case.program}.{number}.in.npz", **case.inputs)
        needs_operators = asked.serving == "op"
        command = [sys.executable, str(RUNNER), str(folder)]
        subprocess.run(command + ["--import", "paddle_vl_sp.export"] * needs_operators, check=True, timeout=300)
        return [
            f"{case.program} by {way}, tokens or hidden states {list(next(iter(case.inputs.values())).shape)}: {wrong}"
            for number, case in enumerate(cases)
            for way in WAYS
            if (wrong := difference(case, dict(np.load(folder / f"{case.program}.{number}.{way}.npz"))))
        ]


def difference(case: Case, got: Arrays) -> str:
    """What is wrong with an outcome; "" if nothing is."""
    if case.expected is None:
        return "" if "error" in got else "ran, though the length does not divide"
    if "error" in got:
        return str(got["error"])
    names = [str(i) for i in range(len(case.expected))]
    same = list(got) == names and all(np.array_equal(got[i], x) for i, x in zip(names, case.expected, strict=True))
    return "" if same else "differs from the eager result"


def report(asked: argparse.Namespace, cases: list[Case]) -> None:
    how = "after `import paddle_vl_sp.export`" if asked.serving == "op" else "with Paddle alone"
    print(f"{asked.out}: programs to be loaded {how}")
    for program in dict.fromkeys(case.program for case in cases):
        inputs = next(case.inputs for case in cases if case.program == program)
        takes = ", ".join(f"{name} {x.dtype} {'[' + ', '.join('?' * x.ndim) + ']'}" for name, x in inputs.items())
        gives = "hidden" if program == "deepstack_add" else "update [n], gather [n], counts [2]"
        size = sum(file.stat().st_size for file in asked.out.glob(f"{program}.*"))
        print(f"  {program}.json  {size} bytes  {takes} -> {gives}")
    refused = sum(case.expected is None for case in cases) * len(WAYS)
    equal = len(cases) * len(WAYS) - refused
    print(f"in a fresh process, {' and '.join(WAYS)}: {equal} runs equal to eager, {refused} bad lengths refused")


def main() -> int:
    asked = arguments()
    asked.ids = None if asked.mask else asked.ids
    asked.serving = DeepstackAdd(backend=asked.backend).backend
    cut = Cut(asked)
    write_programs(asked, cut)
    cases = [*plan_cases(asked, cut), *add_cases(asked.dtype)]
    wrong = failures(asked, cases)
    if wrong:
        print(*wrong[:20], f"{len(wrong)} runs went wrong", sep="\n")
        return 1
    report(asked, cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
