"""The embedding subclasses: every key as PaddleFleet makes it where it is right, bit-exact, and the index arrays."""

import numpy as np
import paddle
import pytest
from fleet_cases import (
    BOTH,
    GATHER,
    IMAGE,
    IMAGES,
    KIND_IDS,
    LEVELS,
    MASK,
    PAD,
    UPDATE,
    VIDEO,
    VIDEOS,
    WIDTH,
    a_batch,
    assert_output,
    assert_same_as_upstream,
    build,
    config,
    equal_indices,
    expected_output,
    ours,
    run,
    some_ids,
    table,
)

from arrays import same_bits
from paddle_vl_sp.testing import FakeGroup

pytestmark = pytest.mark.usefixtures("shape")
CLASSES = ["VisualGPTEmbedding", "VisualQwen3VLTextEmbedding"]


@pytest.mark.parametrize("num_levels", [0, 3])
@pytest.mark.parametrize("kinds", [IMAGES, VIDEOS, BOTH])
def test_indices_match_mask_without_sp(kinds, num_levels):
    """Integers, exact: update is where the mask is, gather counts up; every other value against numpy, bit-exact."""
    for batch_size, seed in ((1, 0), (2, 1), (5, 2)):
        batch = a_batch(some_ids(kinds, batch_size, 12, seed), kinds, num_levels)
        out = run(build(config(), ours()), batch)
        mask = out[MASK].numpy()
        assert out[UPDATE].numpy().tolist() == np.flatnonzero(mask).tolist()
        assert out[GATHER].numpy().tolist() == list(range(mask.sum()))
        assert_output(out, batch, kinds, num_levels)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kinds", [IMAGES, BOTH])
def test_mocked_rank_and_size_with_sp(kinds, size):
    """Bit-exact: every rank of every size has its part of the full result, and each feature row has one owner."""
    for batch_size in (1, 3):
        batch = a_batch(some_ids(kinds, batch_size, 16, seed=batch_size), kinds, 2)
        owned = []
        for rank in range(size):
            embedding = build(config(sequence_parallel=True, tensor_model_parallel_size=size), ours())
            out = run(embedding, batch, FakeGroup(rank, size))
            assert_output(out, batch, kinds, 2, size, rank, sequence_first=True)
            owned += out[GATHER].numpy().tolist()
        assert sorted(owned) == list(range(out[LEVELS][0].shape[0]))


def test_tensor_parallel_without_sp_holds_the_whole_sequence():
    """Bit-exact: a group of two, but nothing is cut, so every rank has every row."""
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    out = run(build(config(tensor_model_parallel_size=2), ours()), batch, FakeGroup(1, 2))
    assert_output(out, batch, IMAGES, 2)


def test_an_embedding_of_text_alone_does_not_look_at_features():
    """Bit-exact: multimodal_embedding=False is PaddleFleet's business, with all its keys and no other."""
    cfg = config(multimodal_embedding=False)
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    assert_same_as_upstream(run(build(cfg, ours()), batch), run(build(cfg), batch), set())


@pytest.mark.parametrize(
    ("members", "global_rank"),
    [([2, 3], 3), ([4, 5, 6, 7], 6), ([1, 3], 1), ([0, 4], 4)],
    ids=["dp x tp", "pp x tp", "tp outermost", "tp strided"],
)
def test_the_rank_within_the_group_counts_not_the_global_rank(monkeypatch, members, global_rank):
    """Bit-exact: groups whose members are not 0..n-1, and a global rank that would be another share."""
    monkeypatch.setattr(paddle.distributed, "get_rank", lambda *_: global_rank)
    size, rank = len(members), members.index(global_rank)
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    embedding = build(config(sequence_parallel=True, tensor_model_parallel_size=size), ours())
    out = run(embedding, batch, FakeGroup(rank, size, members))
    assert_output(out, batch, IMAGES, 2, size, rank, sequence_first=True)


@pytest.mark.parametrize("features", ["none", "empty"])
def test_empty_visual(features):
    """Bit-exact: a batch without visual tokens has PaddleFleet's text output and none of our keys."""
    ids = some_ids((), 2, 8)
    batch = a_batch(ids, () if features == "none" else IMAGES, 2)
    for sequence_parallel, group in ((False, None), (True, None), (True, FakeGroup(1, 2))):
        embedding = build(config(sequence_parallel=sequence_parallel), ours())
        out = run(embedding, batch, group)
        text = run(build(config(sequence_parallel=sequence_parallel)), a_batch(ids, ()), group)
        assert_same_as_upstream(out, text, set())


def test_a_tower_that_ran_for_nothing_stays_in_the_graph():
    """A [0, H] feature gets a gradient of its shape, so that a sharded tower's backward runs on every rank."""
    batch = a_batch(some_ids((), 2, 8), IMAGES, 2)
    run(build(config(), ours()), batch)["hidden_states"].sum().backward()
    for x in (batch["image_embeds"], *batch["deepstack_image_embeds"]):
        assert x.grad is not None
        assert list(x.grad.shape) == [0, WIDTH]


@pytest.mark.parametrize("merge", ["rows", "upstream"])
def test_non_divisible_length(merge):
    """A sequence that does not divide raises with its length, the divisor and the next length that fits."""
    cls = type("Chosen", (ours(),), {"merge": merge})
    embedding = build(config(sequence_parallel=True, tensor_model_parallel_size=4), cls)
    batch = a_batch(some_ids(IMAGES, 2, 10), IMAGES, 1)
    with pytest.raises(ValueError, match=r"10, which is not divisible by 4 .* next length that fits is 12"):
        run(embedding, batch, FakeGroup(1, 4))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("num_levels", [0, 2])
@pytest.mark.parametrize("kinds", [(), IMAGES, VIDEOS])
def test_every_key_is_upstreams(name, kinds, num_levels):
    """Bit-exact against PaddleFleet's own class, for both merges; only the two index arrays are added."""
    cls = ours(name)
    base = cls.__mro__[2]
    batch = a_batch(some_ids(kinds, 2, 8), kinds, num_levels)
    added = {UPDATE, GATHER} if kinds else set()
    for sequence_parallel, groups in ((False, [None]), (True, [None, FakeGroup(0, 2), FakeGroup(1, 2)])):
        for group in groups:
            cfg = config(sequence_parallel=sequence_parallel)
            upstream = run(build(cfg, base), batch, group)
            for merge in ("rows", "upstream"):
                embedding = build(cfg, cls)
                embedding.merge = merge
                assert_same_as_upstream(run(embedding, batch, group), upstream, added)


@pytest.mark.parametrize("merge", ["rows", "upstream"])
def test_joint_levels_with_rows_for_both_kinds(merge):
    """Bit-exact against PaddleFleet, which merges image and video only where every level has a row for every token."""
    ids = some_ids(BOTH, 2, 12, seed=5)
    batch = a_batch(ids, BOTH, 2)
    visual = int(np.isin(ids, (IMAGE, VIDEO)).sum())
    for kind in BOTH:
        levels = [paddle.to_tensor(table(seed)[:1].repeat(visual, 0) * (1 + seed)) for seed in range(2)]
        batch[f"deepstack_{kind}_embeds"] = [
            level + paddle.arange(visual).astype("float32").unsqueeze(-1) for level in levels
        ]
    embedding = build(config(), ours())
    embedding.merge = merge
    assert_same_as_upstream(embedding(batch), build(config())(batch), {UPDATE, GATHER})


@pytest.mark.parametrize("num_levels", [0, 2])
def test_upstream_raises_on_image_and_video_together(num_levels):
    """The reason for our own joint order: the same batch raises in PaddleFleet (ours is tested above)."""
    batch = a_batch(some_ids(BOTH, 2, 12, seed=5), BOTH, num_levels)
    with pytest.raises((ValueError, TypeError)):
        build(config())(batch)
    assert_output(run(build(config(), ours()), batch), batch, BOTH, num_levels)


def test_a_stray_placeholder_of_a_kind_without_features_stays_text():
    """Bit-exact: a video id in a batch with images only is left as embedded, as PaddleFleet leaves it."""
    ids = some_ids(IMAGES, 2, 8)
    ids[1, 6:8] = VIDEO
    batch = a_batch(ids, IMAGES, 2)
    assert_same_as_upstream(run(build(config(), ours()), batch), run(build(config()), batch), {UPDATE, GATHER})


def test_padding_rows_are_zeroed_as_upstream():
    """Bit-exact: with expert parallelism and no tensor parallelism, padding rows are zero and the ids travel on."""
    cfg = config(expert_model_parallel_size=2)
    ids = some_ids(IMAGES, 2, 8)
    ids[1, 6:8] = PAD
    batch = a_batch(ids, IMAGES, 1)
    out = run(build(cfg, ours()), batch)
    assert_same_as_upstream(out, run(build(cfg), batch), {UPDATE, GATHER})
    assert not out["hidden_states"].numpy()[1, 6:8].any()
    assert "input_ids" in out


@pytest.mark.parametrize("given", ["argument", "key"])
def test_hidden_states_of_the_caller_go_through_untouched(given):
    """Bit-exact: decoder_input, as an argument or in place of ids, is PaddleFleet's business."""
    hidden = paddle.ones([2, 8, WIDTH])
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    embedding = build(config(), ours())
    if given == "argument":
        out = embedding(batch, decoder_input=hidden)
    else:
        out = embedding(batch | {"input_ids": None, "decoder_input": hidden})
    assert same_bits(out["hidden_states"], hidden.numpy())
    assert not {UPDATE, GATHER, MASK, LEVELS} & set(out)


@pytest.mark.parametrize("kinds", [IMAGES, BOTH])
def test_gradients_are_those_of_the_rows(kinds):
    """Pure movement, so bit-exact: features get the gradient at their rows, the table what is left."""
    ids = some_ids(kinds, 2, 8, seed=4)
    batch = a_batch(ids, kinds, 1)
    embedding = build(config(), ours())
    slope = np.random.default_rng(0).standard_normal((*ids.shape, WIDTH)).astype(np.float32)
    (run(embedding, batch)["hidden_states"] * paddle.to_tensor(slope)).sum().backward()
    for kind in kinds:
        assert same_bits(batch[f"{kind}_embeds"].grad, slope[ids == KIND_IDS[kind]])
    text = ~np.isin(ids, [KIND_IDS[kind] for kind in kinds])
    left = np.zeros((32, WIDTH), np.float32)
    np.add.at(left, ids[text], slope[text])
    np.testing.assert_allclose(embedding.embedding_weight.grad.numpy(), left, rtol=1e-6)


def test_frozen_weights():
    """Bit-exact: hidden states that are a leaf are not written into, and features still get their gradient."""
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    embedding = build(config(), ours())
    embedding.embedding_weight.stop_gradient = True
    out = run(embedding, batch)
    assert_output(out, batch, IMAGES, 2)
    out["hidden_states"].sum().backward()
    assert same_bits(batch["image_embeds"].grad, np.ones_like(batch["image_embeds"].numpy()))


def test_no_grad_makes_no_graph():
    """Evaluation and generation keep nothing for a backward that never comes."""
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    with paddle.no_grad():
        hidden = run(build(config(), ours()), batch)["hidden_states"]
    assert hidden.stop_gradient


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_features_of_another_dtype(dtype):
    """Bit-exact against PaddleFleet, which converts the main features to the hidden states' dtype and leaves levels."""
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 1, dtype=dtype)
    out, upstream = run(build(config(), ours()), batch), run(build(config()), batch)
    assert out["hidden_states"].dtype == paddle.float32
    assert same_bits(out["hidden_states"], upstream["hidden_states"].numpy())
    assert out[LEVELS][0].dtype == upstream[LEVELS][0].dtype


def test_nothing_is_added_to_the_state_and_the_callers_batch_is_left_alone():
    """Checkpoints go by these keys; a data loader may use its dict again."""
    embedding = build(config(), ours())
    assert list(embedding.state_dict()) == list(build(config()).state_dict())
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    before, levels = dict(batch), list(batch["deepstack_image_embeds"])
    out = run(embedding, batch)
    assert {key: id(value) for key, value in batch.items()} == {key: id(value) for key, value in before.items()}
    assert [id(x) for x in batch["deepstack_image_embeds"]] == [id(x) for x in levels]
    assert out[LEVELS] is not batch["deepstack_image_embeds"]


def test_replacing_the_name_in_the_spec_module_is_enough(monkeypatch):
    """PaddleFleet's spec looks the class up by name; stages are cut at names like TransformerLayer, not at this one."""
    from paddlefleet.models.gpt import gpt_layer_specs
    from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding

    monkeypatch.setattr(gpt_layer_specs, "GPTEmbedding", ours())
    embedding = build(config())
    assert type(embedding) is ours()
    assert isinstance(embedding, GPTEmbedding)
    assert "Layer" not in type(embedding).__name__
    assert embedding.build_schedule_node().name == "GPTEmbedding"


def test_upstream_merges_where_it_reads_the_mask_itself(monkeypatch):
    """Per-layer embeddings are cleared at visual tokens, which a forward without features does not know."""
    from paddlefleet.models.gpt.gpt_embedding import GPTEmbedding

    seen, forward = [], GPTEmbedding.forward

    def noted(self, dict_args, *more):
        seen.append(dict_args.get("image_embeds") is not None)
        return forward(self, dict_args, *more)

    monkeypatch.setattr(GPTEmbedding, "forward", noted)
    for is_on in (False, True):
        cfg = config()
        cfg.use_per_layer_embeddings = is_on
        run(build(cfg, ours()), a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2))
    assert seen == [False, True]


@pytest.mark.parametrize(("stages", "filled_up"), [(None, False), (1, False), (2, True), ("running", True)])
def test_index_arrays_have_one_length_in_pipelines(monkeypatch, stages, filled_up):
    """Integers, exact: stage borders keep the first shape they see, so there -1 fills the arrays up to B * S_local."""
    from paddlefleet import parallel_state

    if stages == "running":
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
        stages = None
    cfg = config(sequence_parallel=True, **({} if stages is None else {"pipeline_model_parallel_size": stages}))
    for seed in range(3):
        batch = a_batch(some_ids(IMAGES, 2, 8, seed), IMAGES, 2)
        out = run(build(cfg, ours()), batch, FakeGroup(1, 2))
        expected = expected_output(batch, IMAGES, 2, 1, True)
        for key in (UPDATE, GATHER):
            tail = [-1] * (8 - expected[key].size) if filled_up else []
            assert equal_indices(out[key], [*expected[key].tolist(), *tail])


def test_an_object_made_without_its_constructor_works():
    """As PaddleFleet's own tests make it: __new__, a mocked embedding whose tp_group is no group, a patched scatter."""
    from unittest.mock import MagicMock

    cls = ours()
    embedding = cls.__new__(cls)
    paddle.nn.Layer.__init__(embedding)
    inner = MagicMock(return_value=paddle.ones([1, 6, 4]))
    inner.tp_group = object()
    attributes = {
        "config": config(sequence_parallel=True),
        "embedding": inner,
        "sequence_parallel": True,
        "multimodal_embedding": True,
        "position_embedding_type": "none",
        "rotary_pos_emb": None,
        "swa_rotary_pos_emb": None,
        "mrope_section": None,
    }
    for key, value in attributes.items():
        object.__setattr__(embedding, key, value)
    ids = paddle.to_tensor([[IMAGE, IMAGE, 15, 16, 10, 10]])
    out = embedding.forward({"input_ids": ids, "image_embeds": paddle.full([2, 4], 7.0)})
    assert out["hidden_states"][:, 0, 0].numpy().tolist() == [7, 7, 1, 1, 1, 1]
