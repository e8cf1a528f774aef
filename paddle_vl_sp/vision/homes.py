"""Which rank encodes which image, where every rank brings its own: a value, from known numbers. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paddle_vl_sp.settings import check_choice
from paddle_vl_sp.vision.moves import move_few, rank_of_each, sum_by_rank
from paddle_vl_sp.vision.share import image_of, imbalance, join_frames, share_images, vision_items

if TYPE_CHECKING:
    from paddle_vl_sp.comm.routed import Routes

POLICIES = ("longest", "contiguous", "count", "home")

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BalancedShare:
    """The images (or frames) of all batches, one after the other: who has the pixels, who encodes, who needs the rows.

    items            int64 [J, 3], the grid of each
    image            int64 [J], the image or video that each is of, counted over all batches
    batch            int64 [J], the batch that each is of, increasing
    costs            int64 [J]
    home             int64 [J], the rank that would encode it if nothing moved, increasing
    encoder          int64 [J], the rank that encodes
    ranks_per_batch  ranks that hold one batch, such as those of sequence parallelism: they follow each other
    policy           the rule that made the share
    """

    items: Integers
    image: Integers
    batch: Integers
    costs: Integers
    home: Integers
    encoder: Integers
    num_ranks: int
    ranks_per_batch: int
    merge_size: int
    policy: str

    @cached_property
    def patches(self) -> Integers:
        """[J]"""
        patches: Integers = self.items.prod(axis=1)
        return patches

    @cached_property
    def loads(self) -> Integers:
        """For each rank the cost of what it encodes, [ranks]."""
        return sum_by_rank(self.costs, self.encoder, self.num_ranks)

    @cached_property
    def loads_at_home(self) -> Integers:
        """For each rank the cost of what it brings: the loads if nothing moved."""
        return sum_by_rank(self.costs, self.home, self.num_ranks)

    @property
    def patches_encoded(self) -> Integers:
        return sum_by_rank(self.patches, self.encoder, self.num_ranks)

    @property
    def patches_at_home(self) -> Integers:
        return sum_by_rank(self.patches, self.home, self.num_ranks)

    @property
    def least_load(self) -> float:
        """No share has a smaller largest load: the mean, or the costliest item."""
        return max(float(self.loads.mean()), float(self.costs.max(initial=0)))

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load."""
        return imbalance(self.loads.tolist())

    @property
    def imbalance_at_home(self) -> float:
        return imbalance(self.loads_at_home.tolist())

    @property
    def moves(self) -> bool:
        """Whether any item is encoded away from home."""
        return bool((self.home != self.encoder).any())

    @property
    def moved_patches(self) -> int:
        return int(self.patches[self.home != self.encoder].sum())

    @property
    def sent_rows(self) -> int:
        """Feature rows that travel from who encodes them to the other ranks that hold the batch."""
        is_there = self.encoder // self.ranks_per_batch == self.batch
        return int((self.patches // self.merge_size**2 * (self.ranks_per_batch - is_there)).sum())

    def encoded_grid(self, rank: int) -> Integers:
        """What a rank encodes, [k, 3], with consecutive frames of a video as one grid."""
        return join_frames(self.items, self.image, self.encoded_items(rank).tolist())

    def encoded_items(self, rank: int) -> Integers:
        """The places in `items` of what a rank encodes, increasing."""
        items: Integers = np.flatnonzero(self.encoder == rank)
        return items

    def routes_of_pixels(self, rank: int) -> Routes:
        """From home to who encodes."""
        from paddle_vl_sp.comm.routed import routes_of_items

        wanted = self.encoder == np.arange(self.num_ranks)[:, None]
        return routes_of_items(self.home, wanted, self.patches, rank)

    def routes_of_rows(self, rank: int) -> Routes:
        """From who encodes to every rank that holds the batch."""
        from paddle_vl_sp.comm.routed import routes_of_items

        wanted = self.batch == np.arange(self.num_ranks)[:, None] // self.ranks_per_batch
        return routes_of_items(self.encoder, wanted, self.patches // self.merge_size**2, rank)

    def report(self) -> str:
        """Loads before and after, and what moves."""
        total, least = int(self.loads.sum()) or 1, self.least_load or 1.0
        moved = self.moved_patches / (int(self.patches.sum()) or 1)
        lines = [
            f"{len(self.items)} items of {self.num_ranks} ranks, {self.policy}: the busiest rank has "
            f"{self.imbalance_at_home:.3f} of the mean load at home and {self.imbalance:.3f} balanced "
            f"({self.loads.max() / least:.3f} of the least possible); {moved:.1%} of the patches move"
        ]
        for rank, (before, after) in enumerate(zip(self.loads_at_home, self.loads, strict=True)):
            lines.append(f"  rank {rank:3d}  {before / total:6.1%} of the load at home  {after / total:6.1%} balanced")
        return "\n".join(lines)


def balance_images(
    grids: Sequence[npt.ArrayLike],
    merge_size: int,
    alpha: int,
    policy: str = "longest",
    split_frames: bool = False,
    ranks_per_batch: int = 1,
) -> BalancedShare:
    """Shares the images of batches, grids[batch] [I, 3], over the ranks that hold them.

    longest     a rank with too much gives images away, large ones first, to the ranks with the smallest loads: the
                largest load is within 5 % of the least possible where the images allow it, and little moves
    contiguous  every rank gets a run of all ranks' images; the largest load is the smallest that runs allow
    count       runs of equally many images, whatever they cost; for comparison
    home        every rank encodes its own; for comparison

    Where several ranks hold a batch, its images are at home in runs of them, with the smallest largest load.
    """
    check_choice("policy", policy, POLICIES)
    by_batch = [np.asarray(grid, dtype=np.int64).reshape(-1, 3) for grid in grids]
    grid, num_ranks = np.concatenate(by_batch), len(by_batch) * ranks_per_batch
    costs, tokens, items = vision_items(grid, merge_size, alpha, split_frames)
    image = image_of(grid, split_frames)
    batch = np.repeat(np.arange(len(by_batch)), [len(own) for own in by_batch])[image]
    home = _homes(batch, costs, ranks_per_batch)
    if policy == "longest":
        encoder = move_few(costs, items.prod(axis=1), home, num_ranks)
    elif policy == "home":
        encoder = home
    else:
        share = share_images(costs.tolist(), tokens.tolist(), num_ranks, policy)
        encoder = rank_of_each(share.items, len(items))
    return BalancedShare(items, image, batch, costs, home, encoder, num_ranks, ranks_per_batch, merge_size, policy)


def _homes(batch: Integers, costs: Integers, ranks_per_batch: int) -> Integers:
    if ranks_per_batch == 1:
        return batch
    home = batch * ranks_per_batch
    for each in np.unique(batch):
        own = batch == each
        runs = share_images(costs[own].tolist(), [0] * int(own.sum()), ranks_per_batch).items
        home[own] += rank_of_each(runs, int(own.sum()))
    return home
