"""The operations of `reference` for graphs whose shapes are known only at run time: plain Paddle, equal bit for bit.

No tensor is asked for its shape as a number: lengths are counted where the tensors live, so that the padded form
neither waits for a device nor takes a size from data.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from paddle_vl_sp.backends.plain import is_any_of
from paddle_vl_sp.layout import SeqLayout, length_multiple

NARROW = (paddle.float16, paddle.bfloat16)  # through float32, one rounding: the CPU has not the kernels


def build_plan(
    tokens: Tensor,  # [B, S], neither of them 0
    table: Tensor | None,  # int64 [K, 3], what is owned of a packed row (B = 1); else the rule says it
    ids: tuple[int, ...] | None,
    rule: SeqLayout,
    sequence_first: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """update, gather and counts [2] for the length of the tokens; that of the rule is not looked at."""
    tokens = of_fitting_length(tokens, rule)
    owned = owned_intervals(_length(tokens), rule) if table is None else table
    visual = (tokens if ids is None else is_any_of(tokens, ids)).astype("int64")  # [B, S]
    local, is_owned = _local_positions(tokens, owned)  # [1, S]
    row = _rows(tokens, local, owned[:, 1].sum(), sequence_first)
    feature_row = _before(visual.sum(axis=1, keepdim=True), 0) + _before(visual, 1)
    own = visual.astype("bool") & is_owned
    counts = paddle.stack([own.astype("int64").sum(), visual.sum()])
    if not padded:
        return paddle.masked_select(row, own), paddle.masked_select(feature_row, own), counts
    num_rows = owned[:, 1].sum() * _length(tokens.t())
    update, gather = (_first_rows(_compacted(x, own), num_rows, rule) for x in (row, feature_row))
    return update, gather, counts


def of_fitting_length(tokens: Tensor, rule: SeqLayout) -> Tensor:
    """The tokens, through a reshape that raises where their length does not divide by what the rule needs.

    An assertion would fetch its condition from the device, and the inference predictor drops it as dead code; an
    error in a custom operator ends the process of a loaded program instead of reaching Python.
    """
    multiple = length_multiple(
        cp_size=rule.cp_size, cp_mode=rule.cp_mode, sp_size=rule.sp_size, remainder=rule.remainder
    )
    return tokens if multiple == 1 else tokens.reshape([0, multiple, -1]).flatten(1)


def of_even_shares(indices: Tensor, rule: SeqLayout) -> Tensor:
    """The first B * S_local of B * S padded places, by a reshape, where all ranks own equally much."""
    return indices.reshape([rule.cp_size * rule.sp_size, -1])[0]


def owned_intervals(length: Tensor, rule: SeqLayout) -> Tensor:
    """(start, length, local start) of what a rank owns of a sequence, int64 [1 or 2, 3]; empty ones stay.

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
    row = paddle.zeros_like(length)  # where the piece begins in the row that cp left
    for start, size in pieces:
        low, high = (paddle.minimum(paddle.maximum(x, row), row + size) for x in (share_begin, share_end))
        table.append(paddle.concat([start + low - row, high - low, low - share_begin]))
        row = row + size
    return paddle.stack(table)


def _share(length: Tensor, size: int, rank: int) -> tuple[Tensor, Tensor]:
    """Begin and end of a rank's share; undivided rests go to the first shares."""
    quotient = length // size
    rest = length - quotient * size
    begin, end = (quotient * at + paddle.minimum(rest, paddle.full_like(rest, at)) for at in (rank, rank + 1))
    return begin, end


def _length(tokens: Tensor) -> Tensor:
    """S of tokens [B, S], counted on their device: int64 [1]."""
    return paddle.ones_like(tokens[:1], dtype="int64").sum().reshape([1])


def _local_positions(tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The local position of every global one and whether it is owned at all, both [1, S].

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
    """The sum of what stands before each place.  [1 0 2 1] -> [0 1 1 3]"""
    return paddle.cumsum(number, axis=axis) - number


def _compacted(values: Tensor, keep: Tensor) -> Tensor:
    """The kept values in reading order, then -1, as many places as there were.

    values [[10 11] [12 13]], keep [[0 1] [0 1]]  ->  [11 13 -1 -1]
    """
    number = keep.flatten().astype("int64")
    place = _with_spare(paddle.cumsum(number) * number, 0)  # what is not kept goes to a spare place in front
    values = _with_spare(values.flatten(), -1)
    return paddle.scatter(paddle.full_like(values, -1), place, values)[1:]


def _first_rows(indices: Tensor, num_rows: Tensor, rule: SeqLayout) -> Tensor:
    return of_even_shares(indices, rule) if rule.remainder == "error" else indices[:num_rows]


def add_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] += features[gather], on a copy; -1 is skipped, and so is what points past the end.

    What is to be skipped adds -0.0 to row 0, which changes nothing, not even the sign of a zero.
    """
    wide = "float32" if hidden.dtype in NARROW else hidden.dtype
    rows, picked = hidden.astype(wide).flatten(0, -2), features.astype(hidden.dtype).astype(wide)
    fits = (update >= 0) & (update < _height(rows)) & (gather >= 0) & (gather < _height(picked))
    number = fits.astype("int64")
    at, source = _with_spare(update * number, 0), _with_spare((gather + 1) * number, 0)  # some kernels refuse no pair
    nothing = paddle.zeros([1, hidden.shape[-1]], dtype=wide)
    nothing = nothing * paddle.full_like(nothing, -1)  # a constant -0.0 would be saved as 0.0
    rows = paddle.index_add(rows, at, 0, paddle.gather(paddle.concat([nothing, picked]), source))
    return rows.astype(hidden.dtype).reshape(paddle.shape(hidden))


def replace_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> Tensor:
    """hidden[update] = features[gather], on a copy; -1 is skipped, and so is what points past the end.

    What is to be skipped moves a spare row to a spare row, at the end of either table.
    """
    wide = "float32" if hidden.dtype in NARROW else hidden.dtype
    rows, picked = hidden.astype(wide).flatten(0, -2), features.astype(hidden.dtype).astype(wide)
    spare = paddle.zeros([1, hidden.shape[-1]], dtype=wide)
    height, feature_height = _height(rows), _height(picked)
    fits = (update >= 0) & (update < height) & (gather >= 0) & (gather < feature_height)
    pairs = ((update, height), (gather, feature_height))
    # some kernels refuse no pair
    at, source = (paddle.concat([paddle.where(fits, x, x * 0 + n), n.reshape([1])]) for x, n in pairs)
    picked = paddle.gather(paddle.concat([picked, spare]), source)
    rows = paddle.scatter(paddle.concat([rows, spare]), at, picked)[:-1]
    return rows.astype(hidden.dtype).reshape(paddle.shape(hidden))


def _height(table: Tensor) -> Tensor:
    """How many rows, counted on the device, by the first column.

    Not by slicing it off: oneDNN's slice, which the inference predictor takes for floats, has crashed here.
    """
    column = paddle.index_select(table, paddle.zeros([1], dtype="int64"), axis=1)
    return paddle.ones_like(column, dtype="int64").sum()


def _with_spare(index: Tensor, value: int) -> Tensor:
    return paddle.concat([paddle.full([1], value, dtype="int64"), index])
