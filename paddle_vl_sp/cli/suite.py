"""The benchmark scripts of the source tree, one process each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_vl_sp.cli.answer import Problem

SUITE = {  # name: (the script, what --quick gives it)
    "plan": ("bench_plan.py", ("--seq", "16384", "--rounds", "10")),
    "rows": ("bench_rows.py", ("--seq", "8192", "--hidden", "256", "--rounds", "5")),
    "vision": ("bench_vision.py", ("balance", "--batches", "20")),
    "attention": ("bench_attention.py", ("--local", "64", "--ranks", "2")),
}


@dataclass(frozen=True)
class Script:
    name: str
    path: Path
    arguments: tuple[str, ...]

    def run(self) -> dict[str, Any]:
        """Its machine and its tables; what it prints is dropped unless it fails."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-W", "ignore", str(self.path), *self.arguments, "--json", str(result)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode or not result.exists():
                told = (done.stderr or done.stdout).strip()[-2000:]
                raise Problem(f"{self.path.name} failed with code {done.returncode}:\n{told}")
            found: dict[str, Any] = json.loads(result.read_text())
        return found | {"name": self.name}


def scripts(names: list[str], quick: bool, source: Path | None) -> list[Script]:
    """Those named, or all; from `source` or from the tree that this package is imported from."""
    folder = (source or Path(__file__).resolve().parents[2]) / "tools" / "bench"
    if not folder.is_dir():
        raise Problem(
            f"there is no {folder}: the benchmarks come with the source tree, not with the installed package; "
            "get the source of paddle-vl-sp and give --source FOLDER"
        )
    return [Script(name, folder / SUITE[name][0], SUITE[name][1] if quick else ()) for name in names or SUITE]
