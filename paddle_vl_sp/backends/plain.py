"""Every operation in plain Paddle: what the custom ops must equal, and what serves where they cannot be loaded."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import paddle
from paddle import Tensor

from paddle_vl_sp.layout import SeqLayout

FEW_INTERVALS = 8


def build_plan(
    tokens: Tensor,  # [B, S]
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2]. Padded, it never waits for a device; else it does, once, for their size."""
    num_rows = tokens.shape[0] * layout.local_len
    if not padded:
        update, gather, counts = build_plan(tokens, ids, layout, sequence_first, -1, padded=True)
        n = int(counts[0])
        return update[:n], gather[:n], counts
    capacity = num_rows if num_features < 0 else min(num_rows, num_features)
    visual = tokens if ids is None else is_any_of(tokens, ids)  # [B, S]
    feature_row = paddle.cumsum(visual.astype("int64").flatten()).reshape(visual.shape) - 1
    own = _owned(visual, layout).flatten()  # [B * S_local], reading order
    own_feature_row = _owned(feature_row, layout).flatten()
    row = paddle.arange(num_rows, dtype="int64")
    if sequence_first:
        row = row.reshape([layout.local_len, tokens.shape[0]]).t().flatten()
    fits = own if num_features < 0 else own & (own_feature_row < num_features)
    update, gather = compacted([row, own_feature_row], fits, capacity)
    return update, gather, paddle.stack([own.sum(), visual.sum()])


def joint_order(tokens: Tensor, ids: tuple[int, ...], num_image: int, num_video: int) -> tuple[Tensor, Tensor]:
    """order [num_image + num_video] into [image; video], and the counts [2] of image and video tokens."""
    is_image, is_video = (tokens.flatten() == kind for kind in ids)
    image_row, video_row = (paddle.cumsum(kind.astype("int64")) - 1 for kind in (is_image, is_video))
    source = paddle.where(is_video, num_image + video_row, image_row)
    (order,) = compacted([source], is_image | is_video, num_image + num_video)
    return order, paddle.stack([is_image.sum(), is_video.sum()])


def joint_rows(image: Tensor, video: Tensor, order: Tensor) -> Tensor:
    """The rows `order` of [image; video]."""
    both = paddle.concat([_computable(image), _computable(video.astype(image.dtype))])
    return paddle.gather(both, order).astype(image.dtype)


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] = features[gather], on a copy; -1 is skipped."""
    return _through_spare_row(hidden, features, update, gather, paddle.scatter)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather], on a copy; -1 is skipped."""
    return _through_spare_row(
        hidden, features, update, gather, lambda rows, at, picked: paddle.index_add(rows, at, 0, picked)
    )


def _through_spare_row(
    hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor, write: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """Writes through a table with one row more, which takes the pairs that are to be skipped."""
    width = hidden.shape[-1]
    rows, features = _computable(hidden.reshape([-1, width])), _computable(features.astype(hidden.dtype))
    spare = paddle.zeros([1, width], dtype=rows.dtype)
    num_rows, num_features = rows.shape[0], features.shape[0]
    used = (update >= 0) & (update < num_rows) & (gather >= 0) & (gather < num_features)
    at = paddle.where(used, update, paddle.full_like(update, num_rows))
    source = paddle.where(used, gather, paddle.full_like(gather, num_features))
    # the spare pair keeps the index arrays from being empty, which some kernels refuse
    at, source = (paddle.concat([x, paddle.full([1], n, "int64")]) for x, n in ((at, num_rows), (source, num_features)))
    picked = paddle.gather(paddle.concat([features, spare]), source)
    written = write(paddle.concat([rows, spare]), at, picked)
    return written[:num_rows].astype(hidden.dtype).reshape(hidden.shape)


def _computable(x: Tensor) -> Tensor:
    """x, in float32 where the CPU has no kernels for its 16-bit type: exact for movement, one rounding for a sum."""
    return x.astype("float32") if x.place.is_cpu_place() and x.element_size() == 2 else x


def is_any_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Where tokens equal one of the ids: bool, the shape of tokens."""
    return functools.reduce(operator.or_, (tokens == wanted for wanted in ids))


def compacted(values: list[Tensor], keep: Tensor, capacity: int) -> list[Tensor]:
    """The kept values in order, each padded with -1 to [capacity].

    values [10 11 12 13], keep [0 1 0 1], capacity 3  ->  [11 13 -1]
    """
    place = paddle.cumsum(keep.astype("int64")) - 1
    place = paddle.where(keep & (place < capacity), place, paddle.full_like(place, capacity))
    empty = paddle.full([capacity + 1], -1, dtype="int64")
    if keep.shape[0] == 0:
        return [empty[:capacity] for _ in values]
    return [paddle.scatter(empty, place, value)[:capacity] for value in values]


def _owned(x: Tensor, layout: SeqLayout) -> Tensor:
    """The columns of x [B, S] that the layout's rank owns, [B, S_local]."""
    intervals = layout.intervals().tolist()
    if 0 < len(intervals) <= FEW_INTERVALS:
        return paddle.concat([x[:, start : start + length] for start, length in intervals], axis=1)
    positions = paddle.to_tensor(layout.positions(), place=paddle.CPUPlace())
    if paddle.in_dynamic_mode():
        positions = positions.to(x.place, blocking=False)
    return paddle.index_select(x, positions, axis=1)
