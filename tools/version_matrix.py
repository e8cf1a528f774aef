"""Which versions work together: the core of the tests on every Python, Paddle and PaddleFormers, into docs/versions.md.

python tools/version_matrix.py              everything: hours, one combination after the other, 3 GB at a time
python tools/version_matrix.py --missing    only what docs/versions.csv has not
python tools/version_matrix.py --page       only the page, from docs/versions.csv

Each Python and Paddle gets a new environment, in which the operators are built and the core is run; then every
release of PaddleFormers is installed into it (on Python 3.11; on the others the newest), and `doctor --contracts`
judges its code; with the release that requirements.txt names, the tests on its models are run. What is installed comes
from pip's index, and is deleted afterwards.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "docs" / "versions.csv", ROOT / "docs" / "versions.md"
KEY = ("python", "paddle", "paddleformers")
FIELDS = (*KEY, "result", "passed", "skipped", "operators", "families", "seconds", "date")
PYTHONS, ALL_FORMERS_ON, OLDEST_PADDLE = ("3.10", "3.11", "3.12"), "3.11", (3, 3)
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
TOOLS = ("numpy", "pytest", "pytest-timeout", "hypothesis", "pyarrow")  # of requirements.txt
TWO_RANKS = "not test_on_all_ranks or [2-"  # one launch of two ranks
ONE_CARD = [f"tests/single_card/test_{name}.py" for name in ("layout", "plan", "rows", "joint")]
CORE = [*ONE_CARD, "tests/multi_rank/test_comm.py", "-k", TWO_RANKS]
TRAINED = "not test_one_rank or twenty or state_dict or ways_to_call"
MODELS = [f"tests/formers/test_{name}.py" for name in ("images_and_videos", "qwen2_5_vl", "one_rank")] + ["-k", TRAINED]
LIMIT = 1800  # seconds for one step
LONGEST = 160  # letters of an error in the table

Row = dict[str, str]


class NotRun(Exception):
    """Why there is no result, in the words of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--missing", action="store_true", help="only what the table has not, or has as not run")
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--paddle", nargs="+", help="default: every release since 3.3")
    parser.add_argument("--formers", nargs="+", help="default: every release")
    given = parser.parse_args()
    if not given.page:
        paddles = given.paddle or [v for v in releases("paddlepaddle") if numbers(v) >= OLDEST_PADDLE]
        run_all(combinations(given.python, paddles, given.formers or releases("paddleformers")), given.missing)
    PAGE.write_text(page(read_table()))


def combinations(pythons: Sequence[str], paddles: list[str], formers: list[str]) -> dict[tuple[str, str], list[str]]:
    """For each Python and Paddle, the core ("") and the releases of PaddleFormers."""
    ordered = sorted(pythons, key=lambda v: v != ALL_FORMERS_ON)
    return {
        (python, paddle): ["", *(formers if python == ALL_FORMERS_ON else formers[:1])]
        for python in ordered
        for paddle in paddles
    }


def run_all(wanted: dict[tuple[str, str], list[str]], only_missing: bool) -> None:
    """Everything is in the table from the start: where this is ended early, the rest stands there as not run."""
    keys = [(*environment, name) for environment, names in wanted.items() for name in names]
    for key in set(keys) - {key_of(row) for row in read_table()}:
        record(**dict(zip(KEY, key, strict=True)), result="not run: not yet")
    done = {key_of(row) for row in read_table() if not row["result"].startswith("not run")} if only_missing else set()
    for (python, paddle), names in wanted.items():
        left = [name for name in names if (python, paddle, name) not in done]
        if left:
            run_on(python, paddle, left)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def releases(package: str) -> list[str]:
    """All that pip can install here, the newest first."""
    done = step([sys.executable, "-m", "pip", "index", "versions", package])
    listed = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if not listed:
        raise SystemExit(f"pip lists no {package}: {done.stderr.strip()}")
    return listed[1].split(", ")


def interpreter(python: str) -> str:
    """One on the PATH that runs, or one of pyenv's; "" where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    places = [f"python{python}", *sorted(map(str, pyenv.glob(f"versions/{python}.*/bin/python")))]
    for place in places:
        found = shutil.which(place)
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return ""


def step(command: list[str], folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **env}
    try:
        return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"took more than {LIMIT} seconds") from error


def install(python: str, *packages: str) -> None:
    done = step([python, "-m", "pip", "install", "--quiet", "--no-compile", *packages])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: it failed"]
        raise NotRun(f"pip: {lines[-1].removeprefix('ERROR: ')}")


def run_on(python: str, paddle: str, wanted: list[str]) -> None:
    """One environment: the core ("" in `wanted`), then each release of PaddleFormers."""
    found = interpreter(python)
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        tree, name = Path(folder) / "tree", Path(folder) / "env" / "bin" / "python"
        try:
            if not found:
                raise NotRun("no interpreter")
            shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
            step([found, "-m", "venv", str(name.parents[1])])
            install(str(name), f"paddlepaddle=={paddle}", "setuptools>=64,<80", "wheel", *tools())
            operators = build(str(name), tree)
        except NotRun as why:
            for formers in wanted:
                record(python=python, paddle=paddle, paddleformers=formers, result=f"not run: {why}")
            return
        for formers in wanted:
            start = time.monotonic()
            try:
                result = try_formers(str(name), tree, formers) if formers else tests(str(name), tree, CORE)
            except NotRun as why:
                result = {"result": f"not run: {why}"}
            seconds = f"{time.monotonic() - start:.0f}"
            known = {"python": python, "paddle": paddle, "paddleformers": formers, "operators": operators}
            record(**known, seconds=seconds, **result)


def tools() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [line for line in lines if re.split("[<>=]", line)[0] in TOOLS]


def build(python: str, tree: Path) -> str:
    """The operators, where the tests find them; "no" where they cannot be built: plain Paddle is tested then."""
    done = step([python, "setup.py", "-q", "build_ext", "--inplace"], tree, PADDLE_VL_SP_BUILD="require")
    return "no" if done.returncode else "yes"


def try_formers(python: str, tree: Path, formers: str) -> Row:
    """What `doctor` says of its code; and the tests, which are written for the release of requirements.txt."""
    install(python, f"paddleformers=={formers}", "pyarrow<26")
    command = [python, "-W", "ignore", "-m", "paddle_vl_sp", "doctor", "--contracts", "--json"]
    said = step(command, tree, PYTHONPATH=str(tree)).stdout
    if not said.startswith("{"):
        raise NotRun("doctor fails")
    checks = json.loads(said)["checks"]
    is_pinned = f"paddleformers=={formers}" in (ROOT / "requirements.txt").read_text().splitlines()
    result = tests(python, tree, MODELS) if is_pinned else {}
    if result.get("passed", "0") == "0":  # written for another release, or they cannot be imported here
        result = {"result": "; ".join(filter(None, (clauses(checks), result.get("result"))))}
    return {**result, "families": families(checks)}


def families(checks: list[Row]) -> str:
    found = [(check["subject"], re.match(r"(known|admitted|refused)[;:]", check["message"])) for check in checks]
    return ", ".join(f"{family} {verdict[1]}" for family, verdict in found if verdict)


def clauses(checks: list[Row]) -> str:
    """Of the contracts: what is needed of PaddleFormers' code."""
    tried = [check for check in checks if check["subject"].startswith("contract, ")]
    broken = sorted({check["subject"].removeprefix("contract, ") for check in tried if check["state"] == "FAIL"})
    if not tried:
        return "nothing to replace"
    number = sum(check["state"] == "PASS" for check in tried)
    of = f", not those of {', '.join(broken)}" if broken else ""
    failed = [check["subject"] for check in checks if check["state"] == "FAIL"]
    lacks = [subject.removeprefix("upstream, ") for subject in failed if subject.startswith("upstream, ")]
    without = f"; it lacks {', '.join(lacks)}" if lacks else ""
    return f"{number} of {len(tried)} clauses hold{of}{without}"


def tests(python: str, tree: Path, chosen: list[str]) -> Row:
    command = [python, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600", *chosen]
    done = step(command, tree, PYTHONPATH=str(tree))
    lines = done.stdout.strip().splitlines() or [""]
    counts = {word: number for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])}
    broken = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    failed = ""
    if broken:
        why = next((line[1:].strip() for line in lines if re.match(r"E\s+\w+(Error|Exception)\b", line)), "no message")
        why = re.sub(r" [(]/.*", "", why).replace("|", " ")[:LONGEST]  # without paths of this machine
        every = len(broken) + int(counts.get("passed", 0))
        failed = f"{len(broken)} of {every} fail, {broken[0]} first: {why}"
    elif done.returncode:
        failed = f"pytest fails: {lines[-1]}"
    return {"result": failed or "passes", "passed": counts.get("passed", "0"), "skipped": counts.get("skipped", "0")}


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def read_table() -> list[Row]:
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def record(**row: str) -> None:
    """Puts the row into the table, in the place of an older one."""
    new = dict.fromkeys(FIELDS, "") | row | {"date": datetime.date.today().isoformat()}
    rows = [old for old in read_table() if key_of(old) != key_of(new)]
    rows = sorted([*rows, new], key=lambda row: [numbers(version) for version in key_of(row)])
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(", ".join(f"{name} {value}" for name, value in new.items() if value), flush=True)


HEAD = """# Versions

Made by `python tools/version_matrix.py` from its table, [versions.csv](versions.csv): Linux, Paddle for the CPU,
without PaddleFleet. *not run* says why, and that nothing is known. Operators are built for each Paddle; where they
cannot be, plain Paddle is tested.

## Python and Paddle

Layouts, plans, rows, images with videos; collectives, gathers and whole gradients on two processes.

| Python | Paddle | result | tests | operators | date |
|---|---|---|---|---|---|
"""
MIDDLE = """
## PaddleFormers

`doctor` judges the code of each family of models that can be imported without PaddleFleet: [known, admitted or
refused](other-releases.md). *passes*: losses and gradients of the plain Qwen3-VL and
Qwen2.5-VL classes are PaddleFormers' own, by tests that are written for one release. For other releases `doctor
--contracts` tries the clauses of each family. Where it *lacks* one, which cannot be imported there, the report of
`apply_to_paddleformers()` has a line for it; named by `families=` it is an error.
*nothing to replace*: none of the supported families is in it.

| PaddleFormers | Python | Paddle | result | tests | families | date |
|---|---|---|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    newest_first = sorted(rows, key=lambda row: numbers(row["paddleformers"]), reverse=True)
    core = [
        line(row["python"], row["paddle"], row["result"], count(row), row["operators"], row["date"])
        for row in rows
        if not row["paddleformers"]
    ]
    models = [
        line(*(row[name] for name in ("paddleformers", "python", "paddle", "result")), count(row), *ends(row))
        for row in newest_first
        if row["paddleformers"] and not row["result"].startswith("not run")
    ]
    return HEAD + "".join(core) + MIDDLE + "".join(models) + "".join(not_run(newest_first))


def not_run(rows: list[Row]) -> list[str]:
    """A line for each reason in each environment, with all releases of PaddleFormers that it concerns."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["paddleformers"] and row["result"].startswith("not run"):
            grouped.setdefault((row["python"], row["paddle"], row["result"]), []).append(row["paddleformers"])
    lines = [f"* Python {key[0]}, Paddle {key[1]}, {key[2]}: {', '.join(names)}\n" for key, names in grouped.items()]
    return ["\n", *lines] if lines else []


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def count(row: Row) -> str:
    return f"{row['passed']} passed, {row['skipped']} skipped" if row["passed"] else ""


def ends(row: Row) -> tuple[str, str]:
    return row["families"], row["date"]


if __name__ == "__main__":
    main()
