"""Builds the CUDA kernels, runs each against numpy on a GPU, and times it against the bytes it must move.

    python tools/gpu_check.py [--out docs/gpu-results.md] [--json FILE] [--quick]

Needs an NVIDIA GPU, nvcc, numpy, and PyTorch or CuPy for device memory; nothing of Paddle. Exits with 0 where
everything matches, 1 where something does not, 2 where there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_checks.checks import Tally, run_checks
from gpu_checks.library import Library, build
from gpu_checks.memory import Memory, find_memory
from gpu_checks.timing import Timing, copy_bandwidth, run_timings

SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
ALL_PARTS = ("check", "sanitize", "time")


def first_line(*command: str) -> str:
    """The first line a tool prints, or that it is not there."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} not found"
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    return next((line.strip() for line in printed if line.strip()), "nothing printed")


def describe(memory: Memory) -> dict[str, str]:
    device = memory.device()
    return {
        "device": f"{device.name}, sm_{device.architecture}, L2 {device.l2_bytes >> 20} MiB",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("sh", "-c", "nvcc --version | grep release"),
        "memory through": memory.name,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": "python tools/gpu_check.py " + " ".join(sys.argv[1:]),
    }


def sanitize(library: Path, memory: str) -> dict[str, str]:
    """What each tool of compute-sanitizer says of the quick checks: "passed", or the end of its output."""
    if shutil.which("compute-sanitizer") is None:
        return {}
    child = [sys.executable, __file__, "--quick", "--parts", "check", "--library", str(library)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # its cache hides stray accesses
    results = {}
    for tool in SANITIZER_TOOLS:
        options = ["--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":  # calls that a framework makes to see whether they fail are none of ours
            options += ["--report-api-errors", "no"]
        command = ["compute-sanitizer", *options, *child, "--memory", memory]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        results[tool] = "passed" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    return results


def timing_lines(timings: list[Timing], bandwidth: float) -> list[str]:
    lines = [
        f"A device-to-device copy moves {bandwidth / 1e12:.2f} TB/s; a floor is the bytes over that. Kernels are",
        "timed in replays of a graph over buffers beyond the L2, PyTorch's ways as they are called.",
        "",
        "| what | case | µs | floor µs | times the floor | TB/s |",
        "|---|---|---|---|---|---|",
    ]
    for timing in timings:
        floor = 1e6 * timing.bytes / bandwidth
        rate = timing.bytes / timing.microseconds / 1e6
        numbers = f"{timing.microseconds:.1f} | {floor:.1f} | {timing.microseconds / floor:.2f} | {rate:.2f}"
        lines.append(f"| {timing.what} | {timing.case} | {numbers} |")
    return lines


def report_lines(results: dict[str, Any], timings: list[Timing]) -> list[str]:
    lines = ["# The CUDA kernels on a GPU", ""]
    lines += [f"* {name}: {value}" for name, value in results["machine"].items()]
    lines += ["", "## Against numpy", ""]
    lines += [f"* {group}: {count} passed" for group, count in results["passed"].items()]
    lines += [f"* FAILED {failure}" for failure in results["failures"][:20]]
    lines += ["", "## compute-sanitizer, quick checks", ""]
    lines += [f"* {tool}: {said}" for tool, said in results["sanitizer"].items()] or ["* not run"]
    if timings:
        lines += ["", "## Times", "", *timing_lines(timings, results["copy_bytes_per_second"])]
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the report here, as markdown")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller inputs")
    parser.add_argument("--parts", nargs="+", choices=ALL_PARTS, default=ALL_PARTS)
    parser.add_argument("--memory", choices=("auto", "torch", "cupy"), default="auto")
    parser.add_argument("--library", type=Path, help="a library built before; default: build it")
    return parser.parse_args()


def run(arguments: argparse.Namespace, memory: Memory, folder: Path) -> tuple[dict[str, Any], list[Timing]]:
    path = arguments.library or build([memory.device().architecture], folder)
    library = Library(path)
    tally, timings = Tally(), []
    results: dict[str, Any] = {"machine": describe(memory), "sanitizer": {}}
    if "check" in arguments.parts:
        tally = run_checks(library, memory, arguments.quick)
    if "sanitize" in arguments.parts:
        results["sanitizer"] = sanitize(path, "torch" if memory.name.startswith("PyTorch") else "cupy")
    if "time" in arguments.parts and not tally.failures:
        results["copy_bytes_per_second"] = copy_bandwidth(memory)
        timings = run_timings(library, memory, arguments.quick)
    results.update(asdict(tally), timings=[asdict(timing) for timing in timings])
    return results, timings


def main() -> int:
    arguments = parse_arguments()
    try:
        memory = find_memory(arguments.memory)
    except RuntimeError as error:
        print(f"gpu_check: {error}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        results, timings = run(arguments, memory, Path(folder))
    report = "\n".join(report_lines(results, timings)) + "\n"
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report, encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    sanitizer_failed = any(said != "passed" for said in results["sanitizer"].values())
    return 1 if results["failures"] or sanitizer_failed else 0


if __name__ == "__main__":
    sys.exit(main())
