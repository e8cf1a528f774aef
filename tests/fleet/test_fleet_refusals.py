"""What the embedding takes from a data loader, what it compares on demand, and what it refuses before any write."""

import numpy as np
import paddle
import pytest
from fleet_cases import (
    BOTH,
    GATHER,
    IMAGE,
    IMAGES,
    KIND_IDS,
    UPDATE,
    VIDEO,
    a_batch,
    assert_output,
    assert_same_as_upstream,
    build,
    config,
    expected_output,
    in_group,
    layout_of,
    ours,
    run,
    some_ids,
)

from arrays import same_bits
from paddle_vl_sp import plan_visual
from paddle_vl_sp.testing import FakeGroup

pytestmark = pytest.mark.usefixtures("shape")


def loader_plan(ids, kinds, size=1, rank=0, sequence_first=False, **more):
    kind_ids = tuple(KIND_IDS[kind] for kind in kinds)
    return plan_visual(ids, kind_ids, layout_of(ids, size, rank), sequence_first=sequence_first, **more)


@pytest.mark.parametrize("held", ["numpy", "tensor", "padded", "every rank's"])
def test_a_plan_of_the_data_loader_is_taken(held, monkeypatch):
    """Bit-exact, and the embedding plans nothing itself."""
    from paddle_vl_sp.fleet import inputs

    ids = some_ids(IMAGES, 3, 8)
    batch = a_batch(ids, IMAGES, 2)
    count = int((ids == IMAGE).sum())
    more = {"padded": True, "num_features": count} if held == "padded" else {}
    plan = loader_plan(ids, IMAGES, 2, 1, True, **more)
    wrap = (lambda x: x) if held == "numpy" else paddle.to_tensor
    if held == "every rank's":
        wrap = lambda x: paddle.to_tensor(np.stack([np.full_like(x, -1), x]))  # noqa: E731
    batch |= {UPDATE: wrap(plan.update_indices), GATHER: wrap(plan.gather_indices)}
    monkeypatch.setattr(inputs, "plan_visual", None)
    embedding = build(config(sequence_parallel=True), ours())
    out = run(embedding, batch, FakeGroup(1, 2))
    expected = expected_output(batch, IMAGES, 2, 1, True)
    assert same_bits(out["hidden_states"], expected["hidden_states"])
    assert [i for i in out[GATHER].numpy().tolist() if i >= 0] == expected[GATHER].tolist()


@pytest.mark.parametrize("held", ["numpy", "tensor"])
def test_the_order_of_images_and_videos_is_taken_from_the_data_loader(held, monkeypatch):
    """Bit-exact, with no order made by the embedding; one of the wrong length is refused."""
    from paddle_vl_sp.fleet import inputs

    ids = some_ids(BOTH, 3, 8)
    batch = a_batch(ids, BOTH, 2)
    is_video = ids[np.isin(ids, (IMAGE, VIDEO))] == VIDEO
    order = np.where(is_video, (~is_video).sum() + np.cumsum(is_video) - 1, np.cumsum(~is_video) - 1)
    batch["visual_feature_order"] = order if held == "numpy" else paddle.to_tensor(order)
    monkeypatch.setattr(inputs, "joint_features", None)
    assert_output(run(build(config(), ours()), batch), batch, BOTH, 2)
    with pytest.raises(ValueError, match=r"has \d+ visual tokens but \d+ feature rows"):
        run(build(config(), ours()), batch | {"visual_feature_order": batch["visual_feature_order"][:-1]})


def spoiled(ids, spoil):
    plan = loader_plan(ids, IMAGES)
    update, gather = plan.update_indices, plan.gather_indices
    if spoil == "shorter":
        return update[:-1], gather[:-1]
    if spoil == "uneven":
        return update, gather[:-1]
    if spoil == "int32":
        return update.astype(np.int32), gather.astype(np.int32)
    if spoil == "two-dimensional":
        return update[:, None], gather[:, None]
    if spoil == "one missing":
        return update, None
    if spoil == "out of range":
        return update + 100, gather
    if spoil == "backwards":
        return update, gather[::-1].copy()
    return np.zeros_like(update), gather


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("shorter", r"has \d+ visual rows for this rank, but there are \d+ feature rows and 16 rows"),
        ("uneven", "1-D and of one length"),
        ("int32", "must be int64, got .'int32'."),
        ("two-dimensional", "1-D and of one length"),
        ("one missing", "no visual_gather_indices"),
        ("out of range", "not a plan for 16 rows"),
        ("backwards", "gather indices must increase"),
        ("repeated", "must be different rows"),
    ],
)
def test_a_plan_that_cannot_be_of_this_batch_is_refused(spoil, says):
    """Refused before any write, each with its own words."""
    ids = some_ids(IMAGES, 2, 8)
    update, gather = spoiled(ids, spoil)
    batch = a_batch(ids, IMAGES, 1) | {UPDATE: update, GATHER: gather}
    with pytest.raises(ValueError, match=says):
        run(build(config(), ours()), batch)


def test_check_compares_a_loaded_plan_with_a_fresh_one(monkeypatch):
    """A plan of another rank has the right sizes; only PADDLE_VL_SP_CHECK=1 tells."""
    ids = np.tile(some_ids(IMAGES, 2, 4), (1, 2))  # both ranks hold equally many
    plan = loader_plan(ids, IMAGES, 2, 0, True)
    batch = a_batch(ids, IMAGES, 1) | {UPDATE: plan.update_indices, GATHER: plan.gather_indices}
    embedding = build(config(sequence_parallel=True), ours())
    run(embedding, batch, FakeGroup(1, 2))
    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    run(embedding, batch, FakeGroup(0, 2))
    with pytest.raises(ValueError, match=r"visual_gather_indices of rank 1 of the batch is not what its ids ask for"):
        run(embedding, batch, FakeGroup(1, 2))


@pytest.mark.parametrize("broken", ["nothing", "values", "keys"])
@pytest.mark.parametrize("group", [None, FakeGroup(1, 2)], ids=["whole", "sp"])
def test_check_compares_the_merge_with_upstreams(monkeypatch, broken, group):
    """Bit-exact, or an error that names the key."""
    from paddle_vl_sp.fleet import embedding as module

    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    embedding = build(config(sequence_parallel=group is not None), ours())
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    if broken == "nothing":
        assert UPDATE in run(embedding, batch, group)
        return
    key = "hidden_states" if broken == "values" else "visual_pos_masks"
    if broken == "values":
        real = module.replace_rows
        monkeypatch.setattr(module, "replace_rows", lambda *args: real(*args) + 1e-7)
    else:
        monkeypatch.setattr(module, "MASK", "elsewhere")
    with pytest.raises(ValueError, match=f"PADDLE_VL_SP_CHECK: .*{key}"):
        run(embedding, batch, group)


def test_check_raises_no_false_alarm_under_dropout(monkeypatch):
    """Two forwards drop other values, so there is nothing to compare; in evaluation nothing drops, and there is."""
    from paddle_vl_sp.fleet import embedding as module

    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    real = module.replace_rows
    monkeypatch.setattr(module, "replace_rows", lambda *args: real(*args) + 1e-3)
    embedding = build(config(hidden_dropout_prob=0.5), ours())
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    run(embedding, batch)
    embedding.eval()
    with pytest.raises(ValueError, match="PADDLE_VL_SP_CHECK: hidden_states differs"):
        run(embedding, batch)


def spoiled_batch(spoil):
    batch = a_batch(some_ids(BOTH, 2, 12, seed=5), BOTH, 2)
    image, levels = batch["image_embeds"], batch["deepstack_image_embeds"]
    changes = {
        "a row too few": {"image_embeds": image[:-1], "deepstack_image_embeds": [level[:-1] for level in levels]},
        "swapped counts": {
            "image_embeds": paddle.concat([image, image[:1]]),
            "deepstack_image_embeds": None,
            "deepstack_video_embeds": None,
            "video_embeds": batch["video_embeds"][1:],
        },
        "a level with a row too few": {"deepstack_image_embeds": [levels[0], levels[1][:-1]]},
        "levels of one kind": {"deepstack_video_embeds": None},
        "fewer levels": {"deepstack_video_embeds": batch["deepstack_video_embeds"][:1]},
    }
    return batch | changes[spoil]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ("a row too few", r"has \d+ visual tokens but \d+ feature rows"),
        ("swapped counts", r"has \d+ image tokens but \d+ feature rows"),
        ("a level with a row too few", r"deepstack level 1 of image has \d+ rows, but image_embeds has \d+"),
        ("levels of one kind", "image.: 2, .video.: 0"),
        ("fewer levels", "image.: 2, .video.: 1"),
    ],
)
def test_features_that_do_not_match_are_refused_with_both_numbers(spoil, says):
    """Refused before any write."""
    embedding = build(config(), ours())
    with pytest.raises(ValueError, match=says):
        run(embedding, spoiled_batch(spoil))


def test_combinations_that_cannot_be_right_are_refused_by_name(monkeypatch):
    """Refused before any write, with the settings that do not go together."""
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    with pytest.raises(ValueError, match=r"multi-token prediction .* with 2 deepstack levels"):
        run(build(config(num_nextn_predict_layers=1), ours()), batch)
    magic = config(num_nextn_predict_layers=1, enable_mtp_magic_send=True, sequence_parallel=True)
    with pytest.raises(ValueError, match="enable_mtp_magic_send with sequence_parallel"):
        run(build(magic, ours()), batch | {"deepstack_image_embeds": None})
    embedding = build(config(), ours())
    embedding.merge = "both"
    with pytest.raises(ValueError, match="merge must be one of 'rows', 'upstream', got 'both'"):
        run(embedding, batch)
    from paddle_vl_sp.fleet import embedding as module

    monkeypatch.setattr(module, "context_parallel_size", lambda: 2)
    with pytest.raises(ValueError, match=r"context parallel \(size 2\) with visual features"):
        run(build(config(), ours()), batch)
    run(build(config(), ours()), a_batch(some_ids((), 2, 8), ()))  # text is PaddleFleet's business


def test_a_subclass_that_cuts_by_context_parallel_says_its_layout(monkeypatch):
    """Bit-exact: the plan follows visual_layout; here a whole sequence under a context-parallel size of 2."""
    from paddle_vl_sp.fleet import embedding as module

    monkeypatch.setattr(module, "context_parallel_size", lambda: 2)
    cls = type("Whole", (ours(),), {"visual_layout": lambda _, seq_len: layout_of(np.zeros((1, seq_len)), 1, 0)})
    batch = a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2)
    assert_output(run(build(config(), cls), batch), batch, IMAGES, 2)


def test_mtp_without_levels_is_upstreams_business():
    """Either PaddleFleet's own result, bit-exact and with nothing added, or its own refusal."""
    cfg = config(num_nextn_predict_layers=2)
    batch = a_batch(some_ids(IMAGES, 1, 8), IMAGES, 0)
    try:
        upstream = run(build(cfg), batch)
    except AssertionError:
        with pytest.raises(AssertionError):
            run(build(cfg, ours()), batch)
        return
    assert_same_as_upstream(run(build(cfg, ours()), batch), upstream, set())


def test_a_missing_group_under_sp_is_an_error_with_a_mend():
    """An error that says what to call first."""
    embedding = build(config(sequence_parallel=True), ours())
    with pytest.raises(ValueError, match=r"no tensor-parallel group.*initialize_model_parallel"):
        run_without_group(embedding, a_batch(some_ids(IMAGES, 2, 8), IMAGES, 2))


def run_without_group(embedding, batch):
    with in_group(embedding, None):
        return embedding(batch)
