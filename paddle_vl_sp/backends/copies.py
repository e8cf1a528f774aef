"""Copies of host arrays to a device, which do not synchronise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.base import core

if TYPE_CHECKING:
    import numpy.typing as npt
    from paddle.base.core import Place


def on_place(x: Tensor | npt.NDArray[Any], place: str | Place) -> Tensor:
    """x on the place, without a host sync; a numpy array may be overwritten once this has returned."""
    tensor = paddle.to_tensor(x, place=paddle.CPUPlace()) if isinstance(x, np.ndarray) else x
    if tensor.place.is_cpu_place():
        check_not_capturing(place)
    return tensor.to(place, blocking=False)


def check_not_capturing(place: str | Place) -> None:
    """Raises where a copy from the host would become a part of a CUDA graph."""
    on_gpu = place.startswith("gpu") if isinstance(place, str) else place.is_gpu_place()
    if on_gpu and core.is_cuda_graph_capturing():
        raise ValueError(
            f"a CUDA graph is being captured, and indices of this forward are not on {place} yet: a copy would be "
            "captured with host memory that is freed; run the same forward and backward once before the capture, with "
            "the same layout, boundaries and counts"
        )
