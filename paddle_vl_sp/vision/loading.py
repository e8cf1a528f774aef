"""Loading for data sets whose image sizes are known: a rank decodes only what it will encode.

::

    sampler = BalancedSampler(grids, batch_size=4, num_copies=8, rank=dist.get_rank(), merge_size=2)
    loader = paddle.io.DataLoader(
        BalancedDataset(load_sample, load_pixels), batch_sampler=sampler, collate_fn=only_item, num_workers=4
    )
    for step in loader:
        features = encode_assigned(tower, step["pixel_values"], step["share"], group=group)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import paddle

from paddle_vl_sp.vision.homes import BalancedShare, balance_images
from paddle_vl_sp.vision.parallel import QWEN3_VL_ALPHA

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Frames of an image or video that a rank decodes: all of them, or a run."""

    sample: int
    image: int  # of the sample
    frames: slice


@dataclass(frozen=True, eq=False)
class LoadStep:
    """What one rank loads for one step."""

    samples: tuple[int, ...]  # of its batch: their text
    parts: tuple[Part, ...]  # whose pixels it decodes, in the order in which it encodes them
    share: BalancedShare  # of all ranks


class BalancedSampler:
    """Yields what a rank loads, step by step: [LoadStep], for `batch_sampler` of a data loader.

    grids            of every sample of the data set its images' grids [I, 3], known without decoding
    batch_size       samples of one copy of the model in one step
    num_copies       batches in one step: the data-parallel ranks
    rank             of num_copies * ranks_per_batch; the ranks of one batch follow each other
    ranks_per_batch  ranks that hold one batch, such as those of sequence parallelism
    shuffle, seed    the order is that of the seed and the epoch (`set_epoch`), the same on every rank

    Every rank makes the same shares from the same sizes, and nothing is exchanged. All copies make equally many steps:
    the first samples of the order fill up the last step. Other arguments are those of `balance_images`.
    """

    def __init__(
        self,
        grids: Sequence[npt.ArrayLike],
        batch_size: int,
        num_copies: int,
        rank: int,
        *,
        merge_size: int,
        ranks_per_batch: int = 1,
        policy: str = "longest",
        split_frames: bool = False,
        alpha: int = QWEN3_VL_ALPHA,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not len(grids) or batch_size < 1 or not 0 <= rank < num_copies * ranks_per_batch:
            raise ValueError(
                f"a sampler needs samples, a batch_size of at least 1 and a rank below num_copies * ranks_per_batch, "
                f"got {len(grids)} samples, batch_size {batch_size}, rank {rank} of {num_copies} * {ranks_per_batch}"
            )
        self.grids = [np.asarray(grid, dtype=np.int64).reshape(-1, 3) for grid in grids]
        self.batch_size, self.num_copies, self.rank = batch_size, num_copies, rank
        self.ranks_per_batch, self.merge_size, self.alpha = ranks_per_batch, merge_size, alpha
        self.policy, self.split_frames = policy, split_frames
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.grids) // (self.batch_size * self.num_copies))

    def __iter__(self) -> Iterator[list[LoadStep]]:
        order = np.arange(len(self.grids))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        steps = np.resize(order, [len(self), self.num_copies, self.batch_size])  # filled up from the start
        return ([self._step(batches)] for batches in steps)

    def _step(self, batches: Integers) -> LoadStep:
        """Of the samples of all copies, [num_copies, batch_size]."""
        share = balance_images(
            [np.concatenate([self.grids[sample] for sample in batch]) for batch in batches],
            self.merge_size,
            self.alpha,
            self.policy,
            self.split_frames,
            self.ranks_per_batch,
        )
        own = batches[self.rank // self.ranks_per_batch].tolist()
        return LoadStep(tuple(own), tuple(self._parts(batches.ravel(), share)), share)

    def _parts(self, samples: Integers, share: BalancedShare) -> Iterator[Part]:
        """What this rank encodes, with consecutive frames of a video as one part."""
        number = [len(self.grids[sample]) for sample in samples]
        sample_of = np.repeat(samples, number)  # of each image
        first_image = np.repeat(np.cumsum(number) - number, number)
        first_item = np.searchsorted(share.image, np.arange(len(sample_of)))
        own = share.encoded_items(self.rank)
        frame = own - first_item[share.image[own]] if self.split_frames else np.zeros_like(own)
        begin = 0
        for end, frames in zip(_ends_of_runs(own, share.image[own]), share.encoded_grid(self.rank)[:, 0], strict=True):
            image = int(share.image[own[begin]])
            first = int(frame[begin])
            yield Part(int(sample_of[image]), image - int(first_image[image]), slice(first, first + int(frames)))
            begin = end


class BalancedDataset(paddle.io.Dataset):  # type: ignore[misc]
    """Loads what a `BalancedSampler` yields.

    load_sample  (sample) -> its text, or whatever the model needs of it beside pixels
    load_pixels  (sample, image, frames) -> their patches [P, C]; frames: a slice, of all that it has or a run
    pixel_width  C, for a rank that decodes nothing
    """

    def __init__(
        self,
        load_sample: Callable[[int], Any],
        load_pixels: Callable[[int, int, slice], npt.NDArray[Any]],
        pixel_width: int,
    ) -> None:
        super().__init__()
        self.load_sample, self.load_pixels, self.pixel_width = load_sample, load_pixels, pixel_width

    def __getitem__(self, step: LoadStep) -> dict[str, Any]:
        """samples: a list; pixel_values [P, C]: what this rank encodes; share: for `encode_assigned`."""
        pixels = [self.load_pixels(part.sample, part.image, part.frames) for part in step.parts]
        return {
            "samples": [self.load_sample(sample) for sample in step.samples],
            "pixel_values": np.concatenate(pixels) if pixels else np.zeros([0, self.pixel_width], dtype=np.float32),
            "share": step.share,
        }


def only_item(items: list[Any]) -> Any:
    """The collate function of a loader whose batches are single items."""
    return items[0]


def _ends_of_runs(own: Integers, image: Integers) -> Integers:
    """Where each run of consecutive items of one image ends: own [3 4 7 8], image [1 1 2 3] -> [2 3 4]"""
    is_last = np.ones(len(own), dtype=bool)
    is_last[:-1] = (np.diff(own) != 1) | (np.diff(image) != 0)
    return np.flatnonzero(is_last) + 1
