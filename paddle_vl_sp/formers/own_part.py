"""This rank's part of the tokens of a batch, for features of which it gets only its own rows: the plain families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class OwnPart:
    """Its ids and plans, on the host."""

    tokens: Integers  # [B, S] of the whole batch
    kind_ids: Mapping[str, int]
    layout: SeqLayout

    @cached_property
    def ids(self) -> Integers:
        """[B, S_local]"""
        own: Integers = self.tokens[:, self.layout.positions()]
        return own

    @cached_property
    def plan(self) -> VisualPlan:
        """Of the features of all kinds, in reading order."""
        return self._plan(self.wanted)

    @cached_property
    def plans(self) -> dict[str, VisualPlan]:
        """Of each kind's features alone, which is how they are encoded."""
        if len(self.kind_ids) == 1:
            return dict.fromkeys(self.kind_ids, self.plan)
        return {kind: self._plan((kind_id,)) for kind, kind_id in self.kind_ids.items()}

    @property
    def wanted(self) -> tuple[int, ...]:
        return tuple(self.kind_ids.values())

    def _plan(self, ids: tuple[int, ...]) -> VisualPlan:
        return plan_visual(self.tokens, ids, self.layout, sequence_first=False)
