"""Every operation in plain Paddle: what the operators are tested against, and what is used where they do not load.

The row functions and `build_plan_of_any_length` also run while a graph is traced, where shapes are not numbers: sizes
come from `_size`, which then counts on the tensor's device, without a host sync or a size that depends on data.
"""

from __future__ import annotations

import functools
import operator

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.backends import host
from paddle_vl_sp.backends.copies import on_place
from paddle_vl_sp.layout import SeqLayout, length_multiple

FEW_INTERVALS = 8
NARROW = (paddle.float16, paddle.bfloat16)  # through float32 on the CPU, which lacks kernels: one rounding


def build_plan(
    tokens: Tensor,  # [B, S]
    ids: tuple[int, ...] | None,
    layout: SeqLayout,
    sequence_first: bool,
    num_features: int,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2]. Padded, it never synchronises; else once, for the number of pairs."""
    if is_on_host(tokens):
        array = tokens.numpy() if ids is None else np.from_dlpack(tokens.detach())  # no copy of ids, which are larger
        update, gather, counts = host.build_plan(array, ids, layout, sequence_first, num_features, padded)
        return _to_tensor(update, tokens), _to_tensor(gather, tokens), _to_tensor(counts, tokens)
    if padded:
        return _padded_plan(tokens, ids, layout, sequence_first, num_features)
    update, gather, counts = _padded_plan(tokens, ids, layout, sequence_first, -1)
    n = int(counts[0])
    return update[:n], gather[:n], counts


def _padded_plan(
    tokens: Tensor, ids: tuple[int, ...] | None, layout: SeqLayout, sequence_first: bool, num_features: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = tokens.shape[0] * layout.local_len
    visual = _clean_mask(tokens) if ids is None else is_any_of(tokens, ids)  # [B, S]
    feature_row = _before(visual.astype("int64").flatten(), 0).reshape(visual.shape)
    own = _own_columns(visual, layout).flatten()  # [B * S_local], reading order
    own_feature_row = _own_columns(feature_row, layout).flatten()
    row = paddle.arange(num_rows, dtype="int64")
    if sequence_first:
        row = row.reshape([layout.local_len, tokens.shape[0]]).t().flatten()
    fits = own if num_features < 0 else own & (own_feature_row < num_features)
    capacity = num_rows if num_features < 0 else min(num_rows, num_features)
    update, gather = (compact(x, fits)[:capacity] for x in (row, own_feature_row))
    return update, gather, paddle.stack([own.sum(), visual.sum()])


def joint_order(tokens: Tensor, ids: tuple[int, ...], num_image: int, num_video: int) -> tuple[Tensor, Tensor]:
    """order [num_image + num_video] into [image; video], and the counts [2] of image and video tokens."""
    is_image, is_video = (is_any_of(tokens.flatten(), (kind,)) for kind in ids)
    image_row, video_row = (_before(kind.astype("int64"), 0) for kind in (is_image, is_video))
    source = paddle.where(is_video, num_image + video_row, image_row)
    order = compact(source, is_image | is_video)
    missing = paddle.full([max(num_image + num_video - order.shape[0], 0)], -1, "int64")
    counts = paddle.stack([is_image.sum(), is_video.sum()])
    return paddle.concat([order, missing])[: num_image + num_video], counts


def joint_rows(image: Tensor, video: Tensor, order: Tensor) -> Tensor:
    """The rows `order` of [image; video]."""
    both = paddle.concat([_computable(image), _computable(video.astype(image.dtype))])
    return paddle.gather(both, order).astype(image.dtype)


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] = features[gather], on a copy; pairs with -1, or with an index past the end, are skipped.

    A skipped pair moves a spare row to a spare row, at the end of either table.
    """
    rows, picked = _tables(hidden, features)
    moved = _to_move_on_host(rows, picked, update, gather)
    if moved is not None:
        return _as_hidden(paddle.scatter(rows, *moved), hidden)
    spare = paddle.zeros([1, hidden.shape[-1]], dtype=rows.dtype)
    height, feature_height = _size(rows), _size(picked)
    fits = (update >= 0) & (update < height) & (gather >= 0) & (gather < feature_height)
    at, source = (
        paddle.concat([paddle.where(fits, index, index * 0 + end), _as_index(end)])  # a pair more: kernels refuse none
        for index, end in ((update, height), (gather, feature_height))
    )
    picked = paddle.gather(paddle.concat([picked, spare]), source)
    rows = paddle.scatter(paddle.concat([rows, spare]), at, picked)[:-1]
    return _as_hidden(rows, hidden)


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather], on a copy; pairs with -1, or with an index past the end, are skipped.

    A skipped pair adds -0.0 to row 0, which changes nothing, not even the sign of a zero.
    """
    rows, picked = _tables(hidden, features)
    moved = _to_move_on_host(rows, picked, update, gather)
    if moved is not None:
        at, picked = moved
        return _as_hidden(paddle.index_add(rows, at, 0, picked), hidden)
    fits = (update >= 0) & (update < _size(rows)) & (gather >= 0) & (gather < _size(picked))
    number = fits.astype("int64")
    at, source = _with_spare(update * number, 0), _with_spare((gather + 1) * number, 0)  # as above
    nothing = paddle.zeros([1, hidden.shape[-1]], dtype=rows.dtype)
    nothing = nothing * paddle.full_like(nothing, -1)  # a constant -0.0 would be saved as 0.0
    rows = paddle.index_add(rows, at, 0, paddle.gather(paddle.concat([nothing, picked]), source))
    return _as_hidden(rows, hidden)


def build_plan_of_any_length(
    tokens: Tensor,  # [B, S], neither of them 0
    table: Tensor | None,  # int64 [K, 3]: the rank's intervals of a packed row (B = 1); None: those of the rule
    ids: tuple[int, ...] | None,
    rule: SeqLayout,
    sequence_first: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2] for tokens of any length: the rule's own seq_len is not used."""
    tokens = check_length(tokens, rule)
    owned = owned_intervals(_length(tokens), rule) if table is None else table
    visual = (_clean_mask(tokens) if ids is None else is_any_of(tokens, ids)).astype("int64")  # [B, S]
    local, is_owned = _local_positions(tokens, owned)  # [1, S]
    row = _rows(tokens, local, owned[:, 1].sum(), sequence_first)
    feature_row = _before(visual.sum(axis=1, keepdim=True), 0) + _before(visual, 1)
    own = visual.astype("bool") & is_owned
    counts = paddle.stack([own.astype("int64").sum(), visual.sum()])
    if not padded:
        return paddle.masked_select(row, own), paddle.masked_select(feature_row, own), counts
    num_rows = owned[:, 1].sum() * _length(tokens.t())
    update, gather = (_first_rows(compact(x.flatten(), own.flatten()), num_rows, rule) for x in (row, feature_row))
    return update, gather, counts


def check_length(tokens: Tensor, rule: SeqLayout) -> Tensor:
    """The tokens, by way of a reshape that raises where their length is not a multiple of what the rule needs.

    An assertion would fetch its condition from the device, and the inference predictor removes it as dead code; an
    error in a custom operator ends the process of a loaded program instead of reaching Python.
    """
    multiple = length_multiple(
        cp_size=rule.cp_size, cp_mode=rule.cp_mode, sp_size=rule.sp_size, remainder=rule.remainder
    )
    return tokens if multiple == 1 else tokens.reshape([0, multiple, -1]).flatten(1)


def first_of_even_shares(indices: Tensor, rule: SeqLayout) -> Tensor:
    """The first B * S_local of B * S padded indices, where all ranks own equally much: a reshape needs no number."""
    return indices.reshape([rule.cp_size * rule.sp_size, -1])[0]


def owned_intervals(length: Tensor, rule: SeqLayout) -> Tensor:
    """A rank's intervals of a sequence, as (start, length, local start): int64 [1 or 2, 3], some may be empty.

    Rank 0 of cp_size=2, zigzag, length 8 owns [0 1 6 7]  ->  [[0 2 0] [6 2 2]]
    """
    if rule.cp_mode == "zigzag" and rule.cp_size > 1:
        chunk = length // (2 * rule.cp_size)
        late = 2 * rule.cp_size - 1 - rule.cp_rank
        pieces = [(chunk * rule.cp_rank, chunk), (chunk * late, chunk)]
        row_length = chunk * 2
    else:
        begin, end = _share(length, rule.cp_size, rule.cp_rank)
        pieces, row_length = [(begin, end - begin)], end - begin
    share_begin, share_end = _share(row_length, rule.sp_size, rule.sp_rank)
    table = []
    row = paddle.zeros_like(length)  # where the piece begins in the cp rank's row
    for start, size in pieces:
        low, high = (paddle.minimum(paddle.maximum(x, row), row + size) for x in (share_begin, share_end))
        table.append(paddle.concat([start + low - row, high - low, low - share_begin]))
        row = row + size
    return paddle.stack(table)


def is_any_of(tokens: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Where tokens equal one of the ids: bool, the shape of tokens. No token equals an id beyond its type."""
    limits = paddle.iinfo(tokens.dtype)  # Paddle would wrap such an id
    possible = [wanted for wanted in ids if limits.min <= wanted <= limits.max]
    if not possible:
        return paddle.zeros_like(tokens, dtype="bool")
    return functools.reduce(operator.or_, (tokens == wanted for wanted in possible))


def _clean_mask(mask: Tensor) -> Tensor:
    """The mask in bytes of 0 and 1: sums add bytes, and a mask that was made by a view may hold others."""
    return mask.astype("int32") != 0


def compact(values: Tensor, keep: Tensor) -> Tensor:
    """The kept values in order, filled up with -1 to the same length; values and keep are 1-D.

    values [10 11 12 13], keep [0 1 0 1]  ->  [11 13 -1 -1]
    """
    number = keep.astype("int64")
    place = _with_spare(paddle.cumsum(number) * number, 0)  # other values go to a spare place in front
    values = _with_spare(values, -1)
    return paddle.scatter(paddle.full_like(values, -1), place, values)[1:]


def _to_move_on_host(rows: Tensor, table: Tensor, update: Tensor, gather: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where features go, and the features [n, H]; None where the host sees no pairs, or none to move.

    Without skipped pairs neither table needs a spare row, which costs a copy of the table and of its gradient.
    """
    if not is_on_host(update):
        return None
    at, source = update.numpy(), gather.numpy()
    kept = host.pairs_to_move(at, source, rows.shape[0], table.shape[0])
    if kept is not None:
        if not kept.size:
            return None
        at, source = at[kept], source[kept]
        update, gather = _to_tensor(at, update), _to_tensor(source, update)
    return update, table if host.is_all(source, table.shape[0]) else paddle.gather(table, gather)


def _to_tensor(array: npt.NDArray[np.int64], like: Tensor) -> Tensor:
    return paddle.to_tensor(array, place=like.place)


def is_on_host(x: Tensor) -> bool:
    """Whether the host reads x at no cost: on a device it would wait, and in a traced graph there is no value."""
    return paddle.in_dynamic_mode() and bool(x.place.is_cpu_place())


def _size(table: Tensor) -> int | Tensor:
    """How many rows [rows, H] has: a number or, while a graph is traced, a tensor counted along the first column.

    The column is not sliced off: oneDNN's slice, which the inference predictor uses for floats, has crashed here.
    """
    if paddle.in_dynamic_mode():
        return table.shape[0]
    column = paddle.index_select(table, paddle.zeros([1], dtype="int64"), axis=1)
    return paddle.ones_like(column, dtype="int64").sum()


def _as_index(size: int | Tensor) -> Tensor:
    return paddle.full([1], size, "int64") if isinstance(size, int) else size.reshape([1])


def _tables(hidden: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """hidden as [rows, H] and the features, both in the dtype to compute in."""
    features = features.astype(hidden.dtype)
    if paddle.in_dynamic_mode():
        return _computable(hidden).flatten(0, -2), _computable(features)
    wide = "float32" if hidden.dtype in NARROW else hidden.dtype  # a graph may run on the CPU
    return hidden.astype(wide).flatten(0, -2), features.astype(wide)


def _as_hidden(rows: Tensor, hidden: Tensor) -> Tensor:
    return rows.astype(hidden.dtype).reshape(hidden.shape if paddle.in_dynamic_mode() else paddle.shape(hidden))


def _computable(x: Tensor) -> Tensor:
    """x, as float32 where the CPU has no kernels for its 16-bit dtype: exact for movement, one rounding for a sum."""
    return x.astype("float32") if x.place.is_cpu_place() and x.dtype in NARROW else x


def _own_columns(x: Tensor, layout: SeqLayout) -> Tensor:
    """The columns of x [B, S] that the layout's rank owns, [B, S_local]."""
    intervals = layout.intervals().tolist()
    if 0 < len(intervals) <= FEW_INTERVALS:
        return paddle.concat([x[:, start : start + length] for start, length in intervals], axis=1)
    positions = layout.positions()
    on_device = on_place(positions, x.place) if paddle.in_dynamic_mode() else paddle.to_tensor(positions)
    return paddle.index_select(x, on_device, axis=1)


def _share(length: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Begin and end of a rank's share; what does not divide goes to the first ranks."""
    quotient = length // size
    rest = length - quotient * size
    begin, end = (quotient * at + paddle.minimum(rest, paddle.full_like(rest, at)) for at in (rank, rank + 1))
    return begin, end


def _length(tokens: Tensor) -> Tensor:
    """S of tokens [B, S], counted on their device: int64 [1]."""
    return paddle.ones_like(tokens[:1], dtype="int64").sum().reshape([1])


def _local_positions(tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The local position of every global one, and whether this rank owns it, both [1, S].

    table [[0 2 0] [6 2 2]]  ->  local [0 1 . . . . 2 3], owned [1 1 0 0 0 0 1 1]
    """
    position = _before(paddle.ones_like(tokens[:1], dtype="int64"), 1)
    start, size, local_start = (table[:, column] for column in range(3))
    nearest = paddle.searchsorted(start, position.flatten(), right=True) - 1  # -1 before the first
    nearest = paddle.maximum(nearest, paddle.zeros_like(nearest))
    offset = position - paddle.gather(start, nearest)
    owned = (offset >= 0) & (offset < paddle.gather(size, nearest))
    return offset + paddle.gather(local_start, nearest), owned


def _rows(tokens: Tensor, local: Tensor, local_len: Tensor, sequence_first: bool) -> Tensor:
    """The row of every (sample, local position), [B, S]."""
    sample = _before(paddle.ones_like(tokens[:, :1], dtype="int64"), 0)  # [B, 1]
    if sequence_first:
        return local * _length(tokens.t()) + sample
    return sample * local_len + local


def _before(number: Tensor, axis: int) -> Tensor:
    """The sum of the numbers before each one.  [1 0 2 1] -> [0 1 1 3]"""
    return paddle.cumsum(number, axis=axis) - number


def _first_rows(indices: Tensor, num_rows: Tensor, rule: SeqLayout) -> Tensor:
    """The first B * S_local of B * S padded indices."""
    return first_of_even_shares(indices, rule) if rule.remainder == "error" else indices[:num_rows]


def _with_spare(index: Tensor, value: int) -> Tensor:
    return paddle.concat([paddle.full([1], value, dtype="int64"), index])
