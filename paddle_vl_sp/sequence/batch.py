"""A batch's arrays, cut by the layout that cuts the hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.autograd import via_float32
from paddle_vl_sp.comm.resident import Resident
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.sequence.padding import checked_bounds, source_positions

IGNORE = -100  # the label of a position without one
LABELS = "labels"
Array: TypeAlias = "Tensor | npt.NDArray[Any]"

# The arrays whose last axis is the sequence (position_ids may be mRoPE's [3, B, S]), and their padding values.
PADDING: dict[str, float] = {
    "input_ids": 0,
    LABELS: IGNORE,
    "position_ids": 0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "loss_mask": 0,
    "loss_weights": 0,
}
WITH_LABELS = (LABELS, "loss_mask", "loss_weights")  # belong to the label at their position: shifted with it
# The arrays without a sequence axis: every rank gets them whole.
WHOLE = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


def shard_batch(
    batch: Mapping[str, Any],
    layout: SeqLayout,
    *,
    cu_seqlens: Sequence[int] | None = None,
    shift_labels: bool = False,
    padding: Mapping[str, float] | None = None,
    whole: Sequence[str] = (),
) -> dict[str, Any]:
    """This rank's share of every array of the batch, numpy or Paddle.

    layout         for the padded sequence: `padded_layout` makes one
    cu_seqlens     the boundaries in the batch, before padding; None: the layout's own, where nothing is padded
    shift_labels   False: the data set has shifted the labels. True: labels[i + 1] moves to i, before the cut and within
                   each segment, whose last position is ignored; loss_mask and loss_weights are shifted with the labels
    padding        further arrays to cut along their last axis, {name: padding value}; or another value for a known one
    whole          further arrays that have no sequence axis, or known ones that must not be cut

    Segments of 3 and 2, zigzag over 2 ranks, padded to 4 and 4 (. is padding); the result on rank 1::

        input_ids  a b c | d e     ->   a b c . | d e . .     ->    b c | e .

    >>> layout = padded_layout(5, cu_seqlens=(0, 3, 5), cp_size=2, cp_rank=1)
    >>> shard_batch({"input_ids": np.array([[1, 2, 3, 4, 5]])}, layout, cu_seqlens=(0, 3, 5))["input_ids"].tolist()
    [[2, 3, 5, 0]]
    """
    fill = {name: value for name, value in {**PADDING, **(padding or {})}.items() if name not in whole}
    _check_names(batch, fill, whole)
    lengths = {name: int(x.shape[-1]) for name, x in batch.items() if name in fill and x is not None}
    real = _real_bounds(lengths, layout, cu_seqlens)
    sources = [_sources(tuple(real.tolist()), layout, shifted) for shifted in (False, shift_labels)]
    share = dict(batch)
    for name in lengths:
        share[name] = _gather_or_fill(batch[name], sources[name in WITH_LABELS], fill[name])
    return share


def pad_batch(
    batch: Mapping[str, Any],
    layout: SeqLayout,
    *,
    cu_seqlens: Sequence[int] | None = None,
    shift_labels: bool = False,
    padding: Mapping[str, float] | None = None,
    whole: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole batch, padded as the layout needs it, the same on every rank; the arguments are those of `shard_batch`.

    `plan_visual` takes its ids [B, S]. `shard_batch(pad_batch(batch, layout, cu_seqlens=bounds), layout)` is
    `shard_batch(batch, layout, cu_seqlens=bounds)`.

    >>> layout = padded_layout(5, cu_seqlens=(0, 3, 5), cp_size=2)
    >>> pad_batch({"input_ids": np.array([[1, 2, 3, 4, 5]])}, layout, cu_seqlens=(0, 3, 5))["input_ids"].tolist()
    [[1, 2, 3, 0, 4, 5, 0, 0]]
    """
    uncut = SeqLayout(layout.seq_len, cu_seqlens=layout.cu_seqlens)
    return shard_batch(batch, uncut, cu_seqlens=cu_seqlens, shift_labels=shift_labels, padding=padding, whole=whole)


class _Sources(NamedTuple):
    """For each of this rank's positions its position in the batch's arrays (0 where it is padding)."""

    positions: Resident  # int64 [S_local]
    padded: Resident  # bool [S_local]


@lru_cache(maxsize=16)
def _sources(real: tuple[int, ...], layout: SeqLayout, shifted: bool) -> _Sources:
    """Of the labels, where they are shifted: of the next position in the segment."""
    bounds = np.asarray(real, dtype=np.int64)
    source = source_positions(bounds, layout)[layout.positions()]
    source = _next_in_segment(bounds, source) if shifted else source
    return _Sources(Resident(np.maximum(source, 0)), Resident(source < 0))


def _gather_or_fill(x: Array, sources: _Sources, fill: float) -> Array:
    """x [..., S] at the source positions of its last axis, `fill` where there is none: [..., S_local]"""
    positions, padded = sources
    if isinstance(x, np.ndarray):
        gathered = x[..., positions.array]
        gathered[..., padded.array] = fill
        return gathered
    if not positions.array.size:
        return x.new_empty([*x.shape[:-1], 0])
    return via_float32(lambda y: _gather_or_fill_tensor(y, sources, fill), x)


def _gather_or_fill_tensor(x: Tensor, sources: _Sources, fill: float) -> Tensor:
    gathered = paddle.gather(x, sources.positions.on(x.place), axis=len(x.shape) - 1)
    if not sources.padded.array.any():
        return gathered
    mask = sources.padded.on(x.place).expand(gathered.shape)
    return paddle.where(mask, x.new_full(gathered.shape, fill), gathered)


def _next_in_segment(real: npt.NDArray[np.int64], source: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The position after each, -1 after the last of a segment and for padding."""
    following = source + 1
    return np.where((source < 0) | np.isin(following, real), -1, following)


def _real_bounds(
    lengths: Mapping[str, int], layout: SeqLayout, cu_seqlens: Sequence[int] | None
) -> npt.NDArray[np.int64]:
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the arrays of the batch must have one sequence length, got {dict(lengths)}")
    length = next(iter(lengths.values()), layout.seq_len)
    if cu_seqlens is None:
        cu_seqlens = (0, length) if layout.cu_seqlens is None else layout.cu_seqlens
    bounds = checked_bounds(cu_seqlens, layout)
    if bounds[-1] != length:
        raise ValueError(
            f"cu_seqlens ends at {bounds[-1]}, but the arrays are {length} long: pass the boundaries before padding "
            "(the layout has those after it)"
        )
    return bounds


def _check_names(batch: Mapping[str, Any], fill: Mapping[str, float], whole: Sequence[str]) -> None:
    for name, x in batch.items():
        if name in fill and x is not None and not _is_array(x):
            raise ValueError(
                f"{name!r} is a {type(x).__name__}, which is not cut: make it an array or a tensor whose last axis is "
                "the sequence, or name it in whole="
            )
        if not _is_array(x) or name in WHOLE or name in whole:
            continue
        if name not in fill:
            raise ValueError(
                f"shard_batch does not know {name!r} {list(x.shape)}: name it in whole= if it has no sequence axis, or "
                "in padding= to cut it along its last axis"
            )
        if name == "attention_mask" and len(x.shape) > 2:
            raise ValueError(
                f"attention_mask {list(x.shape)} cannot be cut, only [B, S] can: leave it out, the layout's segments "
                "and causal= say which keys a query sees"
            )


def _is_array(x: object) -> TypeGuard[Array]:
    return isinstance(x, (np.ndarray, Tensor))
