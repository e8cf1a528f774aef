"""Every kernel on a GPU against numpy: movement bit-exact, sums exact after one rounding. Skipped without a GPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"
NO_GPU = 2


@pytest.mark.timeout(1200)
def test_kernels_on_a_gpu() -> None:
    """tools/gpu_check.py finds no mismatch; skipped with its own words where there is nothing to run on."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: the CUDA kernels cannot be built")
    done = subprocess.run([sys.executable, str(TOOL), "--quick"], capture_output=True, text=True, check=False)
    if done.returncode == NO_GPU:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
