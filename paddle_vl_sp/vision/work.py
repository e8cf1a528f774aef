"""What one rank encodes of a batch: which pixels, with which grid, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.comm import collectives
from paddle_vl_sp.vision.share import VisionShare, share_images, vision_items

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """What this rank has to encode."""

    grid: Integers  # [I, 3] of the whole batch
    share: VisionShare
    runs: list[tuple[int, int]]  # (begin, end) of pixel rows
    own_grid: Integers  # [k, 3]
    merge_size: int
    is_shared: bool

    @property
    def is_needed(self) -> bool:
        return len(self.own_grid) > 0

    @property
    def num_rows(self) -> int:
        """Of the whole batch."""
        return sum(self.share.token_counts)

    def encoded(self, encode: Callable[[Tensor, Any], Any], pixels: Tensor, grid_like: Any) -> tuple[list[Tensor], int]:
        """This rank's features and levels, and the form they came in; of a blank image, cut away, if it has none."""
        if self.is_needed:
            own = [pixels[begin:end] for begin, end in self.runs]
            result = encode(own[0] if len(own) == 1 else paddle.concat(own), _grid_as(self.own_grid, grid_like))
            expected = int(self.own_grid.prod(axis=1).sum()) // self.merge_size**2
        else:
            side = self.merge_size
            blank = pixels.new_zeros([side * side, pixels.shape[1]])
            result = encode(blank, _grid_as(np.array([[1, side, side]], dtype=np.int64), grid_like))
            expected = 1
        outs, form = _taken_apart(result)
        _check_encoded(outs, expected)
        return (outs if self.is_needed else [x[:0] for x in outs]), form


def plan_work(
    pixels: Tensor,
    grid_thw: Any,
    group: Any,
    merge_size: int,
    policy: str,
    split_frames: bool,
    alpha: int,
    replicate_below: int,
) -> Work:
    """The work of this rank, from numbers that every rank has; the grid is read on the host, once."""
    grid = np.asarray(grid_thw.numpy() if isinstance(grid_thw, Tensor) else grid_thw, dtype=np.int64)
    _check_batch(pixels, grid, merge_size)
    num_ranks, rank = (1, 0) if not collectives.has_peers(group) else (group.nranks, group.rank)
    costs, token_counts, items = vision_items(grid, merge_size, alpha, split_frames)
    share = share_images(costs.tolist(), token_counts.tolist(), num_ranks, policy)
    spared = (sum(share.counts) - max(share.counts)) * merge_size**2
    is_shared = num_ranks > 1 and spared >= replicate_below
    own = list(share.items[rank]) if is_shared else list(range(len(items)))
    end = np.cumsum(items.prod(axis=1))
    runs = [(int(end[item] - items[item].prod()), int(end[item])) for item in own]
    same_video = np.repeat(np.arange(len(grid)), grid[:, 0]) if split_frames else np.arange(len(grid))
    return Work(grid, share, _joined(runs), _joined_frames(items, same_video, own), merge_size, is_shared)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(0, 4) (4, 6) (9, 12)  ->  (0, 6) (9, 12)"""
    joined: list[tuple[int, int]] = []
    for begin, end in runs:
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _joined_frames(items: Integers, video: Integers, own: list[int]) -> Integers:
    """The grids of this rank's items, frames that follow each other in one video as one: [k, 3]."""
    grids: list[list[int]] = []
    for place, item in enumerate(own):
        if place and own[place - 1] == item - 1 and video[item - 1] == video[item]:
            grids[-1][0] += 1
        else:
            grids.append(items[item].tolist())
    return np.array(grids, dtype=np.int64).reshape(-1, 3)


def _grid_as(grid: Integers, like: Any) -> Any:
    """The grid in the form and place that the caller's had."""
    if isinstance(like, Tensor):
        return paddle.to_tensor(grid, dtype=like.dtype, place=like.place)
    return grid.astype(np.asarray(like).dtype) if len(like) else grid


def _taken_apart(result: Any) -> tuple[list[Tensor], int]:
    """All tensors of encode's result, and its form: -1 for features alone, else the number of levels."""
    if isinstance(result, Tensor):
        return [result], -1
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"encode must return features, or (features, [levels]), got {type(result).__name__}")
    features, levels = result
    return [features, *levels], len(levels)


def _check_batch(pixels: Tensor, grid: Integers, merge_size: int) -> None:
    if grid.ndim != 2 or grid.shape[1] != 3 or len(pixels.shape) != 2:
        raise ValueError(
            f"pixel_values must be [P, C] and grid_thw [I, 3], got {list(pixels.shape)} and {list(grid.shape)}"
        )
    bad = np.flatnonzero((grid < 1).any(axis=1) | (grid[:, 1:] % merge_size).any(axis=1))
    if bad.size:
        raise ValueError(
            f"image {bad[0]} of grid_thw is {grid[bad[0]].tolist()} (t, h, w): all must be positive, h and w multiples "
            f"of merge_size {merge_size}"
        )
    patches = int(grid.prod(axis=1).sum())
    if patches != pixels.shape[0]:
        raise ValueError(f"grid_thw has {patches} patches but pixel_values {pixels.shape[0]} rows: they must match")


def _check_encoded(outs: list[Tensor], expected: int) -> None:
    shapes = [list(x.shape) for x in outs]
    if any(len(shape) != 2 or shape != [expected, shapes[0][1]] for shape in shapes):
        raise ValueError(
            f"encode returned {shapes} for an input that makes {expected} rows: features and levels must be "
            f"[{expected}, H], of one width; look at merge_size"
        )
    if len({x.dtype for x in outs}) > 1:
        raise ValueError(f"features and levels must have one dtype, got {[str(x.dtype) for x in outs]}")
