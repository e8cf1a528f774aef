"""What one rank encodes of a batch: which pixels, with which grid, and the rows that must result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import paddle
from paddle import Tensor

from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.vision.share import VisionShare, image_of, join_frames, share_images, vision_items

Integers: TypeAlias = npt.NDArray[np.int64]
Grid: TypeAlias = "Tensor | npt.NDArray[Any]"
Encode: TypeAlias = Callable[[Tensor, Grid], object]


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
    def has_images(self) -> bool:
        return len(self.own_grid) > 0

    @property
    def total_rows(self) -> int:
        """The feature rows of the whole batch."""
        return sum(self.share.token_counts)

    def encode_own(self, encode: Encode, pixels: Tensor, grid_like: Grid) -> tuple[list[Tensor], int]:
        """This rank's features and levels, and their form (see `split_result`)."""
        own = [pixels[begin:end] for begin, end in self.runs]
        own_pixels = own[0] if len(own) == 1 else paddle.concat(own or [pixels[:0]])
        return encode_items(encode, own_pixels, self.own_grid, grid_like, self.merge_size)


def encode_items(
    encode: Encode, pixels: Tensor, grid: Integers, grid_like: Grid, merge_size: int
) -> tuple[list[Tensor], int]:
    """encode(pixels, grid), checked: features and levels, and their form (see `split_result`).

    Without images they are those of a blank image, cut to no rows, so that the tower is still in the graph.
    """
    blank = [[1, merge_size, merge_size]]
    shown = grid if len(grid) else np.array(blank, dtype=np.int64)
    if not len(grid):  # after the pixels [0, C], whose backward may be a collective
        pixels = paddle.concat([pixels, pixels.new_zeros([merge_size**2, pixels.shape[1]])])
    outs, form = split_result(encode(pixels, _like(shown, grid_like)))
    _check_encoded(outs, int(shown.prod(axis=1).sum()) // merge_size**2)
    return (outs if len(grid) else [x[:0] for x in outs]), form


def plan_work(
    pixels: Tensor,
    grid_thw: Grid,
    group: Group | None,
    merge_size: int,
    policy: str,
    split_frames: bool,
    alpha: int,
    replicate_below: int,
) -> Work:
    """This rank's work, from numbers that every rank has; a grid on a device is read once."""
    grid = checked_grid(pixels, grid_thw, merge_size)
    num_ranks, rank = (group.nranks, group.rank) if has_peers(group) else (1, 0)
    costs, token_counts, items = vision_items(grid, merge_size, alpha, split_frames)
    share = share_images(costs.tolist(), token_counts.tolist(), num_ranks, policy)
    saved = (sum(share.counts) - max(share.counts)) * merge_size**2  # patches that the busiest rank need not encode
    is_shared = num_ranks > 1 and saved >= replicate_below
    own = list(share.items[rank]) if is_shared else list(range(len(items)))
    end = np.cumsum(items.prod(axis=1))
    runs = [(int(end[item] - items[item].prod()), int(end[item])) for item in own]
    return Work(
        grid, share, _join_runs(runs), join_frames(items, image_of(grid, split_frames), own), merge_size, is_shared
    )


def _join_runs(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(0, 4) (4, 6) (9, 12)  ->  (0, 6) (9, 12)"""
    joined: list[tuple[int, int]] = []
    for begin, end in runs:
        if joined and joined[-1][1] == begin:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((begin, end))
    return joined


def _like(grid: Integers, like: Grid) -> Grid:
    """The grid with the type, dtype and place of the caller's."""
    if isinstance(like, Tensor):
        return paddle.to_tensor(grid, dtype=like.dtype, place=like.place)
    return grid.astype(np.asarray(like).dtype) if len(like) else grid


def split_result(result: object) -> tuple[list[Tensor], int]:
    """All tensors of encode's result, and its form: -1 for features alone, else the number of levels."""
    if isinstance(result, Tensor):
        return [result], -1
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(f"encode must return features, or (features, [levels]), got {type(result).__name__}")
    features, levels = result
    return [features, *levels], len(levels)


def checked_grid(pixels: Tensor, grid_thw: Grid, merge_size: int) -> Integers:
    """The grid as numbers, int64 [I, 3]; raises unless it is one of these pixels."""
    grid = np.asarray(grid_thw.numpy() if isinstance(grid_thw, Tensor) else grid_thw, dtype=np.int64)
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
    return grid


def _check_encoded(outs: list[Tensor], expected: int) -> None:
    shapes = [list(x.shape) for x in outs]
    if any(len(shape) != 2 or shape != [expected, shapes[0][1]] for shape in shapes):
        raise ValueError(
            f"encode returned {shapes} for an input that makes {expected} rows: features and levels must be "
            f"[{expected}, H], of one width; check merge_size"
        )
    if len({x.dtype for x in outs}) > 1:
        raise ValueError(f"features and levels must have one dtype, got {[str(x.dtype) for x in outs]}")
