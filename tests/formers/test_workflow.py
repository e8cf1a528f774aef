"""PADDLE_VL_SP_LOADER_PLANS=1: what it adds to the batches of PaddleFormers' command line."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddleformers.cli.train.sft import workflow

from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import UpstreamChanged, apply_to_paddleformers, plans_of_all_ranks, revert, tiny
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.formers.workflow import plan_if_asked, plan_in_workflow, planning

IMAGE, VIDEO = 7, 8


class FleetModel(paddle.nn.Layer):
    """The attributes by which the model on PaddleFleet is known, with a forward of ours."""

    def __init__(self):
        super().__init__()
        self.image_token_index, self.video_token_index = IMAGE, VIDEO
        self.vision_model = paddle.nn.Linear(1, 1)
        self.config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))

    def forward(self):
        pass


setattr(FleetModel.forward, OURS, None)


def arguments(degree=2, sequence_parallel=True):
    return SimpleNamespace(tensor_model_parallel_size=degree, sequence_parallel=sequence_parallel)


def collated(batch, **named):
    """The batch that leaves the loader; what the original was called with is in it."""
    planned = planning(lambda batch, **named: batch | {"called with": named})(batch, **named)
    assert planned.pop("called with") == named
    return planned


def refused(match, kind=ValueError, **named):
    """In the loader's thread it is logged, and the next forward raises it; in a worker process it is raised there."""
    batch = named.pop("batch", None) or a_batch()
    assert collated(batch, **named).keys() == batch.keys()
    with pytest.raises(kind, match=match):
        LoadedPlans.pop_from({})
    assert LoadedPlans.pop_from({}) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paddle.io, "get_worker_info", lambda: object())
        with pytest.raises(kind, match=match):
            collated(batch, **named)


def a_batch():
    ids = np.full((2, 8), 1)
    ids[0, 2:4], ids[1, 5] = IMAGE, VIDEO
    grids = {"image_grid_thw": np.array([[1, 2, 4]]), "video_grid_thw": np.array([[1, 2, 2]])}
    return {"input_ids": ids, **grids}


@pytest.mark.parametrize(("degree", "is_cut"), [(1, False), (1, True), (2, True), (4, True), (4, False)])
def test_the_plans_are_those_of_the_cut(degree, is_cut):
    """Exact, for the tensor-parallel degree where the sequence is cut, else for one; the model may be wrapped."""
    model = paddle.nn.Sequential(FleetModel())
    batch = collated(a_batch(), model=model, training_args=arguments(degree, is_cut))
    sp_size = degree if is_cut else 1
    wanted = plans_of_all_ranks(a_batch()["input_ids"], (IMAGE, VIDEO), sp_size, "sequence", is_cut)
    assert batch.keys() == a_batch().keys() | wanted.keys()
    for key, value in wanted.items():
        assert np.array_equal(batch[key], value)


@pytest.mark.parametrize("build", [tiny.tiny_qwen2_5_vl, tiny.tiny_qwen3_vl])
def test_plain_models_cut_the_flattened_batch(build):
    """Exact, with the model's own ids; a model whose class is upstream's is refused."""
    batch = {key: value.numpy() for key, value in tiny.draw_batch([["image"], []], seed=1).items()}
    with apply_to_paddleformers():
        model = build()
        planned = collated(batch, model=paddle.nn.Sequential(model), training_args=arguments(2))
    wanted = plans_of_all_ranks(batch["input_ids"], (tiny.IMAGE, tiny.VIDEO), 2, "flattened")
    assert all(np.array_equal(planned[key], value) for key, value in wanted.items())
    refused("no model in it takes plans", batch=batch, model=model, training_args=arguments(2))


def test_grids_that_do_not_match_are_refused():
    """The merge size is the model's: both numbers."""
    batch = a_batch() | {"image_grid_thw": np.array([[1, 4, 4]])}
    refused("has 2 image tokens but 4 feature rows", batch=batch, model=FleetModel(), training_args=arguments())


def test_models_and_calls_that_it_cannot_be_right_for_are_refused():
    """By name."""
    refused("LOADER_PLANS=1 with Linear: no model in it", model=paddle.nn.Linear(2, 2), training_args=arguments())
    refused("mm_collate_fn is called in an unknown way", UpstreamChanged, model=FleetModel())


def test_one_process_with_sequence_parallelism_on():
    """PaddleFormers' arguments say -1 ranks there: one plan."""
    batch = collated(a_batch(), model=FleetModel(), training_args=arguments(-1, True))
    assert batch["visual_update_indices"].shape[0] == 1


def test_it_is_put_in_once_and_taken_back(monkeypatch):
    """Identity; only where it is asked for; a release without the function is an error that names it."""
    before = workflow.mm_collate_fn
    plan_if_asked()
    assert workflow.mm_collate_fn is before
    monkeypatch.setenv("PADDLE_VL_SP_LOADER_PLANS", "1")
    plan_if_asked()
    ours = workflow.mm_collate_fn
    assert ours is not before
    assert plan_in_workflow() is None
    revert()
    assert workflow.mm_collate_fn is before
    monkeypatch.setenv("PADDLE_VL_SP", "0")
    plan_if_asked()
    assert workflow.mm_collate_fn is before
    monkeypatch.delattr(workflow, "mm_collate_fn")
    with pytest.raises(UpstreamChanged, match=r"workflow has no mm_collate_fn, to which PADDLE_VL_SP_LOADER_PLANS=1"):
        plan_in_workflow()
