"""What the row operations need of their tensors, checked before any of them runs and while a graph is traced."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
from paddle import Tensor


def check_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> tuple[list[int], list[int]]:
    """Tensors, floating point, of one width H; indices int64. Returns the shapes of hidden and features.

    A size is -1 where it comes with the data of a graph that is being traced.
    """
    check_ir()
    for name, x in (("hidden", hidden), ("features", features)):
        if not hasattr(x, "stop_gradient"):
            raise ValueError(f"{name} must be a Paddle tensor, got {type(x).__name__}: paddle.to_tensor(...) makes one")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    shape, feature_shape = _known(hidden.shape), _known(features.shape)
    if len(feature_shape) != 2 or not is_same_shape(feature_shape[1:], shape[-1:]):
        raise ValueError(f"features must be [N, {shape[-1]}] for hidden states {shape}, got {feature_shape}")
    for x in (update, gather):
        if x.dtype != paddle.int64:
            raise ValueError(f"the plan's indices must be int64, got {x.dtype}: astype('int64') them")
    return shape, feature_shape


def check_ir() -> None:
    """Paddle's own IR (PIR) if a graph is being traced: under the old one the operators would end the process."""
    if not paddle.in_dynamic_mode() and not paddle.framework.use_pir_api():
        raise ValueError("the old IR is not supported: unset FLAGS_enable_pir_api=0")


def _known(shape: Sequence[object]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in shape]


def is_same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are equal, as far as they are known: -1 is an unknown size."""
    if list(a) == list(b):
        return True
    pairs = zip(a, b)  # noqa: B905  (to_static's zip knows no `strict`)
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in pairs)
