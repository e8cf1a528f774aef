"""Every kernel on a GPU against the slow answer, skipped without one; and on the CPU, by an emulator of CUDA.

The emulator runs the CUDA sources themselves, a fiber a thread in random order, behind numpy in place of PyTorch:
emulator/. So the check is also seen to find mistakes, planted in the sources.
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
EMULATOR = Path(__file__).parent / "emulator"
sys.path.insert(0, str(EMULATOR))
import build  # noqa: E402

NO_GPU = 2
ROW_OPERATIONS = ("replace", "add", "zero", "add in place", "take")


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
    """The emulator with the sources as they are."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH: the emulator cannot be built")
    return build.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def wrong_library(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator with all mistakes, of which none is made but the one that `choose` names."""
    return build.build(tmp_path_factory.mktemp("mistakes"), MISTAKES.values(), reuse=library.parent)


def choose(mistake: str) -> dict[str, str]:
    """What the environment must say."""
    return {"CUDA_EMULATOR_MISTAKE": str(list(MISTAKES).index(mistake) + 1)}


def run_on_emulator(
    command: list[str], library: Path, path: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    environment |= {"PYTHONPATH": str(EMULATOR), "CUDA_EMULATOR": str(library)}
    environment["PATH"] = path + os.pathsep + os.environ["PATH"]
    return subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def check_on_emulator(library: Path, *options: str, path: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and report of the quick check."""
    report = library.with_suffix(".md")
    command = [str(TOOL), "--quick", "--library", str(library), "--out", str(report), *options]
    done = run_on_emulator(command, library, path, **environment)
    assert done.stdout == report.read_text(), done.stderr
    return done.returncode, done.stdout


def test_right_kernels_pass(library: Path) -> None:
    """Exit code 0; the report has the machine, every group, and a line for every way that is timed."""
    code, report = check_on_emulator(library)
    assert code == 0, report
    assert "* device: an emulator, sm_90, 8 GiB" in report
    for group in ("index", "rows", "graph"):
        (line,) = (line for line in report.splitlines() if line.startswith(f"* {group}: "))
        assert line.endswith(" passed, 0 failed")
        assert not line.startswith(f"* {group}: 0")
    timed = [line.split(" | ")[0].strip("| ") for line in report.splitlines() if line.endswith(" |")]
    assert set(timed) > {"count", "count + write", *ROW_OPERATIONS}
    assert {name.split(":")[0] for name in timed} > {f"PyTorch {name}" for name in ("plan", *ROW_OPERATIONS)}


MISTAKES: dict[str, build.Mistake] = {
    "an id beyond the end": (
        "index.cu",
        "[[first < query.num_tokens ? (1u << (query.num_tokens - first)) - 1 : 0 => 255u]]",
    ),
    "unaligned loads": (
        "query.cuh",
        "if ([[query.aligned && first + kRun <= query.num_tokens => first + kRun / 2 <= query.num_tokens]]) {",
    ),
    "the second sample's run": ("query.cuh", "bits |= [[own_bits(query, 0) << done => 0u]]"),
    "the last interval": (
        "query.cuh",
        "[[k < query.num_intervals => k + 1 < query.num_intervals]]; ++k) {\n      const int64_t start = query.few",
    ),
    "the search": (
        "query.cuh",
        "[[query.many[middle].start <= position => query.many[middle].start < position]]",
    ),
    "ids of 64 bits": (
        "query.cuh",
        "found |= [[run.at[j] == static_cast<Token>(query.ids[k]) "
        "=> static_cast<int32_t>(run.at[j]) == static_cast<int32_t>(query.ids[k])]];",
    ),
    "a barrier": ("index.cu", "  [[__syncthreads() => void()]];\n  if (threadIdx.x >= kWarp) return;"),
    "a barrier that not all reach": (
        "index.cu",
        "  if (lane == 0) warps[threadIdx.x / kWarp] = [[count => (threadIdx.x ? count : (__syncthreads(), count))]];",
    ),
    "the scan's warps": ("index.cu", "[[w < warp => w + 1 < warp]]; ++w) next += warps[w]"),
    "padding": ("index.cu", "[[place < plan.capacity => place + 1 < plan.capacity]]; place += gridDim.x"),
    "a place behind the last": ("index.cu", "      if ([[place < plan.capacity => place <= plan.capacity]]) {"),
    "samples apart": ("index.cu", "position -= query.seq_len;\n      [[++sample => sample]];"),
    "a column too many": (
        "rows.cu",
        "if ([[column >= columns => column > columns]]) continue;\n      if (!changed) {",
    ),
    "the old value": (
        "rows.cu",
        "out_row[column] = [[add(old[k], convert<H>(given[k])) => convert<H>(given[k])]]",
    ),
    "zero's sign": (
        "pack.cuh",
        "T([[static_cast<Sum>(left.at[i]) + static_cast<Sum>(right.at[i]) "
        "=> Sum(0) + static_cast<Sum>(left.at[i]) + static_cast<Sum>(right.at[i])]])",
    ),
    "a gap in the strip": ("rows.cu", "j += [[kThreads => 2 * kThreads]]) sources[j] = -1"),
    "a row too many": ("rows.cu", "const bool changed = [[feature >= 0 => feature >= 0 || row == 1]];"),
}
SAID = {
    "an id beyond the end": "FAILED index: counts: ",
    "unaligned loads": "ended with code|were overwritten",
    "ids of 64 bits": "FAILED index: counts: ",
    "padding": "FAILED index: update: 1 of ",
    "a place behind the last": "were overwritten",
    "samples apart": "FAILED index: update: ",
    "a column too many": "were overwritten",
    "the old value": "FAILED rows: out: ",
    "zero's sign": "-0.0 (bits ",
    "a gap in the strip": "FAILED rows: features: ",
}


def check_group(library: Path, group: str, **environment: str) -> str:
    """What the quick check says of one group of kernels: index or rows."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tools")!r}, {str(ROOT / "tests")!r}]
from functools import partial
import numpy
from gpu_checks import checks, inputs, library
rng, built = numpy.random.default_rng(0), library.Library({str(library)!r})
check, cases = getattr(checks, "check_{group}"), inputs.{group}_cases(rng, True)
for line in checks.check_all("{group}", partial(check, built, rng), cases): print(line, flush=True)
"""
    done = run_on_emulator(["-c", code], library, **environment)
    return done.stdout + (f"* FAILED {group} ended with code {done.returncode}" if done.returncode else "")


def test_without_a_choice_no_mistake_is_made(wrong_library: Path) -> None:
    """So what the others find is the one mistake of each."""
    for group in ("index", "rows"):
        assert "FAILED" not in check_group(wrong_library, group)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(wrong_library: Path, mistake: str) -> None:
    """A line that says what differs: bytes, counts, a zero's sign, memory that is not ours."""
    group = "index" if MISTAKES[mistake][0] in ("index.cu", "query.cuh") else "rows"
    report = check_group(wrong_library, group, **choose(mistake))
    assert "* FAILED " in report, report
    assert any(word in report for word in SAID.get(mistake, f"FAILED {group}").split("|")), report


def test_a_graph_that_does_nothing_is_found(library: Path) -> None:
    """What was captured must run again in every replay."""
    code, report = check_on_emulator(library, "--parts", "check", CUDA_EMULATOR_STALE="1")
    assert code == 1
    assert "FAILED graph: counts: 2 of 2 values differ, the first at [0]: -7" in report


def test_a_moved_nan_keeps_its_bits(library: Path, tmp_path: Path) -> None:
    """Movement within a type is bit-exact, NaNs too; the NaN of a sum or of a conversion may be any."""
    converted = "constexpr ([[std::is_same_v<To, From> => std::is_same_v<To, From> && sizeof(To) > 2]])"
    moved = "[[values == Values::kMoved && std::is_same_v<To, From> => false]]"
    wrong = build.build(tmp_path, [("pack.cuh", converted), ("rows.cu", moved)], fixed=True, reuse=library.parent)
    failures = [line for line in check_group(wrong, "rows").splitlines() if line.startswith("* FAILED rows")]
    assert failures
    assert all("16', 'bfloat16')" in line or "'float16', 'float16'" in line for line in failures), failures
    assert all("'add" not in line for line in failures), failures


def test_wrong_kernels_are_timed_and_marked(wrong_library: Path) -> None:
    """A padding that is not written: the checks fail, the times come all the same and say so."""
    code, report = check_on_emulator(wrong_library, **choose("padding"))
    assert code == 1
    assert "* FAILED index: update: 1 of " in report
    assert "**A check failed: these may be times of kernels that do something else.**" in report
    assert "| count + write FAILED update: 1 of " in report
    assert "| PyTorch zero: index_fill | " in report


def test_a_crash_ends_its_own_part_only(wrong_library: Path) -> None:
    """What was found before it is in the report; the times follow. A barrier that not all reach is such a crash."""
    code, report = check_on_emulator(wrong_library, **choose("a barrier that not all reach"))
    assert code == 1
    assert "* FAILED check ended with code -6" in report
    assert "## Times" in report


def test_rows_far_away(library: Path, wrong_library: Path) -> None:
    """The check of rows beyond 2^31 elements, with a small number in its place; it finds a row too many."""
    code = "from gpu_checks import checks; checks.FAR_ROWS = 300\n"
    code += "print(*checks.check_all('far', lambda each: checks.check_far_rows(library, rng, each), checks.OPERATIONS))"
    first = f"import sys; sys.path[:0] = [{str(ROOT / 'tools')!r}, {str(ROOT / 'tests')!r}]; import numpy\n"
    first += f"from gpu_checks.library import Library; library = Library({str(library)!r})\n"
    first += "rng = numpy.random.default_rng(0)\n"
    done = run_on_emulator(["-c", first + code], library)
    assert done.stdout == "* far: 5 passed, 0 failed\n", done.stderr
    command = ["-c", first.replace(str(library), str(wrong_library)) + code]
    done = run_on_emulator(command, wrong_library, **choose("a row too many"))
    assert "out: a row that no pair names is not -7 everywhere" in done.stdout, done.stderr


@pytest.mark.parametrize(("status", "said"), [(0, "* racecheck: passed"), (9, "* FAILED racecheck, code 9: a hazard")])
def test_what_the_sanitizer_says(library: Path, tmp_path: Path, status: int, said: str) -> None:
    """Each tool runs the quick kernels; its exit code decides."""
    tool = tmp_path / "compute-sanitizer"
    run = 'case "$*" in *racecheck*) while [ "${1#/}" = "$1" ]; do shift; done; "$@";; esac'
    tool.write_text(f"#!/bin/sh\n[ {status} = 0 ] || {{ echo a hazard; exit {status}; }}\n{run} >> {tmp_path}/out\n")
    tool.chmod(0o755)
    code, report = check_on_emulator(library, "--parts", "sanitize", path=str(tmp_path))
    assert code == (status != 0)
    assert said in report
    if status == 0:
        assert "* rows: " in (tmp_path / "out").read_text()


def test_without_a_gpu_it_says_so(library: Path, tmp_path: Path) -> None:
    """Exit code 2, no report; without PyTorch, and with one that sees no GPU."""
    report = tmp_path / "report.md"
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    for folder, words in ((tmp_path, "PyTorch cannot be imported (none here)"), (EMULATOR, "PyTorch sees none")):
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_EMULATOR"}
        command = [sys.executable, str(TOOL), "--library", str(library), "--out", str(report)]
        environment["PYTHONPATH"] = str(folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (NO_GPU, f"gpu_check: no GPU to run on: {words}\n")
        assert not report.exists()
