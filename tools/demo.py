"""Trains PaddleFormers' own Qwen3-VL, tiny, on the CPU: upstream and with paddle_vl_sp, on one rank and on two.

python tools/demo.py [--steps 24] [--pictures FOLDER]      needs paddleformers; half a minute

It is the class that a YAML builds, where PaddleFleet is installed, else the plain one; the table says which. On one
rank both must be the same to the last bit. On two tensor-parallel ranks with sequence parallelism upstream's vision
tower gets wrong gradients, and the ranks' copies of it drift apart; with paddle_vl_sp they do not. If this is not what
happens, the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli import Problem
from paddle_vl_sp.cli.picture import save
from paddle_vl_sp.cli.quiet import quiet
from paddle_vl_sp.cli.terminal import Progress

SIDES = ("upstream", "patched")
WIDTHS = (12, 20, 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of every run")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="sequence-parallel ranks")
    parser.add_argument("--model", default="auto", choices=("auto", "fleet", "plain"), help="the class to show")
    parser.add_argument("--pictures", default=".", type=Path, help="the folder for demo.png and demo-owners.png")
    given = parser.parse_args()
    if not given.pictures.is_dir():
        parser.error(f"--pictures {given.pictures}: there is no such folder")
    if importlib.util.find_spec("paddleformers") is None:
        print(
            "this trains PaddleFormers' Qwen3-VL, and paddleformers is not installed: make demo, or\n"
            '  pip install "paddleformers==1.2.0" "pyarrow<26"',
            file=sys.stderr,
        )
        return 1
    os.environ |= {"GLOG_minloglevel": "3", "PADDLE_VL_SP_LOG": "warning"}
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # PaddleFleet's models log their layers
    begin = time.monotonic()
    shown, equal, found = run(given.steps, given.ranks, given.model)
    print(table(shown, equal, found))
    print(pictures(found, given.pictures, shown.is_flattened))
    print(f"{time.monotonic() - begin:.0f} s")
    return 0 if is_as_claimed(equal, found) else 1


@dataclass(frozen=True)
class Shown:
    """The class that is trained, and why this one."""

    class_name: str
    why: str
    is_flattened: bool


def run(steps: int, nranks: int, model: str) -> tuple[Shown, list[bool], list[dict[str, Any]]]:
    """What is shown, whether each step on one rank was equal, and what each of the ranks found."""
    with quiet():
        import paddle

        paddle.set_device("cpu")
        from demo_parts import models, training

        quiet_paddleformers()
        kind, why = models.chosen(model)

    learned: list[Any] = []
    with Progress((1 + len(training.RUNS)) * steps) as progress:
        equal = []
        for same in training.on_one_rank(kind, steps, learned):
            equal.append(same)
            progress.advance("one rank: upstream and with paddle_vl_sp")
        found = ranks_with_progress(nranks, learned[0], progress)
    return Shown(kind.class_name, why, kind.is_flattened), equal, found


def ranks_with_progress(nranks: int, reference: Any, progress: Progress) -> list[dict[str, Any]]:
    """The ranks write into a file what they are doing, a line a step."""
    from demo_parts import training
    from paddle_vl_sp.testing import run_ranks

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        steps_done, one_rank = Path(folder) / "steps", Path(folder) / "one_rank"
        steps_done.touch()
        one_rank.write_bytes(pickle.dumps(reference))
        arguments = (training.on_ranks, nranks, nranks, str(one_rank), str(steps_done))
        limit = 120 + 10 * len(reference.loss) * nranks
        ranks = threading.Thread(target=lambda: results.extend(run_ranks(*arguments, timeout=limit)))
        ranks.start()
        seen = 0
        while ranks.is_alive():
            ranks.join(0.2)
            lines = steps_done.read_text().splitlines()
            for line in lines[seen:]:
                progress.advance(line)
            seen = len(lines)
    if not results:
        raise RuntimeError("the ranks failed; their errors are above")
    return results


def table(shown: Shown, equal: list[bool], found: list[dict[str, Any]]) -> str:
    """What a reader should take away, in numbers and in a sentence."""
    losses = [f"{found[0][run]['loss'][-1]:.5f}" for run in ("without SP", "upstream", "patched")]
    rows = (
        ("", "without SP", "upstream", "with paddle_vl_sp"),
        ("loss at the end", *losses),
        ("vision gradients: relative error, first step / worst step",),
        ("  of the worst parameter", "", *(errors(found, run, "error") for run in SIDES)),
        ("  of the whole tower", "", *(errors(found, run, "norm") for run in SIDES)),
        ("how far the ranks' copies of the tower are apart, at the end",),
        ("  relative distance", "", *(f"{worst(found, run, 'drift', slice(-1, None)):.2%}" for run in SIDES)),
        ("placing the features in one forward of the plain class; with plans of the data loader, in brackets",),
        ("  host syncs: a GPU would wait", "", *counts(found, "syncs")),
        ("  searches for the visual rows", "", *counts(found, "searches")),
    )
    lines = "\n".join(f"  {name:34}{''.join(map(str.rjust, row, WIDTHS))}".rstrip() for name, *row in rows)
    return f"""
{shown.class_name}
  {shown.why}

One rank, upstream and with paddle_vl_sp
  {sum(equal)} of {len(equal)} steps have the same loss and gradients, bit for bit

{len(found)} sequence-parallel ranks (SP), {len(equal)} steps
{lines}

{verdict(equal, found)}
"""


def verdict(equal: list[bool], found: list[dict[str, Any]]) -> str:
    if not is_as_claimed(equal, found):
        return "This is not what the demonstration should show: please report it with the table above."
    return (
        "Under sequence parallelism upstream's vision tower learns from wrong gradients, and its copies drift apart.\n"
        "With paddle_vl_sp it learns as it does without sequence parallelism, and on one rank nothing changes."
    )


def errors(found: list[dict[str, Any]], run: str, what: str) -> str:
    return f"{worst(found, run, what, slice(1)):.1e} / {worst(found, run, what):.1e}"


def counts(found: list[dict[str, Any]], what: str) -> tuple[str, str]:
    upstream, ours = (max(rank["counts"][run][what] for rank in found) for run in SIDES)
    planned = max(rank["counts"]["patched, planned by the loader"][what] for rank in found)
    return f"{upstream}", f"{ours} ({planned})"


def worst(found: list[dict[str, Any]], run: str, what: str, part: slice = slice(None)) -> float:
    return max(max(rank[run][what][part]) for rank in found)


def is_as_claimed(equal: list[bool], found: list[dict[str, Any]]) -> bool:
    """Equal bits on one rank; on ranks upstream's fault, and right gradients and equal copies with paddle_vl_sp."""
    is_fixed = worst(found, "patched", "error") < 1e-3 and worst(found, "patched", "drift") == 0.0
    return all(equal) and is_fixed and worst(found, "upstream", "error") > 0.1


def pictures(found: list[dict[str, Any]], folder: Path, is_flattened: bool = True) -> str:
    """Draws both; what was drawn, or why nothing was."""
    from demo_parts import picture, training

    paths = folder / "demo.png", folder / "demo-owners.png"
    try:
        save(paths[0], picture.HEIGHT, lambda figure: picture.draw(figure, found))
        mask = training.example()
        save(
            paths[1], picture.OWNERS_HEIGHT, lambda figure: picture.draw_owners(figure, mask, len(found), is_flattened)
        )
    except Problem as error:
        return f"no pictures: {error}"
    return f"pictures: {', '.join(str(path.resolve()) for path in paths)}"


def quiet_paddleformers() -> None:
    """Its log lines would break the progress bar."""
    from paddleformers.utils.log import logger

    logger.set_level("ERROR")


if __name__ == "__main__":
    raise SystemExit(main())
