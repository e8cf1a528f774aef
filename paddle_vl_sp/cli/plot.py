"""plot: pictures of a batch under a layout, or of benchmarks. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli import inspect
from paddle_vl_sp.cli.answer import Answer, WrongUse
from paddle_vl_sp.cli.batch import batch_of
from paddle_vl_sp.cli.draw_batch import draw_load, draw_owners, load_height, owner_height
from paddle_vl_sp.cli.draw_bench import bench_height, draw_bench
from paddle_vl_sp.cli.drawing import saved

KINDS = ("owners", "load", "bench")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, default="owners", help="who owns what, loads, benchmarks")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, 900 pixels wide, or a .svg")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="for --kind bench: what `bench --store FILE` stored")
    inspect.add_arguments(parser)


def run(arguments: argparse.Namespace) -> Answer:
    if arguments.kind == "bench":
        _plot_bench(arguments)
    else:
        _plot_batch(arguments)
    told = {"kind": arguments.kind, "out": str(arguments.out)}
    return Answer(told, f"{arguments.kind}: {arguments.out}")


def _plot_batch(arguments: argparse.Namespace) -> None:
    batch, model = batch_of(arguments), inspect.model_of(arguments)
    if arguments.kind == "owners":
        saved(arguments.out, owner_height(batch), partial(draw_owners, batch=batch))
    else:
        saved(arguments.out, load_height(batch), partial(draw_load, batch=batch, model=model))


def _plot_bench(arguments: argparse.Namespace) -> None:
    if arguments.bench is None:
        raise WrongUse("--kind bench needs --bench FILE: `bench --store FILE` makes one")
    stored = stored_run(arguments.bench, "--bench")
    races = [table for script in stored["scripts"] for table in script["tables"] if _is_race(table)]
    if not races:
        raise WrongUse(f"--bench {arguments.bench} has no races in it: `bench plan rows --store FILE` makes some")
    saved(arguments.out, bench_height(races), partial(draw_bench, races=races, machine=stored["machine"]))


def stored_run(path: Path, flag: str) -> dict[str, Any]:
    """What `bench` stored, or what `bench --json` printed."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WrongUse(f"{flag} {path} cannot be read: {error}") from error
    if not isinstance(stored, dict) or not {"scripts", "machine"} <= stored.keys():
        raise WrongUse(f"{flag} {path} was not made by `bench --store` or `bench --json`")
    return stored


def _is_race(table: dict[str, Any]) -> bool:
    return bool(table["lines"]) and "times_ours" in table["lines"][0]
