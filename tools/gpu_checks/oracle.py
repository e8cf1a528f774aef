"""What the kernels must compute, in numpy, the slow obvious way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# bfloat16 is stored as its bits.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Plan:
    """The pairs, padded with -1 to the capacity, and the counts (own, all)."""

    update: Array  # int64 [capacity]
    gather: Array  # int64 [capacity]
    counts: Array  # int64 [2]


def local_positions(intervals: Array, seq_len: int) -> Array:
    """Of every global position the local one, -1 where another rank owns it.

    intervals [[2, 2, 0], [7, 1, 2]], seq_len 8  ->  [-1 -1 0 1 -1 -1 -1 2]
    """
    local = np.full(seq_len, -1, np.int64)
    for start, length, local_start in intervals.tolist():
        local[start : start + length] = np.arange(local_start, local_start + length)
    return local


def make_plan(
    visual: Array,  # bool [B, S]
    intervals: Array,
    local_len: int,
    *,
    capacity: int,
    num_features: int,
    sequence_first: bool,
) -> Plan:
    """The plan of the rank that owns the intervals."""
    local = local_positions(intervals, visual.shape[1])
    feature = visual.ravel().cumsum().reshape(visual.shape) - 1
    sample, position = np.nonzero(visual & (local >= 0))
    row = local[position] * len(visual) + sample if sequence_first else sample * local_len + local[position]
    pairs = np.stack([row, feature[sample, position]])
    own = pairs.shape[1]
    if num_features >= 0:
        pairs = pairs[:, pairs[1] < num_features]
    padded = np.full((2, capacity), -1, np.int64)
    kept = min(capacity, pairs.shape[1])
    padded[:, :kept] = pairs[:, :kept]
    return Plan(padded[0], padded[1], np.array([own, visual.sum()], np.int64))


def to_float(values: Array, type_name: str) -> Array:
    """Stored values as float32."""
    if type_name == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float(values: Array, type_name: str) -> Array:
    """float32 as stored values, rounded to nearest even."""
    if type_name != "bfloat16":
        return values.astype(STORAGE[type_name])
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def convert(values: Array, source: str, target: str) -> Array:
    """Every bit kept within one type, by way of float32 between two."""
    return values if source == target else from_float(to_float(values, source), target)


def add(a: Array, b: Array, type_name: str) -> Array:
    """The sum in float32 (float64 for float64), rounded once."""
    if type_name == "float64":
        return np.asarray(a + b)
    return from_float(to_float(a, type_name) + to_float(b, type_name), type_name)


def apply_rows(
    operation: str, hidden: Array, hidden_type: str, features: Array, feature_type: str, pairs: Array
) -> tuple[Array, Array]:
    """Hidden and features after `operation`; pairs is int64 [2, n], (update, gather)."""
    hidden, features = hidden.copy(), features.copy()
    inside = (pairs >= 0).all(0) & (pairs[0] < len(hidden)) & (pairs[1] < len(features))
    update, gather = pairs[:, inside]
    if operation == "take":
        features[:] = 0
        features[gather] = convert(hidden[update], hidden_type, feature_type)
    elif operation == "zero":
        hidden[update] = 0
    else:
        given = convert(features[gather], feature_type, hidden_type)
        hidden[update] = given if operation == "replace" else add(hidden[update], given, hidden_type)
    return hidden, features


def same_values(got: Array, want: Array, type_name: str) -> bool:
    """Equal bits; where a value was computed a NaN may be any NaN."""
    bits = np.dtype(f"u{got.dtype.itemsize}")
    equal = got.view(bits) == want.view(bits)
    if equal.all():
        return True
    got, want = to_float(got, type_name)[~equal], to_float(want, type_name)[~equal]
    return bool((np.isnan(got) & np.isnan(want)).all())
