"""The figures of docs/what-is-fixed.md on the whole fleet class: all settings on 2 and 4 ranks, into a CSV and a table.

python tests/fleet_whole/table.py docs/fleet-qwen3-vl.csv     needs paddlefleet; a quarter of an hour on two cores
python tests/fleet_whole/table.py docs/fleet-qwen3-vl.csv --read      the table of a CSV that is there
"""

import argparse
import csv
import itertools
import platform
import sys
from pathlib import Path

import paddle

sys.path[:0] = [str(Path(__file__).parent)]
import whole  # noqa: E402

from paddle_vl_sp.testing import run_ranks  # noqa: E402

MODES = {"TP-SP": True, "TP": False}
FIGURES = ("loss", "vision", "vision norm", "text", "qk norms", "replicas")
FIELDS = ("setting", "ranks", "mode", "side", *FIGURES, "raised")


def rows(nranks, wanted):
    """One row a setting, mode and side: each figure's largest of all ranks."""
    cases = [(name, MODES[mode], side, False) for name, mode, side in itertools.product(wanted, MODES, whole.SIDES)]
    ranks = run_ranks(whole.on_ranks, nranks, nranks, cases, wanted, timeout=1800)
    for name, mode, side in itertools.product(wanted, MODES, whole.SIDES):
        told = [rank[name, MODES[mode], side, False] for rank in ranks]
        row = {"setting": name, "ranks": nranks, "mode": mode, "side": side}
        if "raised" in told[0]:
            yield row | {"raised": told[0]["raised"].partition(":")[0]}
        else:
            yield row | {figure: f"{max(one[figure] for one in told):.1e}" for figure in FIGURES}


def measure(file):
    wanted = whole.references()
    found = [row for nranks in (2, 4) for row in rows(nranks, wanted)]
    with file.open("w", newline="") as out:
        out.write(
            f"# python {' '.join(sys.argv)}; paddlepaddle {paddle.__version__}, {platform.machine()}, CPU ranks\n"
        )
        writer = csv.DictWriter(out, FIELDS)
        writer.writeheader()
        writer.writerows(found)


def table(file):
    """Upstream and one line beside each other, in Markdown."""
    with file.open(newline="") as lines:
        found = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    by_case = {(row["setting"], int(row["ranks"]), row["mode"], row["side"]): row for row in found}

    def told(name, mode, side, figures, nranks=(2, 4)):
        told = [by_case[name, n, mode, side] for n in nranks]
        if told[0]["raised"]:
            return "raises"
        return " / ".join(short(max(float(row[figure]) for row in told)) for figure in figures)

    tower, norms, copies = ("vision", "vision norm"), ("qk norms",), ("replicas",)
    yield "| setting | vision, upstream: 2 ranks | 4 ranks | here | copies, upstream | here | norms, upstream | here |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in dict.fromkeys(row["setting"] for row in found):
        cells = [
            told(name, "TP-SP", "upstream", tower, (2,)),
            told(name, "TP-SP", "upstream", tower, (4,)),
            told(name, "TP-SP", "one line", tower),
            told(name, "TP-SP", "upstream", copies),
            told(name, "TP-SP", "one line", copies),
            told(name, "TP", "upstream", norms),
            told(name, "TP", "one line", norms),
        ]
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    for side in whole.SIDES:
        ran = [row for row in found if row["side"] == side and not row["raised"]]
        worst = {figure: max(ran, key=lambda row: float(row[figure])) for figure in ("loss", "text")}
        yield f"{side}: " + ", ".join(f"{key} {row[key]} ({row['setting']})" for key, row in worst.items())


def short(value):
    return "0" if value == 0 else f"{value:.2f}" if value >= 0.1 else f"{value:.1e}".replace("e-0", "e-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--read", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if not given.read:
        measure(given.csv)
    print("\n".join(table(given.csv)))
