"""How the cut of a batch reaches the attention of each layer: by a tensor in the place of the row indices.

PaddleFormers hands attn_mask_startend_row_indices from the model to every layer's attention untouched, and recompute
hands the same to the replay in the backward, when the forward that made the cut is over. So a number travels there, in
a tensor of nearly the form that row indices have; it is on the host, so that reading it is no host sync.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from paddle_vl_sp.attention.chosen import ChosenAttention
from paddle_vl_sp.layout import SeqLayout

FIRST = -(10**9)  # no row index is negative; the numbers count down from here
KEPT = 4096  # cuts of forwards whose backwards may still come

_numbers = itertools.count()
_cuts: OrderedDict[int, Cut] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Cut:
    """What an attention needs to know of the batch."""

    chosen: ChosenAttention
    layout: SeqLayout
    bounds: tuple[int, ...] | None  # of packed segments, before padding
    seen_by: set[int] = field(default_factory=set)  # the attentions that it reached

    def marker(self) -> Tensor:
        """int32 [1, 1, S_local, 1, 1] on the host, all of it the number of this cut.

        One axis more than row indices have: attention that is not ours, as after `revert()`, fails on it.
        """
        number = FIRST - next(_numbers)
        _cuts[number] = self
        while len(_cuts) > KEPT:
            _cuts.popitem(last=False)
        numbers = np.full([1, 1, self.layout.local_len, 1, 1], number, dtype=np.int32)
        return paddle.to_tensor(numbers, place=paddle.CPUPlace())


def cut_in(indices: Any, attention: Any) -> Cut | None:
    """The cut, if this is a marker and no row indices; `attention` is who asks."""
    if not isinstance(indices, Tensor) or not indices.place.is_cpu_place() or not indices.size:
        return None
    number = int(indices.flatten()[0])
    if number > FIRST:
        return None
    if number not in _cuts:
        raise ValueError(
            f"the cut of this batch is not known any more: more than {KEPT} forwards came before its backward; run "
            "each backward sooner"
        )
    cut = _cuts[number]
    cut.seen_by.add(id(attention))
    return cut
