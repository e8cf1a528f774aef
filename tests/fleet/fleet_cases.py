"""Embeddings, layers and batches of a tiny model, and what its embedding must return, token by token in numpy."""

import contextlib
from unittest import mock

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.meta_parallel import build_spec_layer

import oracle
from arrays import same_bits
from fleet_parts import WIDTH, fleet_config
from paddle_vl_sp import SeqLayout

IMAGE, VIDEO, PAD, VOCAB = 7, 8, 0, 32
IMAGES, VIDEOS, BOTH = ("image",), ("video",), ("image", "video")
KIND_IDS = {"image": IMAGE, "video": VIDEO}
UPDATE, GATHER = "visual_update_indices", "visual_gather_indices"
LEVELS, MASK = "deepstack_visual_emb", "visual_pos_masks"


def config(**given):
    return fleet_config(image_token_id=IMAGE, video_token_id=VIDEO, **given)


def build(cfg, cls=None, seed=3):
    """The embedding as PaddleFleet's spec builds it, with the class exchanged, and with the same weights every time."""
    from paddlefleet.models.gpt.gpt_layer_specs import get_gpt_spec

    spec = get_gpt_spec(cfg, [], None, vocab_size=VOCAB, max_sequence_length=64, position_embedding_type="none")
    embedding_spec = spec.sublayers_spec.embedding
    if cls is not None:
        embedding_spec.layer = cls
    embedding = build_spec_layer(embedding_spec)
    weight = embedding.embedding.embed_tokens.weight
    is_cut = weight.shape[0] < VOCAB
    first = embedding.embedding.embed_tokens.vocab_start_index if is_cut else 0  # this rank's part of the table
    weight.set_value(table(seed)[first : first + weight.shape[0]])
    return embedding


def table(seed=3):
    return np.random.default_rng(seed).standard_normal((VOCAB, WIDTH)).astype(np.float32)


@contextlib.contextmanager
def in_group(embedding, group):
    """The embedding as rank `group.rank` of a tensor-parallel group, while it runs; nothing communicates forward."""
    embedding.embedding.tp_group = group
    with mock.patch("paddle.distributed.is_initialized", return_value=True):
        yield embedding


def some_ids(kinds=("image",), batch=2, seq_len=8, seed=0, density=0.5):
    """Text ids with the kinds sprinkled over them at random."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, VOCAB - 1, (batch, seq_len))
    for kind in kinds:
        ids[rng.random(ids.shape) < density / len(kinds)] = KIND_IDS[kind]
    for place, kind in enumerate(kinds):  # at least one of each
        ids[0, place] = KIND_IDS[kind]
    return ids


def a_batch(ids, kinds=("image",), num_levels=2, seed=1, dtype="float32"):
    """What a model hands to the embedding: features by kind, each with a level list."""
    rng = np.random.default_rng(seed)

    def rows(n):
        x = paddle.to_tensor(rng.standard_normal((n, WIDTH)).astype(np.float32)).astype(dtype)
        x.stop_gradient = False
        return x

    batch = {"input_ids": paddle.to_tensor(ids), "position_ids": None, "attention_mask": None}
    for kind, kind_id in KIND_IDS.items():
        n = int((ids == kind_id).sum())
        batch[f"{kind}_embeds"] = rows(n) if kind in kinds else None
        batch[f"deepstack_{kind}_embeds"] = (
            [rows(n) for _ in range(num_levels)] if kind in kinds and num_levels else None
        )
    return batch


def reading_order(batch, kinds, place):
    """Feature rows of all kinds in reading order, [N, H]; place 0 is main, 1 and up the levels."""
    ids = batch["input_ids"].numpy()
    by_kind = {}
    for kind in kinds:
        features = [batch[f"{kind}_embeds"], *(batch[f"deepstack_{kind}_embeds"] or [])]
        by_kind[KIND_IDS[kind]] = iter(features[place].astype("float32").numpy())
    return np.stack([next(by_kind[token]) for token in ids.flatten() if token in by_kind])


def expected_output(batch, kinds, size=1, rank=0, sequence_first=False, weights=None):
    """hidden_states, mask, update and gather of one rank, token by token from the full sequence."""
    ids = batch["input_ids"].numpy()
    visual = np.isin(ids, [KIND_IDS[kind] for kind in kinds])
    hidden = (table() if weights is None else weights)[ids]
    positions = oracle.cut_positions(ids.shape[1], 1, 0, "zigzag", size, rank)
    main = reading_order(batch, kinds, 0)
    part = oracle.full_then_cut(hidden, main, visual, positions, sequence_first, lambda _, feature: feature)
    update, gather = oracle.pairs(visual, positions, sequence_first)
    return {"hidden_states": part, MASK: visual, UPDATE: np.array(update), GATHER: np.array(gather)}


def equal_indices(got, expected):
    return got.dtype == paddle.int64 and got.numpy().tolist() == np.asarray(expected).tolist()


def layout_of(ids, size, rank):
    return SeqLayout(ids.shape[1], sp_size=size, sp_rank=rank)


def ours(name="VisualGPTEmbedding"):
    from paddle_vl_sp import fleet

    try:
        return getattr(fleet, name)
    except ImportError as error:
        pytest.skip(str(error))


def run(embedding, batch, group=None):
    if group is None:
        return embedding(batch)
    with in_group(embedding, group):
        return embedding(batch)


def assert_output(out, batch, kinds, num_levels, size=1, rank=0, sequence_first=False):
    expected = expected_output(batch, kinds, size, rank, sequence_first)
    assert same_bits(out["hidden_states"], expected["hidden_states"])
    assert same_bits(out[MASK], expected[MASK])
    assert equal_indices(out[UPDATE], expected[UPDATE])
    assert equal_indices(out[GATHER], expected[GATHER])
    assert len(out.get(LEVELS, [])) == num_levels
    for place, level in enumerate(out.get(LEVELS, []), start=1):
        assert same_bits(level, reading_order(batch, kinds, place))


def assert_same_as_upstream(out, upstream, added):
    assert set(out) == set(upstream) | added
    for key, expected in upstream.items():
        pairs = zip(out[key], expected, strict=True) if isinstance(expected, list) else [(out[key], expected)]
        for got, wanted in pairs:
            assert got.dtype == wanted.dtype
            assert got.stop_gradient == wanted.stop_gradient
            assert same_bits(got, wanted.numpy())
