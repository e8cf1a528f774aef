"""Two ranks share the images of a batch, instead of encoding all of them twice.

    python examples/vision_dp.py

Two processes on the CPU, a small vision tower whose patches attend to each other within an image. Every rank gets the
features of all images. Its parameter gradients are of its own images only: sum_parameter_grads sums them over the
ranks. docs/vision-dp.md says who sums which gradient.
"""

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn

from paddle_vl_sp import encode_shared, sum_parameter_grads
from paddle_vl_sp.testing import run_ranks

MERGE, PIXELS, WIDTH, HIDDEN = 2, 12, 16, 8
GRID = [[1, 4, 4], [1, 12, 8], [1, 4, 6], [1, 2, 4], [1, 8, 8], [1, 6, 8]]  # images, (t, h, w) in patches
WAYS = {"every rank all": None, "contiguous": "contiguous", "longest": "longest"}


class Tower(nn.Layer):
    """pixels [P, PIXELS], grid [I, 3] -> features [N, HIDDEN], a row for every MERGE x MERGE patches."""

    def __init__(self):
        super().__init__()
        paddle.seed(0)
        self.embed, self.qkv = nn.Linear(PIXELS, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH * MERGE**2, HIDDEN)
        self.patches, self.pairs = 0, 0  # that this rank has computed

    def forward(self, pixels, grid):
        counts = np.prod(np.asarray(grid), axis=1).tolist()
        self.patches, self.pairs = self.patches + sum(counts), self.pairs + sum(count**2 for count in counts)
        return paddle.concat([self.image(part) for part in pixels.split(counts)])

    def image(self, pixels):
        q, k, v = self.qkv(self.embed(pixels)).chunk(3, axis=-1)  # [P, WIDTH] each
        x = nn.functional.softmax(q @ k.t() * WIDTH**-0.5) @ v
        return self.merge(x.reshape([-1, WIDTH * MERGE**2]))


def step(pixels, policy, group):
    """Features, summed gradients, and the work of this rank: patches, and pairs of them that attend to each other."""
    tower, grid = Tower(), paddle.to_tensor(GRID)
    if policy is None:
        features = tower(pixels, grid)
    else:  # each rank uses all features in the same way here; where it uses its own rows, leave grad out
        features = encode_shared(tower, pixels, grid, group=group, merge_size=MERGE, policy=policy, grad="whole")
    (features * features).mean().backward()
    if policy is not None:
        sum_parameter_grads(tower, group)  # once a step, before clipping
    gradients = {name: parameter.grad.numpy() for name, parameter in tower.named_parameters()}
    return features.numpy(), gradients, (tower.patches, tower.pairs)


def error(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def on_a_rank():
    """{way: (patches, pairs, error of the features, worst error of a gradient)}"""
    drawn = np.random.default_rng(0).standard_normal([int(np.prod(GRID, axis=1).sum()), PIXELS])
    pixels, found = paddle.to_tensor(drawn.astype("float32")), {}
    for way, policy in WAYS.items():
        features, gradients, work = step(pixels, policy, dist.get_group(0))
        if policy is None:
            wanted, whole = features, gradients
        errors = [error(gradients[name], whole[name]) for name in whole]
        found[way] = *work, error(features, wanted), max(errors)
    return found


if __name__ == "__main__":
    import vision_dp  # the ranks import their function, so it must not be that of __main__

    ranks = run_ranks(vision_dp.on_a_rank, 2)
    print(f"6 images, 2 ranks{'patches of each':>22}{'pairs of each':>18}{'features off':>15}{'gradients off':>16}")
    for way in WAYS:
        patches, pairs, features, gradients = zip(*(rank[way] for rank in ranks), strict=True)
        print(f"{way:17}{patches!s:>22}{pairs!s:>18}{max(features):>15.1e}{max(gradients):>16.1e}")
