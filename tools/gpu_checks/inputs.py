"""Random inputs for the kernels and the cases to check: layouts, tokens, pairs of rows, values."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .library import ELEMENT_TYPES, OPERATIONS, TOKEN_TYPES

Array = NDArray[Any]
Random = np.random.Generator
Case = SimpleNamespace

# What a case can be; the first of each is the default.
INDEX: dict[str, list[Any]] = {
    "batch": [1, 2, 3, 64],
    "seq_len": [1, 2, 31, 32, 33, 100, 511, 512, 513, 4095, 4096, 4097, 9000],
    "layout": ["contiguous", "all", "zigzag", "packed", "singles", "none"],
    "token_type": ["int64", "int32", "mask"],
    "pattern": ["runs", "none", "sparse", "random", "all"],
    "num_ids": [2, 1, 8],
    "capacity": ["exact", "under", "over", "zero"],  # also rows: one place a row
    "features": ["exact", "fewer", "more", "unknown"],
    "sequence_first": [True, False],
    "offset": [0, 1, 3],  # of the tokens from alignment, in tokens
}
ROWS: dict[str, list[Any]] = {
    "operation": list(OPERATIONS),
    "types": list(itertools.product(ELEMENT_TYPES, repeat=2)),  # of hidden and features
    "sizes": [(61, 47), (61, 47), (61, 47), (0, 5), (5, 0), (0, 0), (1, 1), (1000, 3), (3, 1000), (5000, 4000)],
    "width": [64, 0, 1, 2, 3, 7, 12, 24, 40, 128, 128, 1000, 1002, 1004, 1024, 4096, 4097, 4104, 8192],
    "pairs": ["random", "runs", "full", "padded", "outside", "none"],
    "offsets": [(0, 0), (0, 0), (1, 0), (0, 1), (4, 4), (8, 8), (3, 3)],  # from alignment, in elements
}


def make_case(choices: dict[str, list[Any]], rng: Random | None = None, **given: Any) -> Case:
    """What is given, and of the rest the default or a random choice."""
    drawn = {name: values[0 if rng is None else rng.integers(len(values))] for name, values in choices.items()}
    return Case(**drawn | given)


def draw_pieces(rng: Random, layout: str, seq_len: int) -> Array:
    """The global positions that one rank owns, int64 [K, 2] of (start, stop), increasing, none empty."""
    cuts = {
        "none": [],
        "all": [0, seq_len],
        "contiguous": [seq_len // 4, seq_len // 2],
        "zigzag": [seq_len * eighth // 8 for eighth in (1, 2, 6, 7)],
        "singles": range(seq_len // 2 * 2),  # every other position
        "packed": np.sort(rng.integers(0, seq_len + 1, 2 * min(200, seq_len // 2 + 1))),  # of random length
    }
    pieces = np.array(cuts[layout], np.int64).reshape(-1, 2)
    return pieces[pieces[:, 0] < pieces[:, 1]]


def draw_visual(rng: Random, pattern: str, shape: tuple[int, int]) -> Array:
    """Which tokens are visual, bool [B, S]."""
    if pattern == "runs":  # text turns to visual and back every 300 tokens
        return (np.cumsum(rng.random(shape[0] * shape[1]) < 1 / 300) % 2 == 0).reshape(shape)
    return rng.random(shape) < {"none": 0.0, "sparse": 0.002, "random": 0.5, "all": 1.0}[pattern]


def draw_tokens(rng: Random, visual: Array, token_type: str, num_ids: int) -> tuple[Tensor, Array]:
    """Tokens [B, S] and the ids that exactly `visual` are among; text is often an id's low or high half."""
    ids = np.arange(num_ids) * 7 - 7  # 0 is one of them: what a kernel makes of places behind the last token
    if token_type == "mask":
        return torch.from_numpy(visual.astype(np.uint8)), ids
    if token_type == "int64":
        ids[num_ids // 2 :] += 1 << 32
    text = np.concatenate([np.arange(-60, 60), ids + (1 << 32), ids - (1 << 32)])
    text = text[~np.isin(text, ids) & ((token_type == "int64") | (np.abs(text) < 1 << 31))]
    tokens = np.where(visual, rng.choice(ids, visual.shape), rng.choice(text, visual.shape))
    return torch.from_numpy(tokens.astype(token_type)), ids


def draw_pairs(rng: Random, kind: str, num_rows: int, num_features: int) -> Tensor:
    """Pairs int64 [2, n] of (row, feature row): feature rows increase, rows are unique."""
    n = 0 if kind == "none" else min(num_rows, num_features) // (1 if kind == "full" else 2)
    pairs = np.stack([rng.permutation(num_rows)[:n], np.sort(rng.permutation(num_features)[:n])])
    if kind == "runs":
        pairs[0] = np.arange(n) + rng.integers(0, num_rows - n + 1)
    if kind == "outside":  # rows below, above; feature rows above; then padding
        pairs[0, ::3] += rng.choice([-num_rows, num_rows], len(pairs[0, ::3]))
        pairs = np.concatenate([pairs, [[0, 1], [num_features, num_features + 7]]], axis=1)
    if kind in ("padded", "outside"):
        pairs = np.concatenate([pairs, np.full((2, 5), -1)], axis=1)
    return torch.from_numpy(pairs)


def draw_values(rng: Random, rows: int, width: int, type_name: str) -> Tensor:
    """[rows, width], half plain numbers, half any bits at all: infinities, NaNs, subnormals; one in ten is 0 or -0."""
    dtype = getattr(torch, type_name)
    if rows * width == 0:
        return torch.zeros((rows, width), dtype=dtype)
    any_bits = torch.from_numpy(rng.integers(0, 256, rows * width * dtype.itemsize, np.uint8)).view(dtype)
    plain = torch.from_numpy(rng.standard_normal((rows, width)) * 8).to(dtype)
    zeros = torch.from_numpy(rng.choice([0.0, -0.0], (rows, width))).to(dtype)
    plain = torch.where(torch.from_numpy(rng.random((rows, width)) < 0.2), zeros, plain)
    return torch.where(torch.from_numpy(rng.random((rows, width)) < 0.5), any_bits.reshape(rows, width), plain)


def index_cases(rng: Random, quick: bool) -> list[Case]:
    """Every kind of value at least a few times, in random company, then the large ones."""
    cases = [make_case(INDEX, rng) for _ in range(60 if quick else 600)]
    cases = [case for case in cases if case.batch * case.seq_len <= (20_000 if quick else 600_000)]
    cases += [make_case(INDEX, batch=batch, seq_len=seq_len, capacity="over") for batch, seq_len in ((0, 5), (3, 0))]
    cases.append(make_case(INDEX, seq_len=150_001, token_type="mask", layout="all"))  # more tiles than one warp adds up
    if quick:
        return cases
    for layout in ("contiguous", "zigzag", "packed"):
        cases += [make_case(INDEX, batch=8, seq_len=131072, layout=layout, token_type=name) for name in TOKEN_TYPES]
        cases.append(make_case(INDEX, seq_len=(1 << 20) + 5, layout=layout, capacity="over", features="unknown"))
        sizes = {"batch": 64, "seq_len": 16384, "offset": 1}
        cases.append(make_case(INDEX, layout=layout, token_type="int32", sequence_first=False, **sizes))
    return [*cases, make_case(INDEX, batch=64, seq_len=262144, layout="zigzag", token_type="mask")]  # 16M tokens


def rows_cases(rng: Random, quick: bool) -> list[Case]:
    """All operations with all types, the rest in random company, then the large ones."""
    kinds = itertools.product(OPERATIONS, ROWS["types"], range(6 if quick else 24))
    cases = [make_case(ROWS, rng, operation=operation, types=types) for operation, types, _ in kinds]
    cases = [case for case in cases if sum(case.sizes) * case.width <= (500_000 if quick else 4_000_000)]
    bf16 = {"types": ("bfloat16", "bfloat16")}
    for operation in OPERATIONS:  # many pairs to a strip of feature rows, and many strips
        sizes = {"sizes": (3000, 2500), "width": 520}
        cases += [make_case(ROWS, operation=operation, pairs=pairs, **sizes, **bf16) for pairs in ("full", "padded")]
        if not quick:  # wide rows, and more blocks of rows than a grid has in one direction
            cases += [make_case(ROWS, operation=operation, width=width, **bf16) for width in (100_003, 200_000)]
            sizes = {"sizes": (300_000, 270_000) if operation == "take" else (70_000, 66_000), "width": 513}
            cases.append(make_case(ROWS, operation=operation, pairs="full", **sizes, **bf16))
    return cases
