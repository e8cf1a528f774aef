"""Builds the CUDA kernels, compares each with the slow answer on a GPU, and times it against the bytes it must move.

    python tools/gpu_check.py [--out docs/gpu-results.md] [--quick] [--parts check time sanitize]

Needs an NVIDIA GPU, nvcc, numpy and PyTorch; nothing of Paddle. Each part runs in a process of its own, since a crash
must not end the others; each line is in the report as soon as it is known. Exits with 0 where everything matches, 1
where something does not, 2 where there is no GPU to run on or no nvcc.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from gpu_checks.library import Library, build

PARTS = {"check": "Against numpy and PyTorch", "time": "Times", "sanitize": "compute-sanitizer, quick checks"}
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_SECONDS = 120  # a tool
FAILED = "FAILED "  # in a line of the report


def show(lines: Iterable[str], *files: TextIO) -> bool:
    """Prints each line as soon as it is known; whether one of them is a failure."""
    failed = False
    for line in lines:
        failed |= FAILED in line
        for file in files:
            print(line, file=file, flush=True)
    return failed


def find_gpu() -> Any:
    """Its properties, by PyTorch; RuntimeError where there is none."""
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"no GPU to run on: PyTorch cannot be imported ({error})") from error
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU to run on: PyTorch sees none")
    return torch.cuda.get_device_properties(0)


def describe(gpu: Any) -> list[str]:
    def printed_by(command: str) -> str:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        return " ".join((done.stdout or done.stderr).split())

    return [
        f"* device: {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GiB",
        f"* driver: {printed_by('nvidia-smi --query-gpu=driver_version --format=csv,noheader')}",
        f"* nvcc: {printed_by('nvcc --version | grep release')}; PyTorch {sys.modules['torch'].__version__}",
        f"* {time.strftime('%Y-%m-%d')}: `python tools/gpu_check.py {' '.join(sys.argv[1:])}`",
    ]


def worker_command(part: str, library: Path, quick: bool) -> list[str]:
    return [sys.executable, __file__, "--worker", part, "--library", str(library), *["--quick"] * quick]


def work(part: str, library: Path, quick: bool) -> Iterator[str]:
    """The lines of one part, in the process that is its own."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # oracle.py
    from gpu_checks import checks, timing

    run = {"check": checks.run_checks, "time": timing.run_timings, "sanitize": checks.run_kernels}[part]
    try:
        yield from run(Library(library), quick)
    except Exception as error:
        traceback.print_exc()
        yield f"* {FAILED}{part} ended by {error!r}"


def run_part(part: str, library: Path, quick: bool) -> Iterator[str]:
    with subprocess.Popen(worker_command(part, library, quick), stdout=subprocess.PIPE, text=True) as worker:
        yield from (line.rstrip("\n") for line in worker.stdout or ())
    if worker.returncode != 0:
        yield f"* {FAILED}{part} ended with code {worker.returncode}"


def sanitize(library: Path) -> Iterator[str]:
    """The quick checks under each tool of compute-sanitizer."""
    if shutil.which("compute-sanitizer") is None:
        yield "* not run: compute-sanitizer not found"
        return
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # its cache hides stray accesses
    for tool in SANITIZER_TOOLS:
        command = ["timeout", str(SANITIZER_SECONDS), "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        if tool != "initcheck":  # which must see what PyTorch's kernels write
            command += ["--kernel-name", "kernel_substring=4vlsp"]  # in mangled names: ours alone
        if tool == "memcheck":  # calls that PyTorch makes to see whether they fail are none of ours
            command += ["--report-api-errors", "no"]
        command += worker_command("sanitize", library, quick=True)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            yield f"* {tool}: passed"
        else:  # 124: out of time
            yield f"* {FAILED}{tool}, code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=os.devnull, help="write the report here, as Markdown")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller inputs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--library", type=Path, help="a library built before; default: build it")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker is not None:
        return int(show(work(arguments.worker, arguments.library, arguments.quick), sys.stdout))
    with tempfile.TemporaryDirectory() as folder:
        try:
            gpu = find_gpu()
            library = arguments.library or build([f"{gpu.major}{gpu.minor}"], Path(folder))
        except (RuntimeError, FileNotFoundError) as error:
            print(f"gpu_check: {error}")
            return 2
        with open(arguments.out, "w", encoding="utf-8") as out:
            failed = show(["# The CUDA kernels on a GPU", "", *describe(gpu)], sys.stdout, out)
            for part in arguments.parts:
                heading = ["", f"## {PARTS[part]}", ""]
                if part == "time" and failed:
                    heading += ["**A check failed: these may be times of kernels that do something else.**", ""]
                lines = sanitize(library) if part == "sanitize" else run_part(part, library, arguments.quick)
                failed |= show(itertools.chain(heading, lines), sys.stdout, out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
