"""Plans of the data loader: those each rank would make for itself; in the forward they cost no reading."""

import pickle

import numpy as np
import paddle
import pytest
from training import SAMPLES, loss_of

from arrays import same_bits
from paddle_vl_sp import SeqLayout, plan_visual
from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import PlanningCollate, apply_to_qwen3_vl, plans_of_all_ranks, tiny
from paddle_vl_sp.interleave import order_on_host

IDS = (tiny.IMAGE, tiny.VIDEO)
UPDATE, GATHER = "visual_update_indices", "visual_gather_indices"
KEYS = {UPDATE, GATHER, "visual_positions", "visual_mask"}


def test_worked_example():
    """The docstring's."""
    t, v = 1, tiny.IMAGE
    ids = np.array([[t, v, v, t], [v, v, v, t]])
    plans = plans_of_all_ranks(ids, IDS, sp_size=2, cut="flattened")
    assert plans["visual_update_indices"].tolist() == [[1, 2, -1], [0, 1, 2]]
    assert plans["visual_gather_indices"].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert plans["visual_positions"].tolist() == [[1, 2, 4, 5, 6]]
    assert plans["visual_mask"].tolist() == (ids == v).tolist()


@pytest.mark.parametrize("sp_size", [1, 2, 4])
@pytest.mark.parametrize("cut", ["sequence", "flattened"])
@pytest.mark.parametrize("kind", ["one", "several", "both"])
def test_each_row_is_the_plan_of_that_rank(sp_size, cut, kind):
    """Pure indices: equal to what every rank plans for itself, padding only at the end."""
    ids = tiny.draw_batch(SAMPLES[kind], 96, seed=2)["input_ids"].numpy()
    plans = plans_of_all_ranks(ids, IDS, sp_size, cut)
    tokens = ids.reshape(1, -1) if cut == "flattened" else ids
    for rank in range(sp_size):
        layout = SeqLayout(tokens.shape[1], sp_size=sp_size, sp_rank=rank)
        own = plan_visual(tokens, IDS, layout, sequence_first=cut == "sequence" and sp_size > 1)
        for key, wanted in ((UPDATE, own.update_indices), (GATHER, own.gather_indices)):
            row = plans[key][rank]
            assert row[: wanted.size].tolist() == wanted.tolist()
            assert (row[wanted.size :] == -1).all()
    places = np.flatnonzero(np.isin(ids, IDS)).tolist()
    assert plans["visual_positions"].tolist() == ([places] if cut == "flattened" else places)
    if kind == "both":
        assert same_bits(plans["visual_feature_order"], order_on_host(ids, IDS)[0])
    else:
        assert set(plans) == KEYS


@pytest.mark.parametrize(("sequence_parallel", "rows"), [(None, [1, 4]), (False, [1, 4]), (True, [2, 1])])
def test_one_rank_with_sequence_parallelism_on(sequence_parallel, rows):
    """Exact: [S, B, H] also where one rank has all of it, which the degree alone does not say."""
    ids = np.array([[1, tiny.IMAGE, 1, 1], [tiny.IMAGE, 1, 1, 1]])
    plans = plans_of_all_ranks(ids, IDS, 1, "sequence", sequence_parallel)
    assert plans[UPDATE].tolist() == [rows]
    collated = PlanningCollate(dict, IDS, sequence_parallel=sequence_parallel)({"input_ids": ids})
    assert collated[UPDATE].tolist() == [rows]


def test_text_gets_nothing():
    """No keys: the forward is upstream's."""
    batch = tiny.draw_batch(SAMPLES["text"])
    assert set(PlanningCollate(dict, IDS)(batch)) == set(batch)


def test_collate_keeps_the_kind_of_arrays():
    """numpy beside numpy, tensors beside tensors; it can be pickled for the loader's workers."""
    batch = tiny.draw_batch(SAMPLES["image"])
    collate = PlanningCollate(dict, IDS)
    assert isinstance(collate(batch)["visual_positions"], paddle.Tensor)
    on_host = {key: value.numpy() for key, value in batch.items()}
    assert isinstance(collate(on_host)["visual_positions"], np.ndarray)
    assert same_bits(
        pickle.loads(pickle.dumps(collate))(on_host)["visual_positions"], collate(on_host)["visual_positions"]
    )


def test_through_paddles_loader():
    """In worker processes too, the arrays arrive as tensors."""
    batch = {key: value.numpy() for key, value in tiny.draw_batch(SAMPLES["image"]).items()}
    collate = PlanningCollate(lambda samples: samples[0], IDS, merge_size=tiny.MERGE)
    (loaded,) = paddle.io.DataLoader([batch], batch_size=1, collate_fn=collate, num_workers=1)
    assert same_bits(loaded["visual_positions"], collate([batch])["visual_positions"])


def test_dropped_placeholders_are_told_in_the_loader():
    """Both numbers, and the kind."""
    batch = tiny.draw_batch(SAMPLES["image"])
    visual = int((batch["input_ids"] == tiny.IMAGE).sum())
    batch["input_ids"][batch["input_ids"] == tiny.IMAGE] = 3
    with pytest.raises(ValueError, match=f"has 0 image tokens but {visual} feature rows"):
        PlanningCollate(dict, IDS, merge_size=tiny.MERGE)(batch)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_without_a_grid_are_told_in_the_loader(kind):
    """Both numbers, and the kind: a processor that lost the pixels."""
    ids = np.full((1, 4), dict(zip(("image", "video"), IDS, strict=True))[kind])
    with pytest.raises(ValueError, match=f"has 4 {kind} tokens but 0 feature rows"):
        PlanningCollate(dict, IDS, merge_size=tiny.MERGE)({"input_ids": ids})


@pytest.mark.parametrize("kind", ["one", "several", "video", "both"])
def test_the_model_takes_them(kind):
    """Bit-exact: loss and gradients with and without."""
    model = tiny.tiny_qwen3_vl()
    batch = tiny.draw_batch(SAMPLES[kind], 96, seed=3)

    def run(given):
        tiny.drop_gradients(model)
        loss = loss_of(model, given)
        loss.backward()
        return float(loss), tiny.gradients_of(model)

    with apply_to_qwen3_vl():
        assert same_bits(run(batch), run(PlanningCollate(dict, IDS, cut="flattened")(batch)))


def test_wrong_plans_are_refused(monkeypatch):
    """Of another batch by the count; under PADDLE_VL_SP_CHECK=1 by every place; incomplete ones by name."""
    model = tiny.tiny_qwen3_vl()
    batch = PlanningCollate(dict, IDS, cut="flattened")(tiny.draw_batch(SAMPLES["image"], seed=3))
    with apply_to_qwen3_vl():
        fewer = {**batch, "visual_positions": batch["visual_positions"][:, :-1]}
        with pytest.raises(ValueError, match=r"has \d+ visual tokens but \d+ feature rows"):
            loss_of(model, fewer)
        with pytest.raises(ValueError, match="no visual_positions"):
            loss_of(model, {key: value for key, value in batch.items() if key != "visual_positions"})
        both = PlanningCollate(dict, IDS, cut="flattened")(tiny.draw_batch([["image", "video"]], 96, seed=3))
        with pytest.raises(ValueError, match=r"has \d+ visual tokens but \d+ feature rows"):
            loss_of(model, {**both, "visual_feature_order": both["visual_feature_order"][:-1]})
        monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
        loss_of(model, batch)
        with pytest.raises(ValueError, match="visual_positions of the batch is not what its ids ask for"):
            loss_of(model, {**batch, "visual_positions": batch["visual_positions"] + 1})
        for key in ("visual_update_indices", "visual_gather_indices"):
            with pytest.raises(ValueError, match=f"{key} of rank 0 of the batch is not what its ids ask for"):
                loss_of(model, {**batch, key: batch[key].flip(1)})


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_after_planning_is_refused(side):
    """Both shapes: the counts are still right, the places are not."""
    batch = PlanningCollate(dict, IDS, cut="flattened")(tiny.draw_batch(SAMPLES["image"], seed=3))
    pad = [0, 0, 0, 8] if side == "right" else [0, 0, 8, 0]
    for key in ("input_ids", "labels"):
        batch[key] = paddle.nn.functional.pad(batch[key], pad, value=0 if key == "input_ids" else -100)
    model = tiny.tiny_qwen3_vl()
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match=r"planned for ids \[2, 64\], but .* sees \[2, 72\]"):
        loss_of(model, batch)


@pytest.mark.parametrize(("planned", "wanted"), [("sequence", "flattened"), ("flattened", "sequence")])
def test_plans_for_another_cut_are_refused(planned, wanted):
    """The plain classes cut the flattened batch, those on PaddleFleet every sequence: the wrong rows, silently."""
    ids = tiny.draw_batch(SAMPLES["several"], 96, seed=2)["input_ids"].numpy()
    with pytest.raises(ValueError, match=f"planned with cut='{planned}', but this model cuts by '{wanted}'"):
        LoadedPlans.pop_from(plans_of_all_ranks(ids, IDS, 2, planned), wanted)
    assert LoadedPlans.pop_from(plans_of_all_ranks(ids, IDS, 2, wanted), wanted).positions.ndim == 1


def test_swapped_placeholder_ids_are_found_by_the_check(monkeypatch):
    """Under PADDLE_VL_SP_CHECK=1 an error with the right order; a number of ids that is not two is always one."""
    model = tiny.tiny_qwen3_vl()
    batch = PlanningCollate(dict, IDS[::-1], cut="flattened")(tiny.draw_batch(SAMPLES["both"], 96, seed=3))
    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match=r"give PlanningCollate \(image_token_id"):
        loss_of(model, batch)
    with pytest.raises(ValueError, match=r"must be \(image_token_id, video_token_id\), got \(5,\)"):
        plans_of_all_ranks(np.zeros((1, 4), dtype=np.int64), (5,))


READS = ("item", "numpy", "tolist", "__int__", "__bool__", "__float__", "__index__")


@pytest.mark.parametrize("kind", ["several", "both"])
def test_no_reading_of_tensors_on_the_way_of_the_rows(kind, monkeypatch):
    """With plans from the loader, from the features to the last addition, no tensor is read on the host."""
    model = tiny.tiny_qwen3_vl()
    batch = PlanningCollate(dict, IDS, cut="flattened")(tiny.draw_batch(SAMPLES[kind], 96, seed=3))
    features = {}
    for name, pixels, grid in (
        ("get_image_features", "pixel_values", "image_grid_thw"),
        ("get_video_features", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in batch:  # the tower itself reads its grids
            features[name] = getattr(model.model, name)(batch[pixels], batch[grid])
            monkeypatch.setattr(model.model, name, lambda *_, made=features[name]: made)
    positions = tiny.positions(model, batch)
    reads = []
    for name in READS:
        read = getattr(paddle.Tensor, name)
        monkeypatch.setattr(
            paddle.Tensor, name, lambda self, *a, read=read, name=name: (reads.append(name), read(self, *a))[1]
        )
    monkeypatch.setattr(paddle, "nonzero", lambda *_, **__: reads.append("nonzero"))
    with apply_to_qwen3_vl():
        model.model(**{key: value for key, value in batch.items() if key != "labels"}, position_ids=positions)
    assert reads == []
