"""Index arrays that stay on the device: copied in the first forward, used in all. Imports no Paddle until they are."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from paddle import Tensor


class Resident:
    """A host array that is not written to any more, and its copies: one on each device that asked for it.

    Keep it where it is found again in the next forward. Under CUDA graph capture a copy from the host would be recorded
    with an address that is freed before the graph runs, so there only copies that exist are handed out.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array
        self._copies: dict[str, Tensor] = {}

    def on(self, place: Any) -> Tensor:
        """The copy on the place; not to be written to."""
        from paddle_vl_sp.backends.copies import on_place
        from paddle_vl_sp.backends.dispatch import is_tracing

        if is_tracing():  # what belongs to one program must not be kept for the next
            import paddle

            return paddle.to_tensor(self.array)
        key = str(place)
        if key not in self._copies:
            self._copies[key] = on_place(self.array, place)
        return self._copies[key]

    @cached_property
    def stretch(self) -> tuple[int, int] | None:
        """(first, size) where the array counts up by one: rows that follow each other."""
        if self.array.size == 0:
            return 0, 0
        return (int(self.array[0]), self.array.size) if bool((np.diff(self.array) == 1).all()) else None
