"""Random inputs for the kernels: layouts, tokens, pairs of rows, values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .oracle import STORAGE, Array

TOKEN_DTYPES: dict[str, np.dtype[Any]] = {
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "mask": np.dtype(np.uint8),
}


def to_table(pieces: Array) -> tuple[Array, int]:
    """Pieces [K, 2] of (start, stop), increasing, as (start, length, local start), and the local length.

    [[2, 4], [7, 8]]  ->  [[2, 2, 0], [7, 1, 2]], 3
    """
    lengths = pieces[:, 1] - pieces[:, 0]
    local_starts = np.cumsum(lengths) - lengths
    return np.stack([pieces[:, 0], lengths, local_starts], axis=1), int(lengths.sum())


def make_layout(rng: np.random.Generator, kind: str, seq_len: int) -> tuple[Array, int]:
    """The intervals [K, 3] that one rank owns, and its local length."""
    if kind == "all":
        cuts = np.array([0, seq_len])
    elif kind == "contiguous":
        cuts = np.array([seq_len // 4, seq_len // 2])
    elif kind == "zigzag":
        cuts = seq_len * np.array([1, 2, 6, 7]) // 8
    elif kind == "packed":  # many pieces of random length, some of them neighbours
        cuts = np.sort(rng.integers(0, seq_len + 1, 2 * min(200, seq_len // 2 + 1)))
    elif kind == "singles":  # every other position
        cuts = np.arange(seq_len // 2 * 2)
    else:
        assert kind == "none"
        cuts = np.zeros(0)
    pieces = cuts.astype(np.int64).reshape(-1, 2)
    return to_table(pieces[pieces[:, 0] < pieces[:, 1]])


def make_visual(rng: np.random.Generator, pattern: str, shape: tuple[int, int]) -> Array:
    """Which tokens are visual, bool [B, S]."""
    density = {"none": 0.0, "sparse": 0.002, "random": 0.5, "all": 1.0}
    if pattern != "runs":
        return np.asarray(rng.random(shape) < density[pattern])
    count = int(np.prod(shape))
    turns = rng.random(count) < 1 / 300  # a run turns to text and back every 300 tokens
    return np.asarray(np.cumsum(turns) % 2 == 0).reshape(shape)


def make_ids(rng: np.random.Generator, token_type: str, count: int) -> Array:
    """Placeholder ids; 64-bit ones differ from each other in the high half alone."""
    ids = rng.choice(100, count, replace=False).astype(np.int64) - 50
    if token_type == "int64":
        ids[count // 2 :] += 1 << 32
    return ids


def make_tokens(rng: np.random.Generator, visual: Array, token_type: str, ids: Array) -> Array:
    """Tokens [B, S] of which exactly `visual` are among the ids; text is often an id's low or high half."""
    dtype = TOKEN_DTYPES[token_type]
    if token_type == "mask":
        return visual.astype(dtype)
    text = np.concatenate([np.arange(-60, 60), ids + (1 << 32), ids - (1 << 32)]).astype(np.int64)
    text = text[~np.isin(text, ids)]
    if token_type == "int32":
        text = text[np.abs(text) < 1 << 31]
    return np.where(visual, rng.choice(ids, visual.shape), rng.choice(text, visual.shape)).astype(dtype)


def make_pairs(rng: np.random.Generator, kind: str, num_rows: int, num_features: int) -> Array:
    """Pairs int64 [2, n] of (row, feature row): feature rows increase, rows are unique."""
    n = 0 if kind == "none" else min(num_rows, num_features)
    if kind == "full":
        return np.stack([rng.permutation(num_rows)[:n], np.arange(n)])
    n = n // 2
    gather = np.sort(rng.permutation(num_features)[:n])
    if kind == "runs":
        start = int(rng.integers(0, num_rows - n + 1))
        return np.stack([np.arange(start, start + n), gather])
    pairs = np.stack([rng.permutation(num_rows)[:n], gather])
    if kind == "outside":  # rows below, above; feature rows above; then padding
        pairs[0, ::3] += np.where(rng.random(len(pairs[0, ::3])) < 0.5, -num_rows, num_rows)
        pairs = np.concatenate([pairs, [[0, 1], [num_features, num_features + 7]]], axis=1)
    if kind in ("padded", "outside"):
        pairs = np.concatenate([pairs, np.full((2, 5), -1)], axis=1)
    return np.asarray(pairs)


def make_values(rng: np.random.Generator, shape: tuple[int, int], type_name: str) -> Array:
    """Half plain numbers, half any bits at all: infinities, NaNs, subnormals, -0."""
    dtype = STORAGE[type_name]
    any_bits = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    plain = rng.standard_normal(shape) * 8
    if type_name == "bfloat16":
        stored = (plain.astype(np.float32).view(np.uint32) >> 16).astype(dtype)
    else:
        stored = plain.astype(dtype)
    values: Array = np.where(rng.random(shape) < 0.5, any_bits, stored)
    return values


@dataclass(frozen=True)
class IndexCase:
    batch: int
    seq_len: int
    layout: str = "contiguous"
    token_type: str = "int64"
    pattern: str = "runs"
    num_ids: int = 2
    capacity: str = "exact"  # or under, over, zero
    features: str = "exact"  # or fewer, more, unknown
    sequence_first: bool = True
    offset: int = 0  # of the tokens from alignment, in tokens
    counts: bool = True


@dataclass(frozen=True)
class RowsCase:
    operation: str
    hidden_type: str = "bfloat16"
    feature_type: str = "bfloat16"
    num_rows: int = 61
    num_features: int = 47
    width: int = 64
    pairs: str = "random"
    offsets: tuple[int, int] = (0, 0)  # of hidden and features from alignment, in elements


def index_cases(rng: np.random.Generator, quick: bool) -> list[IndexCase]:
    """Every kind of value at least a few times, in random company, then the large ones."""
    choices: dict[str, list[Any]] = {
        "layout": ["all", "contiguous", "zigzag", "packed", "singles", "none"],
        "token_type": list(TOKEN_DTYPES),
        "pattern": ["none", "sparse", "random", "runs", "all"],
        "num_ids": [1, 2, 8],
        "capacity": ["exact", "under", "over", "zero"],
        "features": ["exact", "fewer", "more", "unknown"],
        "sequence_first": [False, True],
        "offset": [0, 1, 3],
        "counts": [True, True, False],
    }
    lengths = [1, 2, 31, 32, 33, 100, 511, 512, 513, 4095, 4096, 4097, 9000]
    cases = [IndexCase(0, 5), IndexCase(3, 0, capacity="over"), IndexCase(0, 0, counts=False)]
    for _ in range(60 if quick else 600):
        batch, seq_len = int(rng.choice([1, 2, 3, 64])), int(rng.choice(lengths))
        drawn = {name: values[rng.integers(len(values))] for name, values in choices.items()}
        if batch * seq_len <= (20_000 if quick else 600_000):
            cases.append(IndexCase(batch, seq_len, **drawn))
    if not quick:
        for layout in ("contiguous", "zigzag", "packed"):
            cases += [IndexCase(8, 131072, layout, token_type) for token_type in TOKEN_DTYPES]
            cases.append(IndexCase(1, (1 << 20) + 5, layout, capacity="over", features="unknown"))
            cases.append(IndexCase(64, 16384, layout, "int32", sequence_first=False, offset=1))
        cases.append(IndexCase(64, 262144, "zigzag", "mask"))  # 16M tokens
    return cases


def rows_cases(quick: bool) -> list[RowsCase]:
    """All types with all operations, then shapes, pairs and misalignment for a few of them."""
    operations = ("replace", "add", "take", "zero")
    cases = [
        RowsCase(operation, hidden, feature, width=width)
        for operation in operations
        for hidden in STORAGE
        for feature in STORAGE
        for width in ((24, 7) if quick else (24, 7, 1000, 4096))
    ]
    widths = (1, 3, 40, 128, 1024, 4104) if quick else (1, 2, 3, 40, 128, 1000, 1024, 4097, 8192, 100_003, 200_000)
    for operation in operations:
        for pairs in ("runs", "random", "full", "padded", "outside", "none"):
            cases += [RowsCase(operation, width=width, pairs=pairs) for width in widths]
        for offsets in ((1, 0), (0, 1), (4, 4), (8, 8), (3, 3)):
            cases += [RowsCase(operation, width=128, offsets=offsets, feature_type=f) for f in STORAGE]
        for empty in ((0, 5, 8), (5, 0, 8), (5, 5, 0), (0, 0, 0), (1, 1, 1)):
            cases.append(RowsCase(operation, "float32", "float32", *empty))
        for shape in ((1000, 3, 2), (3, 1000, 2), (5000, 4000, 1)):
            cases.append(RowsCase(operation, "float32", "float32", *shape, pairs="padded"))
        for pairs in ("full", "padded"):  # many pairs to a strip of feature rows, and many strips
            cases.append(RowsCase(operation, num_rows=3000, num_features=2500, width=520, pairs=pairs))
        if not quick:  # more blocks of rows than a grid has in one direction
            rows, features = (300_000, 270_000) if operation == "take" else (70_000, 66_000)
            cases.append(RowsCase(operation, num_rows=rows, num_features=features, width=513, pairs="full"))
    return cases
