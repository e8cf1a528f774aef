"""How evenly the vision tower's work was spread over ranks, forward by forward, and what moved for it."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Balanced(Protocol):
    """One forward's images over ranks that brought their own (`paddle_vl_sp.vision.homes.BalancedShare`)."""

    @property
    def imbalance(self) -> float: ...
    @property
    def imbalance_at_home(self) -> float: ...
    @property
    def patches_at_home(self) -> Integers: ...
    @property
    def patches_encoded(self) -> Integers: ...
    @property
    def moved_patches(self) -> int: ...
    @property
    def sent_rows(self) -> int: ...
    def report(self) -> str: ...


class TowerWork:
    """Counted forward by forward, each under the number of the counted forward that follows."""

    def __init__(self) -> None:
        self._imbalances: list[tuple[int, float]] = []
        self._balances: list[tuple[int, float, int, int]] = []  # imbalance at home, rows and bytes that moved
        self._patches: Integers | None = None  # [2, ranks], at home and encoded, of all forwards

    def add_shared(self, forward: int, imbalance: float) -> None:
        self._imbalances.append((forward, imbalance))

    def add_balanced(self, forward: int, share: Balanced, moved_bytes: int) -> None:
        self._imbalances.append((forward, share.imbalance))
        self._balances.append((forward, share.imbalance_at_home, share.sent_rows, moved_bytes))
        patches = np.stack([share.patches_at_home, share.patches_encoded])
        self._patches = patches if self._patches is None else self._patches + patches

    def read(self, since: int) -> dict[str, Any]:
        """Of the forwards from number `since` on; nothing where no work was spread."""
        found: dict[str, Any] = {}
        imbalances = self._imbalances[bisect_left(self._imbalances, (since,)) :]
        if imbalances:
            found["vision_imbalance"] = float(np.mean([imbalance for _, imbalance in imbalances]))
        balances = self._balances[bisect_left(self._balances, (since,)) :]
        if balances and self._patches is not None:
            _, at_home, rows, moved = zip(*balances, strict=True)
            found |= {
                "vision_imbalance_at_home": float(np.mean(at_home)),
                "vision_rows_moved": sum(rows),
                "vision_bytes_moved": sum(moved),
                "vision_patches_at_home": self._patches[0].tolist(),
                "vision_patches_encoded": self._patches[1].tolist(),
            }
        return found
