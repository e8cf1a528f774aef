"""Every kernel on a GPU against the slow answer, skipped without one; and the check itself, on a double of the GPU.

The double runs the CPU kernels behind the same C functions, and numpy in place of PyTorch: double/kernels.cc, torch.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"
DOUBLE = Path(__file__).parent / "double"
NO_GPU = 2
ROW_OPERATIONS = ("replace", "add", "take", "zero")


@pytest.mark.timeout(1200)
def test_kernels_on_a_gpu() -> None:
    """tools/gpu_check.py finds no mismatch; skipped with its own words where there is nothing to run on."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the CUDA kernels cannot be built")
    done = subprocess.run([sys.executable, str(TOOL), "--quick"], capture_output=True, text=True, check=False)
    if done.returncode == NO_GPU:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH: the double cannot be built")
    path = tmp_path_factory.mktemp("double") / "libdouble.so"
    ops = ROOT / "custom_ops"
    sources = [ops / "c_api.cu", DOUBLE / "kernels.cc", ops / "index_cpu.cc", ops / "rows_cpu.cc"]
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{DOUBLE}", f"-I{ops}"]
    subprocess.run(["g++", *options, "-o", str(path), "-x", "c++", *map(str, sources)], check=True)
    return path


def run_on_double(
    command: list[str], library: Path, fault: str = "", path: str = ""
) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(DOUBLE), "CUDA_DOUBLE": str(library), "CUDA_DOUBLE_FAULT": fault}
    environment["PATH"] = path + os.pathsep + os.environ["PATH"]
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def check_on_double(library: Path, *options: str, fault: str = "", path: str = "") -> tuple[int, str]:
    """Exit code and report of the quick check."""
    report = library.with_suffix(".md")
    command = [str(TOOL), "--quick", "--library", str(library), "--out", str(report), *options]
    done = run_on_double(command, library, fault, path)
    assert done.stdout == report.read_text(), done.stderr
    return done.returncode, done.stdout


def test_right_kernels_pass(library: Path) -> None:
    """Exit code 0; the report has the machine, every group, and a line for every way that is timed."""
    code, report = check_on_double(library)
    assert code == 0, report
    assert "* device: a double, sm_90, 8 GiB" in report
    for group in ("index", "rows", "graph"):
        (line,) = (line for line in report.splitlines() if line.startswith(f"* {group}: "))
        assert line.endswith(" passed, 0 failed")
        assert not line.startswith(f"* {group}: 0")
    timed = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if line.endswith(" |")]
    assert set(timed) > {"count", "count + write", *ROW_OPERATIONS}
    assert {name.split(":")[0] for name in timed} > {f"PyTorch {name}" for name in ("plan", *ROW_OPERATIONS)}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stray", "were overwritten"),  # a byte behind the array
        ("sign", "-0.0 (bits -32768), expected 0.0 (bits 0)"),
        ("sum", "rows: hidden: "),  # add forgets the old values
        ("stale", "graph: counts: 2 of 2 values differ, the first at [0]: -7"),  # a replay does nothing
    ],
)
def test_a_mistake_is_found(library: Path, fault: str, words: str) -> None:
    """Exit code 1, and a line that says what differs."""
    code, report = check_on_double(library, "--parts", "check", fault=fault)
    assert code == 1
    assert any(words in line for line in report.splitlines() if line.startswith("* FAILED ")), report


def test_a_moved_nan_keeps_its_bits(library: Path) -> None:
    """Movement within a type is bit-exact, NaNs too; the NaN of a sum or of a conversion may be any."""
    _, report = check_on_double(library, "--parts", "check", fault="nan")
    failures = [line for line in report.splitlines() if line.startswith("* FAILED rows")]
    assert failures
    assert all("types=('bfloat16', 'bfloat16')" in line and "'add'" not in line for line in failures)


def test_wrong_kernels_are_timed_and_marked(library: Path) -> None:
    """A padding that is not written: the checks fail, the times come all the same and say so."""
    code, report = check_on_double(library, fault="unwritten")
    assert code == 1
    assert "* FAILED index: update: 1 of " in report
    assert "**A check failed: these may be times of kernels that do something else.**" in report
    assert "| count + write FAILED update: 1 of 8192 values differ" in report
    assert "| PyTorch zero: index_fill_ | " in report


def test_a_crash_ends_its_own_part_only(library: Path) -> None:
    """What was found before it is in the report; the times follow."""
    code, report = check_on_double(library, fault="crash")
    assert code == 1
    assert "* FAILED check ended with code -6" in report
    assert "| zero | bf16" in report


def test_rows_far_away(library: Path) -> None:
    """The check of rows beyond 2^31 elements, with a small number in its place; it finds a row too many."""
    code = "from gpu_checks import checks; checks.FAR_ROWS = 300\n"
    code += "print(*checks.check_all('far', lambda each: checks.check_far_rows(library, rng, each), checks.OPERATIONS))"
    first = f"import sys; sys.path[:0] = [{str(ROOT / 'tools')!r}, {str(ROOT / 'tests')!r}]; import numpy\n"
    first += f"from gpu_checks.library import Library; library = Library({str(library)!r})\n"
    first += "rng = numpy.random.default_rng(0)\n"
    done = run_on_double(["-c", first + code], library)
    assert done.stdout == "* far: 4 passed, 0 failed\n", done.stderr
    done = run_on_double(["-c", first + code], library, fault="first")
    assert "a row that no pair names is not -7 everywhere" in done.stdout, done.stderr


@pytest.mark.parametrize(("status", "said"), [(0, "* racecheck: passed"), (9, "* FAILED racecheck, code 9: a hazard")])
def test_what_the_sanitizer_says(library: Path, tmp_path: Path, status: int, said: str) -> None:
    """Each tool runs the quick kernels; its exit code decides."""
    tool = tmp_path / "compute-sanitizer"
    run = 'while [ "${1#/}" = "$1" ]; do shift; done; "$@"'
    tool.write_text(f"#!/bin/sh\n[ {status} = 0 ] || {{ echo a hazard; exit {status}; }}\n{run} > {tmp_path}/out\n")
    tool.chmod(0o755)
    code, report = check_on_double(library, "--parts", "sanitize", path=str(tmp_path))
    assert code == (status != 0)
    assert said in report
    if status == 0:
        assert "* rows: " in (tmp_path / "out").read_text()


def test_without_a_gpu_it_says_so(library: Path, tmp_path: Path) -> None:
    """Exit code 2, no report; without PyTorch, and with one that sees no GPU."""
    report = tmp_path / "report.md"
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    for folder, words in ((tmp_path, "PyTorch cannot be imported (none here)"), (DOUBLE, "PyTorch sees none")):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_DOUBLE"}
        command = [sys.executable, str(TOOL), "--library", str(library), "--out", str(report)]
        environment["PYTHONPATH"] = str(folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (NO_GPU, f"gpu_check: no GPU to run on: {words}\n")
        assert not report.exists()
