"""How often one forward synchronises with the host to place the visual rows, and how often it searches for them.

The towers' features are computed beforehand, so that only the way from them to the last deepstack layer counts. A
boolean mask as an index makes Paddle search for its true places, which on a device is a host sync too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import paddle

from paddle_vl_sp.backends import dispatch

READS = ("item", "numpy", "tolist", "__int__", "__bool__", "__float__", "__index__")
ENCODERS = (
    ("get_image_features", "pixel_values", "image_grid_thw"),
    ("get_video_features", "pixel_values_videos", "video_grid_thw"),
)


def syncs_and_searches(model: Any, batch: dict[str, Any], positions: Any) -> dict[str, int]:
    """Of one forward of the model on the batch."""
    counts = {"syncs": 0, "searches": 0}
    given = {key: value for key, value in batch.items() if key != "labels"}
    with _features_made(model.model, batch), _counted(counts), paddle.no_grad():
        model.model(**given, position_ids=positions)
    return counts


@contextmanager
def _features_made(inner: Any, batch: dict[str, Any]) -> Iterator[None]:
    made = {
        name: getattr(inner, name)(batch[pixels], batch[grid]) for name, pixels, grid in ENCODERS if pixels in batch
    }
    for name, features in made.items():
        object.__setattr__(inner, name, lambda *_, features=features: features)
    try:
        yield
    finally:
        for name in made:
            object.__delattr__(inner, name)


@contextmanager
def _counted(counts: dict[str, int]) -> Iterator[None]:
    restore: list[tuple[Any, str, Any]] = []

    def wrap(owner: Any, name: str, counted: Callable[..., tuple[str, ...]]) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            for key in counted(*args):
                counts[key] += 1
            return original(*args, **kwargs)

        restore.append((owner, name, original))
        setattr(owner, name, call)

    for name in READS:
        wrap(paddle.Tensor, name, lambda *_: ("syncs",))
    for name in ("__getitem__", "__setitem__"):
        wrap(paddle.Tensor, name, lambda _self, index, *_: ("syncs", "searches") if _has_mask(index) else ())
    wrap(paddle.Tensor, "masked_scatter", lambda *_: ("syncs", "searches"))
    wrap(dispatch, "build_plan", lambda *_: ("searches",))
    try:
        yield
    finally:
        for owner, name, original in restore:
            setattr(owner, name, original)


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, paddle.Tensor) and part.dtype == paddle.bool for part in parts)
