"""bench: runs the benchmarks of the source tree, prints and stores them, compares with a stored run."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli.answer import FINE, PROBLEM, Answer, Problem, WrongUse
from paddle_vl_sp.cli.plot import stored_run
from paddle_vl_sp.cli.suite import SUITE, scripts
from paddle_vl_sp.cli.terminal import Progress, coloured, table

HEADINGS = {"syncs": "waits for the device"}
SLOWER = 1.5  # the ratio to the floor, over the stored one, from which a line counts as slower


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(SUITE)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--store", type=Path, metavar="FILE", help="keep the numbers, for --compare and plot")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="hold the numbers against a stored run")
    parser.add_argument("--slower", type=float, default=SLOWER, help="what counts as slower (default %(default)s)")
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="the source tree (default: where this is)")


def run(arguments: argparse.Namespace) -> Answer:
    _check(arguments)
    stored = None if arguments.compare is None else stored_run(arguments.compare, "--compare")
    found = _run_all(arguments)
    if arguments.store is not None:
        arguments.store.write_text(json.dumps(found, indent=1) + "\n")
    told = [found["machine"], *(_told(each) for script in found["scripts"] for each in script["tables"])]
    code = PROBLEM if found["failed"] else FINE
    if stored is not None:
        found["compared"] = list(_compared(found, stored))
        slower = [line for line in found["compared"] if line["floor_ratio"] > arguments.slower]
        told.append(_told_comparison(found["compared"], stored["machine"], arguments.slower))
        code = PROBLEM if slower else code
    told += [coloured(failed["why"], "red") for failed in found["failed"]]
    return Answer(found, "\n\n".join(told), code)


def _check(arguments: argparse.Namespace) -> None:
    """Before minutes are spent."""
    unknown = [name for name in arguments.names if name not in SUITE]
    if unknown:
        raise WrongUse(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(SUITE)}")
    if arguments.store is not None and not arguments.store.parent.is_dir():
        raise WrongUse(f"--store {arguments.store}: there is no folder {arguments.store.parent}")
    if arguments.store is not None and not _is_writable(arguments.store):
        raise WrongUse(f"--store {arguments.store} cannot be written: give a path that can")


def _is_writable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.W_OK) if path.exists() else os.access(path.parent, os.W_OK)


def _run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """What every script found; one that fails costs the others nothing, but for a problem where none is left."""
    chosen = scripts(arguments.names, arguments.quick, arguments.source)
    found, failed = [], []
    with Progress(len(chosen)) as bar:
        for script in chosen:
            bar.starts(script.path.name)
            try:
                found.append(script.run())
            except Problem as problem:
                failed.append({"name": script.name, "why": str(problem)})
            bar.advance(script.path.name)
    if not found:
        raise Problem("\n".join(each["why"] for each in failed))
    return {
        "machine": found[0]["machine"],
        "quick": arguments.quick,
        "scripts": [{"name": script["name"], "tables": script["tables"]} for script in found],
        "failed": failed,
    }


def _told(shown: dict[str, Any]) -> str:
    headings = list(shown["lines"][0]) if shown["lines"] else ["name"]
    rows = [[line[heading] for heading in headings] for line in shown["lines"]]
    title = coloured(shown["title"], "bold")
    return f"{title}\n{shown['note']}\n{table([HEADINGS.get(each, each.replace('_', ' ')) for each in headings], rows)}"


def _compared(found: dict[str, Any], stored: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Our lines of both runs, as times of the floor: machines differ, the ratio to the memory's own speed less so."""
    before = {(title, line["name"]): line for title, line in _race_lines(stored)}
    for title, line in _race_lines(found):
        other = before.get((title, line["name"]))
        if other is not None and line["name"].startswith("ours"):
            yield {
                "title": title,
                "name": line["name"],
                "times_floor": line["times_floor"],
                "stored": other["times_floor"],
                "floor_ratio": line["times_floor"] / other["times_floor"],
            }


def _race_lines(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for script in found["scripts"]:
        for shown in script["tables"]:
            yield from ((shown["title"], line) for line in shown["lines"] if "times_floor" in line)


def _told_comparison(lines: list[dict[str, Any]], machine: str, limit: float) -> str:
    if not lines:
        return "nothing to compare: the stored run has no race of the same size (--quick or not, other arguments)"
    rows = [
        (line["title"].split(",")[0], line["name"], line["times_floor"], line["stored"], _verdict(line, limit))
        for line in lines
    ]
    told = table(("compared with the stored run", "", "x floor", "stored", ""), rows)
    return f"{told}\nstored on {machine}"


def _verdict(line: dict[str, Any], limit: float) -> str:
    ratio = f"{line['floor_ratio']:.2f} x"
    return coloured(f"{ratio} SLOWER", "red") if line["floor_ratio"] > limit else ratio
