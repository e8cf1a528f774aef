"""The kernels as a C library: built with nvcc, called through ctypes."""

import shutil
import subprocess
from collections.abc import Sequence
from ctypes import CDLL, c_char_p, c_int64
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOURCES = Path(__file__).resolve().parents[2] / "custom_ops"
TOKEN_TYPES = {"int32": 0, "int64": 1, "mask": 2}
ELEMENT_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
OPERATIONS = {"replace": 0, "add": 1, "zero": 2, "add in place": 3, "take": 4}
PLAN = ("capacity", "num_features", "counts", "sequence_first")
MAX_INLINE_INTERVALS = 8
Typed = tuple[int, str]  # an address and the element type


def build(architectures: list[str], folder: Path) -> Path:
    """Compiles the library for architectures such as "90" and returns its path."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH: it builds the CUDA kernels")
    path = folder / "libvlsp_cuda.so"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    sources = [str(SOURCES / name) for name in ("index.cu", "rows.cu", "c_api.cu")]
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-Wall", "-o", str(path), *targets, *sources]
    subprocess.run(command, check=True)
    return path


@dataclass(frozen=True)
class Query:
    """Tokens on the GPU and what is asked about them."""

    tokens: int  # address
    token_type: str
    batch: int
    seq_len: int
    ids: NDArray[np.int64]
    intervals: NDArray[np.int64]  # [K, 3] on the host
    intervals_on_device: int  # address of the same table; read where K is large
    local_len: int

    def asked(self) -> list[int]:
        return [
            self.tokens,
            TOKEN_TYPES[self.token_type],
            self.batch,
            self.seq_len,
            self.ids.ctypes.data,
            len(self.ids),
        ]

    def owned(self) -> list[int]:
        few = len(self.intervals) <= MAX_INLINE_INTERVALS
        intervals = self.intervals.ctypes.data if few else self.intervals_on_device
        return [intervals, len(self.intervals), self.local_len]


class Library:
    """Every call is asynchronous on its stream and raises where the launch failed. Pairs are two addresses."""

    def __init__(self, path: Path) -> None:
        self._lib = CDLL(str(path))
        self._lib.vlsp_error_string.restype = c_char_p
        self._lib.vlsp_workspace_size.restype = c_int64

    def workspace_size(self, batch: int, seq_len: int) -> int:
        """In numbers of 8 bytes."""
        return int(self._lib.vlsp_workspace_size(c_int64(batch), c_int64(seq_len)))

    def count_visual(self, query: Query, workspace: int, counts: int, stream: int) -> None:
        self._call("vlsp_count_visual", *query.asked(), *query.owned(), workspace, counts, stream)

    def write_plan(self, query: Query, workspace: int, pairs: tuple[int, int], *, stream: int, **plan: int) -> None:
        """`plan` is what PLAN names; `counts` is the address that count_visual wrote to."""
        sizes = (query.batch, query.seq_len, *query.owned())
        self._call("vlsp_write_plan", *sizes, workspace, *pairs, *(plan[name] for name in PLAN), stream)

    def rows(
        self,
        operation: str,
        out: int,
        hidden: Typed,
        features: Typed,
        indices: tuple[int, int, int],
        sizes: Sequence[int],
        stream: int,
    ) -> None:
        """`indices` are update, gather and the map; `sizes` the numbers of pairs, rows and features, and the width."""
        arrays = (out, hidden[0], ELEMENT_TYPES[hidden[1]], features[0], ELEMENT_TYPES[features[1]])
        self._call("vlsp_rows", OPERATIONS[operation], *arrays, *indices, *sizes, stream)

    def _call(self, function: str, *arguments: int) -> None:
        """Numbers and addresses are 64 bits wide in the library, all of them."""
        code = getattr(self._lib, function)(*map(c_int64, arguments))
        if code != 0:
            raise RuntimeError(f"CUDA error {code}: {self._lib.vlsp_error_string(code).decode()}")
