"""Trains PaddleFormers' own Qwen3-VL, tiny, on the CPU: upstream and with paddle_vl_sp, on one rank and on two.

python tools/demo.py [--steps 24] [--pictures FOLDER]      needs paddleformers; about a minute

On one rank both must be the same to the last bit. On two tensor-parallel ranks with sequence parallelism upstream's
vision tower gets wrong gradients, and the ranks' copies of it drift apart; with paddle_vl_sp they do not. It ends with
code 1 should this not be so.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli.answer import Problem
from paddle_vl_sp.cli.drawing import saved
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.terminal import Progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of every run")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="sequence-parallel ranks")
    parser.add_argument("--pictures", default=".", type=Path, help="the folder for demo.png and demo-owners.png")
    given = parser.parse_args()
    os.environ |= {"GLOG_minloglevel": "3", "PADDLE_VL_SP_LOG": "warning"}  # the table tells
    warnings.simplefilter("ignore")
    begin = time.monotonic()
    equal, found = run(given.steps, given.ranks)
    print(table(equal, found))
    print(pictures(found, given.pictures))
    print(f"{time.monotonic() - begin:.0f} s")
    return 0 if holds(equal, found) else 1


def run(steps: int, nranks: int) -> tuple[list[bool], list[dict[str, Any]]]:
    """Whether one-rank steps were equal, and what each of the ranks found."""
    with quiet():  # start-up notes of other packages
        import paddle

        from demo_parts import training

        quiet_paddleformers()

    paddle.set_device("cpu")
    with Progress((1 + len(training.RUNS)) * steps) as progress:
        equal = []
        for same in training.on_one_rank(steps):
            equal.append(same)
            progress.advance("one rank: upstream and patched")
        return equal, ranks_with_progress(nranks, steps, progress)


def ranks_with_progress(nranks: int, steps: int, progress: Any) -> list[dict[str, Any]]:
    """The ranks tell through a file what they are doing, a line a step."""
    from demo_parts import training
    from paddle_vl_sp.testing import run_ranks

    results: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        told.touch()
        limit = 120 + 10 * steps * nranks
        arguments = (training.on_ranks, nranks, nranks, steps, str(told))
        ranks = threading.Thread(target=lambda: results.extend(run_ranks(*arguments, timeout=limit)))
        ranks.start()
        seen = 0
        while ranks.is_alive():
            ranks.join(0.2)
            lines = told.read_text().splitlines()
            for line in lines[seen:]:
                progress.advance(line)
            seen = len(lines)
    if not results:
        raise RuntimeError("the ranks failed; their errors stand above")
    return results


def table(equal: list[bool], found: list[dict[str, Any]]) -> str:
    """What a reader should take away, in numbers."""
    same = f"{sum(equal)} of {len(equal)} steps have the same loss and gradients, bit for bit"
    lines = ["", "One rank, upstream and patched", f"  {same}", ""]
    lines += [f"{len(found)} sequence-parallel ranks, {len(equal)} steps", f"  {'':34}{'upstream':>14}{'patched':>14}"]
    rows = (
        ("loss at the end", lambda run: f"{found[0][run]['loss'][-1]:.5f}"),
        ("  off the run without SP by", lambda run: f"{off(found, run):.1e}"),
        ("vision gradients, error, first step", lambda run: f"{worst(found, run, 'error', slice(1)):.1e}"),
        ("vision gradients, error, worst step", lambda run: f"{worst(found, run, 'error'):.1e}"),
        ("drift of the tower's copies, end", lambda run: f"{worst(found, run, 'drift', slice(-1, None)):.2%}"),
        ("waits for the device, a forward", lambda run: str(count(found, run, "waits"))),
        ("index builds, a forward", lambda run: str(count(found, run, "builds"))),
    )
    lines += [f"  {name:34}{told('upstream'):>14}{told('patched'):>14}" for name, told in rows]
    loader = found[-1]["counts"]["patched, planned by the loader"]
    lines.append(f"  with plans made in the data loader: {loader['waits']} waits, {loader['builds']} index builds")
    return "\n".join([*lines, ""])


def worst(found: list[dict[str, Any]], run: str, what: str, part: slice = slice(None)) -> float:
    return max(max(rank[run][what][part]) for rank in found)


def count(found: list[dict[str, Any]], run: str, what: str) -> int:
    return max(rank["counts"][run][what] for rank in found)


def off(found: list[dict[str, Any]], run: str) -> float:
    return abs(found[0][run]["loss"][-1] - found[0]["without SP"]["loss"][-1])


def holds(equal: list[bool], found: list[dict[str, Any]]) -> bool:
    """What the demonstration is to show."""
    mended = worst(found, "patched", "error") < 1e-3 and worst(found, "patched", "drift") == 0.0
    return all(equal) and mended and worst(found, "upstream", "error") > 0.1


def pictures(found: list[dict[str, Any]], folder: Path) -> str:
    """Draws both; what was drawn, or why nothing was."""
    from demo_parts import picture, training

    told = {
        "demo.png": (picture.HEIGHT, lambda figure: picture.draw(figure, found)),
        "demo-owners.png": (
            picture.OWNERS_HEIGHT,
            lambda figure: picture.draw_owners(figure, training.example(), len(found)),
        ),
    }
    try:
        for name, (height, draw) in told.items():
            saved(folder / name, height, draw)
    except Problem as error:
        return f"no pictures: {error}"
    return f"pictures: {', '.join(str(folder / name) for name in told)}"


def quiet_paddleformers() -> None:
    """Its notes would break the progress bar."""
    from paddleformers.utils.log import logger

    logger.set_level("ERROR")


if __name__ == "__main__":
    raise SystemExit(main())
