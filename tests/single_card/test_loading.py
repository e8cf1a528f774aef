"""A rank loads what it will encode. Bar: over all ranks every frame of every image is decoded once, and no more."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_vl_sp.vision.loading import BalancedDataset, BalancedSampler, only_item

GRID = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).map(lambda g: [g[0], 2 * g[1], 2 * g[2]])
GRIDS = st.lists(st.lists(GRID, max_size=3), min_size=1, max_size=9)
WIDTH = 3


def samplers(grids, batch_size, copies, ranks_per_batch, **options):
    return [
        BalancedSampler(grids, batch_size, copies, rank, merge_size=2, ranks_per_batch=ranks_per_batch, **options)
        for rank in range(copies * ranks_per_batch)
    ]


def patches_of(grids):
    """[sample][image] -> [t, h * w, WIDTH], where each patch tells its sample, image and number."""
    return [
        [
            np.stack(np.broadcast_arrays(s, i, np.arange(t * h * w)), axis=1).reshape([t, h * w, WIDTH])
            for i, (t, h, w) in enumerate(own)
        ]
        for s, own in enumerate(grids)
    ]


@settings(max_examples=150, deadline=None)
@given(GRIDS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans(), st.integers(0, 3))
def test_every_frame_is_decoded_once(grids, batch_size, copies, ranks_per_batch, split_frames, seed):
    """Exact: each step, the ranks' pixels, put where their share says, are those of the samples of the batches."""
    pixels = patches_of(grids)
    decoded = []

    def load_pixels(sample, image, frames):
        found = pixels[sample][image][frames]
        decoded.append(found.shape[0] * found.shape[1])
        return found.reshape([-1, WIDTH])

    dataset = BalancedDataset(lambda sample: sample, load_pixels, WIDTH)
    ranks = samplers(grids, batch_size, copies, ranks_per_batch, split_frames=split_frames, seed=seed)
    used = []
    for steps in zip(*ranks, strict=True):
        decoded.clear()
        loaded = [dataset[step] for (step,) in steps]
        share = loaded[0]["share"]
        batches = [each["samples"] for each in loaded]
        assert batches == [batches[rank // ranks_per_batch * ranks_per_batch] for rank in range(len(batches))]
        samples = [sample for batch in batches[::ranks_per_batch] for sample in batch]
        used += samples
        wanted = [image for sample in samples for image in pixels[sample]]
        assert sum(decoded) == sum(image.shape[0] * image.shape[1] for image in wanted)
        ends = np.cumsum(share.patches)
        got = np.full([int(share.patches.sum()), WIDTH], -1)
        for rank, each in enumerate(loaded):
            assert len(each["pixel_values"]) == share.patches_encoded[rank]
            places = [np.arange(ends[j] - share.patches[j], ends[j]) for j in share.encoded_items(rank)]
            if places:
                got[np.concatenate(places)] = each["pixel_values"]
        assert got.tolist() == [row for image in wanted for row in image.reshape([-1, WIDTH]).tolist()]
    assert len(used) == len(ranks[0]) * batch_size * copies
    assert set(used) == set(range(len(grids)))


def test_the_order_is_that_of_seed_and_epoch():
    grids = [[[1, 2, 2]]] * 40

    def order(epoch, **options):
        (sampler,) = samplers(grids, 4, 1, 1, **options)
        sampler.set_epoch(epoch)
        return [sample for (step,) in sampler for sample in step.samples]

    assert order(0) == order(0) != order(1)
    assert order(0, seed=1) != order(0)
    assert sorted(order(0)) == order(3, shuffle=False) == list(range(40))


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    """Paddle's own, with and without worker processes."""
    grids = [[[1, 2, 2]] * (sample % 3) for sample in range(7)]
    pixels = patches_of(grids)
    dataset = BalancedDataset(
        lambda sample: {"text": sample}, lambda s, i, f: pixels[s][i][f].reshape([-1, WIDTH]).astype("float32"), WIDTH
    )
    found = []
    for rank, sampler in enumerate(samplers(grids, 2, 2, 1, alpha=0)):
        loader = paddle.io.DataLoader(dataset, batch_sampler=sampler, collate_fn=only_item, num_workers=workers)
        assert len(loader) == 2
        for step in loader:
            assert list(step["pixel_values"].shape) == [step["share"].patches_encoded[rank], WIDTH]
            found += [int(sample["text"]) for sample in step["samples"]]
    assert set(found) == set(range(7))


@pytest.mark.parametrize(("batch_size", "rank", "grids"), [(0, 0, [[]]), (1, 2, [[]]), (1, -1, [[]]), (1, 0, [])])
def test_wrong_arguments(batch_size, rank, grids):
    with pytest.raises(ValueError, match=f"got {len(grids)} samples, batch_size {batch_size}, rank {rank} of 2"):
        BalancedSampler(grids, batch_size, 2, rank, merge_size=2)
