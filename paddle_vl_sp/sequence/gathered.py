"""The rows of all ranks, gathered and put into the order of the sequence."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from paddle_vl_sp.comm.uneven import UnevenRows
from paddle_vl_sp.layout import SeqLayout


@lru_cache(maxsize=16)
def rows_in_order(shares: tuple[SeqLayout, ...]) -> UnevenRows:
    """The rows of all ranks in the order of the sequence, by the layout of each. Kept from forward to forward.

    zigzag over 2 ranks, which hold 0 3 and 1 2:   order  0 2 3 1
    """
    order = np.argsort(np.concatenate([share.positions() for share in shares]))
    return UnevenRows(tuple(share.local_len for share in shares), order)
