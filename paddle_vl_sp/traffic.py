"""What a deepstack layer moves and waits for in its forward: here, and in PaddleFormers 1.2.0, counted from its source.

Numbers, or arrays of numbers.
"""

from __future__ import annotations

from typing import Any


def bytes_here(visual: Any, row_bytes: Any) -> Any:
    """Two rows are read and one is written for every visual token."""
    return 3 * visual * row_bytes


def bytes_upstream(rows: Any, visual: Any, row_bytes: Any, is_cut: Any) -> Any:
    """All rows of the rank are copied, for a clone and for scatter_nd_add; where sp cuts, for two transposes, too."""
    return (4 * rows + 3 * visual + is_cut * (4 * rows + 2 * visual)) * row_bytes


def syncs_upstream(batch: Any, is_cut: Any) -> Any:
    """Waits for the device: a search for the visual rows; where sp cuts, three in every sample besides."""
    return 1 + is_cut * 3 * batch
