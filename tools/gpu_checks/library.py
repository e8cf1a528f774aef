"""The kernels as a C library: built with nvcc, called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .oracle import Array

SOURCES = Path(__file__).resolve().parents[2] / "custom_ops"
TOKEN_TYPES = {"int32": 0, "int64": 1, "mask": 2}
ELEMENT_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
OPERATIONS = {"replace": 0, "add": 1, "take": 2, "zero": 3}
MAX_INLINE_INTERVALS = 8


def build(architectures: list[str], folder: Path) -> Path:
    """Compiles the library for architectures such as "90" and returns its path."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the PATH: it builds the CUDA kernels")
    path = folder / "libvlsp_cuda.so"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    sources = [str(SOURCES / name) for name in ("index.cu", "rows.cu", "c_api.cu")]
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-Wall", "-o", str(path)]
    subprocess.run([nvcc, *options, *targets, *sources], check=True)
    return path


@dataclass(frozen=True)
class Query:
    """Tokens on the device and what is asked about them."""

    tokens: int  # address
    token_type: str
    batch: int
    seq_len: int
    ids: Array  # int64
    intervals: Array  # int64 [K, 3] on the host
    intervals_on_device: int  # address of the same table; read where K is large
    local_len: int


class Library:
    """Every call is asynchronous on its stream and raises where the launch failed."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        tokens: list[Any] = [c_void_p, c_int, c_int64, c_int64, c_void_p, c_int, c_void_p, c_int64, c_int64]
        plan: list[Any] = [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int]
        self._lib.vlsp_error_string.restype = c_char_p
        self._lib.vlsp_num_tiles.argtypes = [c_int64, c_int64]
        self._lib.vlsp_num_tiles.restype = c_int64
        self._lib.vlsp_count_tiles.argtypes = [*tokens, c_void_p, c_void_p]
        self._lib.vlsp_write_plan.argtypes = [*tokens, c_void_p, *plan, c_void_p]
        arrays: list[Any] = [c_void_p, c_int, c_void_p, c_int, c_void_p, c_void_p]
        self._lib.vlsp_rows.argtypes = [c_int, *arrays, c_int64, c_int64, c_int64, c_int64, c_void_p]

    def num_tiles(self, batch: int, seq_len: int) -> int:
        return int(self._lib.vlsp_num_tiles(batch, seq_len))

    def count_tiles(self, query: Query, tiles: int, stream: int) -> None:
        self._raise(self._lib.vlsp_count_tiles(*_arguments(query), tiles, stream))

    def write_plan(
        self,
        query: Query,
        tiles: int,
        pairs: tuple[int, int],  # addresses of update and gather
        *,
        capacity: int,
        num_features: int,
        counts: int,
        sequence_first: bool,
        stream: int,
    ) -> None:
        plan = [*pairs, capacity, num_features, counts, int(sequence_first)]
        self._raise(self._lib.vlsp_write_plan(*_arguments(query), tiles, *plan, stream))

    def rows(
        self,
        operation: str,
        hidden: tuple[int, str],  # address and element type
        features: tuple[int, str],
        pairs: tuple[int, int],
        sizes: tuple[int, int, int, int],  # pairs, rows, features, width
        stream: int,
    ) -> None:
        arrays = [hidden[0], ELEMENT_TYPES[hidden[1]], features[0], ELEMENT_TYPES[features[1]]]
        self._raise(self._lib.vlsp_rows(OPERATIONS[operation], *arrays, *pairs, *sizes, stream))

    def _raise(self, code: int) -> None:
        if code != 0:
            raise RuntimeError(f"CUDA error {code}: {self._lib.vlsp_error_string(code).decode()}")


def _arguments(query: Query) -> list[int]:
    for array in (query.ids, query.intervals):
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
    few = len(query.intervals) <= MAX_INLINE_INTERVALS
    intervals = query.intervals.ctypes.data if few else query.intervals_on_device
    tokens = [query.tokens, TOKEN_TYPES[query.token_type], query.batch, query.seq_len]
    return [*tokens, query.ids.ctypes.data, len(query.ids), intervals, len(query.intervals), query.local_len]
