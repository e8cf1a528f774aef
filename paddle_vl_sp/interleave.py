"""Features of the images and videos of a batch, in the reading order of the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.plan import check_feature_count, checked_ids

if TYPE_CHECKING:
    from paddle import Tensor

    from paddle_vl_sp.plan import Array

Features = TypeVar("Features", bound="Tensor | list[Tensor] | tuple[Tensor, ...]")  # [N, H], or a list of levels [N, H]


def joint_features(
    image: Features | None, video: Features | None, tokens: Array, placeholder_ids: Sequence[int]
) -> Features:
    """Image rows [N_img, H] and video rows [N_vid, H] in the reading order of both, [N_img + N_vid, H].

    image and video are tensors, or lists of levels with equally many rows; one of them may be None. tokens [B, S] are
    the ids of the whole batch: a numpy array costs no synchronisation, a tensor on a device one. placeholder_ids is
    (image_id, video_id)::

        tokens  t i i v v t i       image  i0 i1 i2      video  v0 v1
        result  i0 i1 v0 v1 i2
    """
    ids = checked_ids(tokens, placeholder_ids)
    if ids is None or len(ids) != 2:
        raise ValueError(f"placeholder_ids must be (image_id, video_id), got {placeholder_ids!r}")
    if image is None and video is None:
        raise ValueError("image and video are both None: there is nothing to join")
    image_levels, video_levels = _levels("image", image), _levels("video", video)
    _check_alike(image_levels, video_levels)
    order = _checked_order(tokens, ids, _num_rows(image_levels), _num_rows(video_levels))
    if image_levels and video_levels:
        from paddle_vl_sp.backends import dispatch

        joined = [dispatch.joint_rows(i, v, order) for i, v in zip(image_levels, video_levels, strict=True)]
    else:
        joined = image_levels or video_levels
    are_levels = isinstance(video if image is None else image, (list, tuple))
    return cast(Features, joined if are_levels else joined[0])


def _levels(kind: str, features: Tensor | list[Tensor] | tuple[Tensor, ...] | None) -> list[Tensor]:
    given = features if isinstance(features, (list, tuple)) else [features]
    levels = [level for level in given if level is not None]
    shapes = [list(level.shape) for level in levels]
    if any(len(shape) != 2 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"{kind} features must be [N, H], the same in every level, got {shapes}")
    return levels


def _check_alike(image_levels: list[Tensor], video_levels: list[Tensor]) -> None:
    if not image_levels or not video_levels:
        return
    if len(image_levels) != len(video_levels):
        raise ValueError(
            f"image has {len(image_levels)} levels and video {len(video_levels)}: every level needs both kinds"
        )
    widths = image_levels[0].shape[1], video_levels[0].shape[1]
    if widths[0] != widths[1]:
        raise ValueError(f"image features are {widths[0]} wide and video features {widths[1]}: both need one width")


def _num_rows(levels: list[Tensor]) -> int:
    return int(levels[0].shape[0]) if levels else 0


def _checked_order(tokens: Array, ids: tuple[int, ...], num_image: int, num_video: int) -> Array:
    """For every feature row of the result its row in [image; video]; checks that each kind has a row for each token."""
    if isinstance(tokens, np.ndarray):
        order, counts = order_on_host(tokens, ids)
    else:
        from paddle_vl_sp.backends import dispatch

        order, counts = dispatch.joint_order(tokens, ids, num_image, num_video)
    image_tokens, video_tokens = counts.tolist()
    check_feature_count(image_tokens, num_image, "image")
    check_feature_count(video_tokens, num_video, "video")
    return order


def order_on_host(tokens: npt.NDArray[Any], ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For every visual token its row in [image; video], int64 [N], and the number of image and video tokens, int64 [2].

    tokens  t i i v v t i  ->  order 0 1 3 4 2, counts 3 2
    """
    visual = tokens[np.isin(tokens, ids)]  # [N]
    is_video = visual == ids[1]
    num_image = int((~is_video).sum())
    order = np.where(is_video, num_image + np.cumsum(is_video) - 1, np.cumsum(~is_video) - 1)
    return order, np.array([num_image, visual.size - num_image], dtype=np.int64)
