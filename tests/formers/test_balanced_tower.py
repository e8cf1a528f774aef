"""vision_dp="data" switched on and off, and what is refused, in one process; tests/multi_rank has the ranks."""

import runpy
from types import SimpleNamespace
from unittest import mock

import numpy as np
import paddle
import pytest
from paddleformers.trainer.trainer import DEFAULT_CALLBACKS

from paddle_vl_sp import apply_to_paddleformers, apply_to_qwen3_vl, revert
from paddle_vl_sp.formers import balanced_tower, ending, groups, plugin, shared_tower, tiny

FAMILIES = {"qwen3_vl": tiny.tiny_qwen3_vl, "qwen2_5_vl": tiny.tiny_qwen2_5_vl}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_built_while_it_is_on(family):
    """And no other, once it is taken back."""
    with apply_to_paddleformers(families=family, vision_dp="data"):
        model = FAMILIES[family]()
        assert balanced_tower.is_balanced(model.model)
    assert not balanced_tower.is_balanced(model.model)
    with apply_to_paddleformers(families=family):
        assert not balanced_tower.is_balanced(FAMILIES[family]().model)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_sequence_parallelism_no_mark_stays(family):
    """The trainer would sum the tower's gradients by it, which are whole once the tower is not shared."""

    def marked(model):
        return [p for p in model.model.visual.parameters() if getattr(p, "sequence_parallel", False)]

    is_on = SimpleNamespace(sequence_parallel=True)  # which PaddleFormers builds on several ranks only
    with apply_to_paddleformers(families=family, vision_dp="data"):
        with mock.patch.object(shared_tower, "text_config", return_value=is_on):
            model = FAMILIES[family]()
        assert shared_tower.is_shared(model.model)
        assert marked(model)
    assert not shared_tower.is_shared(model.model)
    assert not marked(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples", [[["image", "video"], ["image"]], [["video"]], [[], []]])
def test_one_process_is_as_without(family, samples):
    """Bit for bit, loss and every gradient: there is no other rank to share with."""
    batch = tiny.draw_batch(samples, 64, seed=3, frames_apart=family == "qwen3_vl")
    found = []
    for how in (False, "data"):
        with apply_to_paddleformers(families=family, vision_dp=how):
            model = FAMILIES[family]()
            loss = model(**batch, position_ids=tiny.positions(model, batch)).loss
            loss.backward()
            found.append((float(loss), tiny.gradients_of(model)))
    (loss, right), (own_loss, own) = found
    assert own_loss == loss
    assert own.keys() == right.keys()
    assert all(np.array_equal(own[name], right[name]) for name in right)


def test_the_plugin_takes_the_word(monkeypatch):
    monkeypatch.setenv("PADDLE_VL_SP_VISION_DP", "data")
    monkeypatch.setenv("PADDLE_VL_SP_FAMILIES", "qwen2_5_vl")
    try:
        runpy.run_path(plugin.__file__)
        assert balanced_tower.is_balanced(tiny.tiny_qwen2_5_vl().model)
    finally:
        revert()
    monkeypatch.setenv("PADDLE_VL_SP_VISION_DP", "all")
    with pytest.raises(ValueError, match="PADDLE_VL_SP_VISION_DP must be one of '0', '1', 'data', got 'all'"):
        runpy.run_path(plugin.__file__)


@pytest.mark.parametrize("value", ["sp", "1", 2, None])
def test_another_word_is_an_error(value):
    with pytest.raises(ValueError, match=f"vision_dp must be one of False, True, 'data', got {value!r}"):
        apply_to_qwen3_vl(vision_dp=value)


def test_a_method_of_its_own_for_videos_is_refused():
    """Images and videos are encoded in one call."""
    with apply_to_paddleformers(families="qwen2_5_vl"):
        model = tiny.tiny_qwen2_5_vl()
        inner = type(model.model)
        own = type("OwnVideos", (inner,), {"get_video_features": lambda self, *args: None, "__module__": __name__})
        own.get_video_features.__module__ = __name__
        model.model.__class__ = own
        with pytest.raises(ValueError, match="OwnVideos, which has its own get_video_features: images and videos"):
            apply_to_paddleformers(model, families="qwen2_5_vl", vision_dp="data")
        assert not balanced_tower.is_balanced(model.model)


def test_a_training_says_that_it_has_ended():
    """On the group of the model's data ranks, where a model is balanced; the callback goes with the report."""
    before = list(DEFAULT_CALLBACKS)
    with apply_to_paddleformers(families="qwen2_5_vl", vision_dp="data"):
        (callback,) = [each for each in DEFAULT_CALLBACKS if each not in before]
        apply_to_paddleformers(families="qwen2_5_vl", vision_dp="data")
        assert [each for each in DEFAULT_CALLBACKS if each not in before] == [callback]
        model = tiny.tiny_qwen2_5_vl()
        with (
            mock.patch.object(ending, "stop_balancing") as stop,
            mock.patch.object(ending, "data_group", return_value="the data ranks"),
        ):
            callback().on_train_end(None, None, None)
        stop.assert_called_once_with("the data ranks")
        del model
    revert()
    assert before == DEFAULT_CALLBACKS


def topology(data, sharding):
    one = SimpleNamespace(nranks=1)
    many = {"data": SimpleNamespace(nranks=data), "sharding": SimpleNamespace(nranks=sharding)}
    return mock.Mock(
        get_data_parallel_group=lambda: many["data"] if data > 1 else one,
        get_sharding_parallel_group=lambda: many["sharding"] if sharding > 1 else one,
        create_fuse_group=mock.Mock(return_value=([0, 1, 2, 3], "both")),
        many=many,
    )


def test_the_group_of_other_batches():
    """Of data parallelism, of sharding, or of both joined, which is made once; None where there is one copy."""
    for found, wanted in ((topology(2, 1), "data"), (topology(1, 4), "sharding")):
        with mock.patch.object(groups, "topology", return_value=found):
            assert groups.data_group() is found.many[wanted]
    with mock.patch.object(groups, "topology", return_value=topology(1, 1)):
        assert groups.data_group() is None
    both = topology(2, 2)
    with mock.patch.object(groups, "topology", return_value=both):
        assert groups.data_group() == groups.data_group() == "both"
    both.create_fuse_group.assert_called_once_with(["data", "sharding"])
    with mock.patch.object(groups, "topology", return_value=None):
        assert groups.data_group() is None  # one process


def test_zero_rows_have_the_width_of_the_tower():
    """[0, C] and [0, 3]: what a rank brings that has text only."""
    config = tiny.tiny_qwen2_5_vl().model.visual.config
    pixels, grid = balanced_tower._nothing(config, paddle.CPUPlace())
    assert pixels.shape == [0, tiny.PATCH_SIZE]
    assert grid.shape == [0, 3]
