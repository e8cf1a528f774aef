"""What the row operations need of their tensors, checked before any of them runs and while a graph is traced."""

from __future__ import annotations

from collections.abc import Sequence

from paddle import Tensor


def check_rows(hidden: Tensor, features: Tensor, update: Tensor, gather: Tensor) -> None:
    """Tensors, floating point, of one width H; indices int64."""
    for name, x in (("hidden", hidden), ("features", features)):
        if not hasattr(x, "stop_gradient"):
            raise ValueError(f"{name} must be a Paddle tensor, got {type(x).__name__}: paddle.to_tensor(...) makes one")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    shape = known_shape(hidden)
    if len(features.shape) != 2 or not is_same_shape(known_shape(features)[1:], shape[-1:]):
        raise ValueError(f"features must be [N, {shape[-1]}] for hidden states {shape}, got {known_shape(features)}")
    kinds = {str(x.dtype).rpartition(".")[2] for x in (update, gather)}
    if kinds != {"int64"}:
        raise ValueError(f"the plan's indices must be int64, got {sorted(kinds)}: astype('int64') them")


def known_shape(x: Tensor) -> list[int]:
    """-1 for sizes that are not numbers: those of a graph that is being traced, which come with the data."""
    return [size if isinstance(size, int) else -1 for size in x.shape]


def is_same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are equal, as far as they are known: -1 is an unknown size."""
    pairs = zip(a, b)  # noqa: B905  (to_static's zip knows no `strict`)
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in pairs)
