"""The CUDA sources without a GPU: they compile without a warning, spill nothing, and link into a C library."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from gpu_checks import library  # noqa: E402

ARCHITECTURES = ["80", "90"]
SOURCES = sorted((ROOT / "custom_ops").glob("*.cu"))
KERNEL_SOURCES = [source for source in SOURCES if "__global__" in source.read_text(encoding="utf-8")]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_clean(source: Path, tmp_path: Path) -> None:
    """No warning, and no kernel with a stack frame or a spill, for any architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    options = ["-std=c++17", "-O3", "-res-usage", "-c", "-o", str(tmp_path / "object.o")]
    done = subprocess.run(
        ["nvcc", *options, *targets, *strict, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert [numbers for numbers in kernels if numbers != ("0", "0", "0")] == []
    assert bool(kernels) == (source in KERNEL_SOURCES)
    assert len(kernels) % len(ARCHITECTURES) == 0


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    return library.Library(library.build(ARCHITECTURES[-1:], tmp_path_factory.mktemp("cuda")))


def test_links_a_c_library(kernels: library.Library) -> None:
    """Every function is there, and the host side answers: the workspace is about two bits a token."""
    assert kernels.workspace_size(0, 5) <= 2
    assert 1 < 8 * kernels.workspace_size(64, 1 << 17) / (64 * (1 << 17) / 4) < 1.1


def test_c_library_refuses(kernels: library.Library) -> None:
    """A CUDA error comes back as RuntimeError with its number and words: nine ids, and 2^31 tokens."""
    ids, intervals = np.arange(9), np.zeros((0, 3), np.int64)
    many = library.Query(0, "int64", 1, 1, ids, intervals, 0, 0)
    long = library.Query(0, "int64", 2, 1 << 30, ids[:2], intervals, 0, 0)
    for query in (many, long):
        with pytest.raises(RuntimeError, match="CUDA error 1: invalid argument"):
            kernels.count_visual(query, 0, 0, 0)


def test_nothing_to_do_launches_nothing(kernels: library.Library) -> None:
    """No place for a pair, no row, no feature row: success, also where no GPU could run anything."""
    query = library.Query(0, "int64", 0, 5, np.arange(1), np.zeros((0, 3), np.int64), 0, 0)
    plan = {"capacity": 0, "num_features": -1, "counts": 0, "sequence_first": False}
    kernels.write_plan(query, 0, (0, 0), **plan, stream=0)
    sizes = {"take": (0, 5, 0, 8), "add in place": (0, 5, 5, 8)}
    for operation in library.OPERATIONS:
        kernels.rows(operation, 0, (0, "float32"), (0, "bfloat16"), (0, 0, 0), sizes.get(operation, (0, 0, 5, 8)), 0)
