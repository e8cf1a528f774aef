"""The C++ tests of the CPU kernels, built with the sanitizers; what each compares, and how exactly, is in *_test.cc."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")


def why_not() -> str:
    """What is missing to build them; empty where nothing is."""
    missing = [tool for tool in ("make", COMPILER) if shutil.which(tool) is None]
    if missing:
        return f"the C++ tests of the kernels are not built: no {' and no '.join(missing)}"
    probe = [COMPILER, "-fsanitize=address,undefined", "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=False)
    return f"the C++ tests of the kernels are not built: {COMPILER} has no sanitizers" if done.returncode else ""


@pytest.mark.timeout(900)  # two builds, on a machine that may have other work
def test_the_kernels_under_the_sanitizers():
    """Exact, and no byte outside an array: with the AVX2 clones and without."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-s", "-j2", "sanitize"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("half: ", "index: ", "rows: "):
        assert done.stdout.count(line) == 2
