"""A vision tower in plain Paddle, small enough to run in milliseconds, with the parts that matter.

Patch embedding, two attention blocks within a frame, a merger of merge_size x merge_size patches, and two deepstack
levels. Frames never meet: each is computed alone, so a frame's rows are the same bits whatever else is in the batch.
"""

import numpy as np
import paddle
from paddle import nn

MERGE = 2
CHANNELS = 12
HIDDEN = 10


class Block(nn.Layer):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):  # [patches of one frame, width]
        patches, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape([patches, 3, self.heads, -1]).transpose([1, 2, 0, 3])  # [heads, P, D]
        weights = nn.functional.softmax(q @ k.transpose([0, 2, 1]) * (width // self.heads) ** -0.5, axis=-1)
        x = x + self.out((weights @ v).transpose([1, 0, 2]).reshape([patches, width]))
        return x + self.mlp(x)


class Merger(nn.Layer):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width * MERGE**2)
        self.project = nn.Linear(width * MERGE**2, HIDDEN)

    def forward(self, x):
        return self.project(self.norm(x.reshape([x.shape[0] // MERGE**2, -1])))


class TinyTower(nn.Layer):
    """forward(pixel_values [P, CHANNELS], grid_thw [I, 3]) -> (features [N, HIDDEN], [two levels alike])."""

    def __init__(self, width=8, num_levels=2):
        super().__init__()
        self.embed = nn.Linear(CHANNELS, width)
        self.place = nn.Linear(2, width)
        self.blocks = nn.LayerList([Block(width) for _ in range(2)])
        self.merger = Merger(width)
        self.deepstack = nn.LayerList([Merger(width) for _ in range(num_levels)])
        self.calls = []

    def forward(self, pixel_values, grid_thw):
        grid = np.asarray(grid_thw)
        self.calls.append(grid.tolist())
        frames = [self.frame(pixels, h, w) for pixels, h, w in split_frames(pixel_values, grid)]
        features, *levels = (paddle.concat(parts) for parts in zip(*frames, strict=True))
        return features, levels

    def frame(self, pixels, h, w):
        place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), -1).reshape([h * w, 2]) / 8
        x = self.embed(pixels) + self.place(paddle.to_tensor(place.astype("float32")).astype(pixels.dtype))
        levels = []
        for block, merger in zip(self.blocks, self.deepstack, strict=False):
            x = block(x)
            levels.append(merger(x))
        return [self.merger(x), *levels]


def split_frames(pixel_values, grid):
    at = 0
    for frames, h, w in grid.tolist():
        for _ in range(frames):
            yield pixel_values[at : at + h * w], h, w
            at += h * w


def tower(seed=0, **options):
    paddle.seed(seed)
    return TinyTower(**options)


def pixels(grid, seed=0):
    """Random patches for a grid, float32 [P, CHANNELS]."""
    rng = np.random.default_rng([seed, *np.ravel(grid).tolist()])
    return paddle.to_tensor(rng.normal(size=[int(np.prod(grid, axis=1).sum()), CHANNELS]).astype("float32"))
