"""What a deepstack layer moves and waits for in its forward: here, and in PaddleFormers 1.2.0, counted from its source.

Numbers, or arrays of numbers. is_cut: by sequence parallelism; is_plain: of the plain classes, else of PaddleFleet's.
"""

from __future__ import annotations

from typing import Any


def bytes_here(rows: Any, visual: Any, row_bytes: Any) -> Any:
    """All rows of the rank are copied once; two are read and one is written for every visual token."""
    return (2 * rows + 3 * visual) * row_bytes


def bytes_upstream(rows: Any, visual: Any, row_bytes: Any, is_cut: Any, is_plain: Any = 0) -> Any:
    """All rows of the rank are copied, for a clone and for scatter_nd_add; where sp cuts, for two transposes, too.

    The plain classes clone, and read, add and write the visual rows by a mask.
    """
    on_fleet = 4 * rows + 3 * visual + is_cut * (4 * rows + 2 * visual)
    return (is_plain * (2 * rows + 7 * visual) + (1 - is_plain) * on_fleet) * row_bytes


def syncs_upstream(batch: Any, is_cut: Any, is_plain: Any = 0) -> Any:
    """Waits for the device: a search for the visual rows; where sp cuts, three in every sample besides.

    The plain classes search twice; where sp cuts, two counts are read besides.
    """
    return is_plain * (2 + 2 * is_cut) + (1 - is_plain) * (1 + is_cut * 3 * batch)
