"""vision_dp="data": the vision towers of all data-parallel ranks share their work, in every forward of every rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.formers import shared_tower
from paddle_vl_sp.formers.groups import data_group
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.formers.shared_tower import Encode
from paddle_vl_sp.vision.balanced import encode_balanced
from paddle_vl_sp.vision.share import tower_alpha

_balancing: WeakSet[Any] = WeakSet()
_balancing_as_built: WeakSet[Any] = WeakSet()  # of them, those that balanced_init made


def balance_tower(model: Layer) -> Any:
    """Turns it on for the model inside `model` that has the tower: returns it.

    Ranks that hold the same batch, of tensor or context parallelism, share a replicated tower's work among them too.
    """
    inner = _model_with_tower(model)
    if not _is_on_fleet(inner):
        if not _encodes_videos_as_images(inner):
            raise ValueError(
                f'vision_dp="data" with {type(inner).__name__}, which has its own get_video_features: images and '
                "videos travel together and are encoded by get_image_features; leave vision_dp out"
            )
        if shared_tower.shares_a_batch(inner):
            shared_tower.share_tower(model)
    _balancing.add(inner)
    return inner


def balanced_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Has the data-parallel ranks share the work of the tower, in every model that is built from now on."""

    @functools.wraps(original)
    def __init__(self: Layer, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        _balancing_as_built.add(balance_tower(self))

    return __init__


def is_balanced(inner: Layer) -> bool:
    return inner in _balancing


def is_any_balanced() -> bool:
    return bool(_balancing)


def stop_balancing_of(inner: Layer) -> None:
    """And the sharing among the ranks of one batch, whose marks would have the trainer sum whole gradients."""
    _balancing.discard(inner)
    if shared_tower.is_shared(inner):
        shared_tower.stop_sharing(inner)


def stop_where_not_asked_for() -> None:
    """Of the models that were built so, those whose classes build as upstream again."""
    for inner in shared_tower.take_built_as_upstream(_balancing_as_built):
        stop_balancing_of(inner)


def takes_part(inner: Layer, given: Mapping[str, Any]) -> bool:
    """Whether this forward meets those of the other ranks: any but that of a generation, which has a cache."""
    return inner in _balancing and not given.get("use_cache") and data_group() is not None


def balanced_rows(
    inner: Layer, encode: Encode, brought: Sequence[tuple[Tensor, Tensor]], place: Any
) -> list[list[Tensor]]:
    """[main, *levels] of each (pixels, grid) that this rank brought, in one call; of no images, without rows, if none.

    encode  (pixels, grid) -> rows, or rows and levels, by the ranks that hold the same batch
    """
    tower = _tower_of(inner)
    config, merge_size = tower.config, tower.spatial_merge_size
    parts = list(brought) or [_nothing(config, place)]
    pixels, grids = (paddle.concat(list(each)) for each in zip(*parts, strict=True))
    encoded = encode_balanced(
        encode,
        pixels,
        grids,
        group=data_group(),
        merge_size=merge_size,
        split_frames=True,  # the tower attends within a frame
        alpha=tower_alpha(config.hidden_size, config.intermediate_size),
    )
    outs = [encoded] if isinstance(encoded, Tensor) else [encoded[0], *encoded[1]]
    counts = [int(np.asarray(grid).prod(axis=1).sum()) // merge_size**2 for _, grid in parts]
    by_level = [paddle.split(x, counts) if len(counts) > 1 else [x] for x in outs]
    return [list(rows) for rows in zip(*by_level, strict=True)]


def _nothing(config: Any, place: Any) -> tuple[Tensor, Tensor]:
    """Pixels [0, C] and a grid [0, 3]."""
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return paddle.zeros([0, width], device=place), paddle.zeros([0, 3], dtype="int64", device=place)


def _model_with_tower(model: Layer) -> Any:
    for layer in model.sublayers(include_self=True):
        if _is_on_fleet(layer):
            return layer
    return shared_tower.plain_model_of(model)


def _is_on_fleet(layer: Layer) -> bool:
    """Whether a forward of ours hands features to a language model of PaddleFleet, by a tower that may be cut."""
    return hasattr(type(layer).forward, OURS) and hasattr(layer, "vision_model")


def _tower_of(inner: Layer) -> Any:
    return inner.vision_model if _is_on_fleet(inner) else inner.visual


def _encodes_videos_as_images(inner: Layer) -> bool:
    methods = (type(inner).get_image_features, type(inner).get_video_features)
    return all(method.__module__.partition(".")[0] == "paddleformers" for method in methods)
