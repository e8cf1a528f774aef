"""What blocks of the pages are given: the names that a reader's own program has. Named by `<!-- given NAME -->`."""

from types import SimpleNamespace

import numpy as np
import paddle
from paddle import nn

import tiny_tower
from paddle_vl_sp import SeqLayout
from paddle_vl_sp.attention import padded_layout
from paddle_vl_sp.testing import FakeGroup

IMAGE, VIDEO = 90, 91
GRID = [[1, 4, 4], [1, 2, 4], [1, 4, 6]]  # 4, 2 and 6 feature rows
IDS = [[1, *[IMAGE] * 4, 2, 3, 4], [*[IMAGE] * 2, 5, *[IMAGE] * 5], [IMAGE, *range(1, 8)], [7] * 8]


class Decoder(nn.Layer):
    """Layers that see one position each, so that a cut changes nothing but sums."""

    def __init__(self, vocabulary=100, width=tiny_tower.HIDDEN):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.LayerList([nn.Linear(width, width) for _ in range(3)])
        self.head = nn.Linear(width, vocabulary)


class Trained(Decoder):
    """With the loss of a batch, as PaddleFormers' models have it."""

    def forward(self, ids, labels):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = hidden + nn.functional.gelu(layer(hidden))
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.head(hidden), labels))


def own_audit():
    """A model whose copies see the same batch, and a batch for each rank."""
    paddle.seed(0)
    ids = paddle.to_tensor(IDS)
    group = paddle.distributed.get_group(0)
    own = ids.roll(group.rank, axis=1)
    batch = {"ids": ids, "labels": ids.roll(-1, axis=1)}
    return {
        "model": Trained(),
        "group": group,
        "batch": batch,
        "own_part": {name: value.chunk(group.nranks, axis=1)[group.rank] for name, value in batch.items()},
        "own_batch": {"ids": own, "labels": own.roll(-1, axis=1)},
    }


def a_shared_tower():
    paddle.seed(0)
    group = paddle.distributed.get_group(0)
    return {
        "tower": tiny_tower.tower(),
        "pixel_values": tiny_tower.pixels(GRID),
        "grid_thw": paddle.to_tensor(GRID),
        "input_ids": paddle.to_tensor(IDS),
        "image_id": IMAGE,
        "video_id": VIDEO,
        "sp_group": group,
        "layout": SeqLayout(8, sp_size=group.nranks, sp_rank=group.rank),
        "hidden": paddle.ones([4, 4, tiny_tower.HIDDEN]),
        "loss_of": lambda hidden: (hidden * hidden).mean(),
    }


def own_images():
    """Two batches of this rank: images, and text only."""
    group = paddle.distributed.get_group(0)
    grids = [np.array(GRID), np.zeros([0, 3], dtype=np.int64)][:: 1 - 2 * group.rank]
    return {
        "tower": tiny_tower.tower(),
        "data_group": group,
        "batches": [
            (tiny_tower.pixels(grid) if len(grid) else paddle.zeros([0, tiny_tower.CHANNELS]), paddle.to_tensor(grid))
            for grid in grids
        ],
        "loss_of": lambda features, levels: sum((rows * rows).sum() for rows in [features, *levels]),
    }


def sized_data():
    """Samples whose sizes are known, and what loads them."""
    group, grids = paddle.distributed.get_group(0), [[GRID[i % 3]] * (i % 4) for i in range(8)]
    return {
        "grids": grids,
        "rank": group.rank,
        "data_group": group,
        "tower": tiny_tower.tower(),
        "load_sample": lambda sample: sample,
        "load_pixels": lambda sample, image, frames: tiny_tower.pixels([grids[sample][image]]).numpy(),
        "pixel_width": tiny_tower.CHANNELS,
    }


def own_loop():
    paddle.seed(0)
    model = Decoder()
    model.visual = tiny_tower.tower()
    ids = paddle.to_tensor(IDS)
    batch = {
        "input_ids": ids,
        "labels": ids.roll(-1, axis=1),
        "pixel_values": tiny_tower.pixels(GRID),
        "image_grid_thw": paddle.to_tensor(GRID),
    }
    return {
        "model": model,
        "batch": batch,
        "group": paddle.distributed.get_group(0),
        "optimizer": paddle.optimizer.AdamW(parameters=model.parameters()),
        "image_id": IMAGE,
        "video_id": VIDEO,
    }


class OneAttention(nn.Layer):
    def __init__(self, vocabulary=100, heads=4, size=8):
        super().__init__()
        self.heads = heads
        self.embed, self.qkv = nn.Embedding(vocabulary, heads * size), nn.Linear(heads * size, 3 * heads * size)
        self.head = nn.Linear(heads * size, vocabulary)

    def split_heads(self, x):
        return (part.reshape([1, x.shape[1], self.heads, -1]) for part in self.qkv(x).chunk(3, axis=-1))


def a_packed_batch():
    paddle.seed(0)
    group, model = paddle.distributed.get_group(0), OneAttention()
    ids = paddle.to_tensor([[1, IMAGE, IMAGE, 2, 3, 4, 5, IMAGE, 6, 7, 8, 9]])
    features = paddle.randn([3, 32])
    return {"group": group, "batch": {"input_ids": ids, "labels": ids}, "model": model, "features": features} | {
        "image_id": IMAGE
    }


def two_groups():
    layout = padded_layout(16, cp_size=2, cp_rank=0, sp_size=2, sp_rank=0)
    return {"layout": layout, "groups": SimpleNamespace(ring=FakeGroup(0, 2), ulysses=FakeGroup(0, 2))}


def an_error_or_none():
    group = paddle.distributed.get_group(0)
    return {"error_or_none": None, "group": group, "input_ids": np.array(IDS)}


def replicas():
    paddle.seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    model.visual = model[0]
    group = paddle.distributed.get_group(0)
    optimizer = paddle.optimizer.AdamW(parameters=model.parameters())
    return {"model": model, "group": group, "tp_group": group, "optimizer": optimizer}


def a_plain_model():
    from paddle_vl_sp.formers.tiny import tiny_qwen3_vl

    return {"model": tiny_qwen3_vl()}


def a_trained_model():
    from paddle_vl_sp.formers import tiny

    model, batch = tiny.tiny_qwen3_vl(), tiny.draw_batch([["image"], ["image", "image"]])
    return {"model": model, "train": lambda model: model(**batch, position_ids=tiny.positions(model, batch))}


def a_trainer():
    """What has callbacks, and calls them."""
    callbacks = []
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))

    def train():
        for event in ("on_train_begin", "on_train_end"):
            for callback in callbacks:
                getattr(callback, event)(None, None, None)

    trainer.train = train
    return {"trainer": trainer}


def a_collate():
    return {"collate": lambda samples: {"input_ids": samples}, "image_token_id": IMAGE, "video_token_id": VIDEO}


def ids_of_a_model():
    return {"image_id": IMAGE, "video_id": VIDEO}
