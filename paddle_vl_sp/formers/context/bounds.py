"""PaddleFormers' packed rows: from the row indices of its collator to boundaries."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def boundaries(indices: npt.NDArray[Any], seq_len: int) -> tuple[int, ...]:
    """Of the segments of all rows one after the other, 0 .. B * S.

    indices  [B, 1, S, 1] or [B, S]: for each key the row from which it is no longer seen

    PaddleFormers gives every position of the padding at a row's end its own place as that row, so that no query sees
    it: the padding is one segment here::

        S 6, segments of 2 and 3, one padded      indices  2 2 5 5 5 5   ->   0 2 5 6
    """
    bounds = [0]
    places = np.arange(seq_len)
    for sample, row in enumerate(np.minimum(indices.reshape(-1, seq_len), seq_len)):
        seen = row > places  # by its own row at least: no padding
        num_real = int(seen.sum())
        ends = np.unique(row[:num_real])
        lengths = np.diff(ends, prepend=0)
        is_packed = lengths.sum() == num_real and np.array_equal(np.repeat(ends, lengths), row[:num_real])
        if seen[num_real:].any() or not is_packed:
            raise ValueError(
                f"attn_mask_startend_row_indices of sample {sample} are no packed causal segments with padding behind "
                "them: context parallelism takes no other mask; pack, or leave it out"
            )
        bounds += [sample * seq_len + int(end) for end in ends]
        if num_real < seq_len:
            bounds.append((sample + 1) * seq_len)
    return tuple(bounds)
