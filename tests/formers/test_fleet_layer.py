"""The layer and the model on PaddleFleet: their real methods over stand-ins for PaddleFleet, any rank mocked."""

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from training import modeling_fleet

from arrays import same_bits
from fleet_parts import FULL_RECOMPUTE, build_layer, fleet_config
from groups import topology_of
from paddle_vl_sp.backends import dispatch
from paddle_vl_sp.formers import apply_to_qwen3_vl, plans_of_all_ranks, revert
from paddle_vl_sp.formers.families import qwen3_vl_fleet
from paddle_vl_sp.formers.families.paddlefleet import visual_embedding
from paddle_vl_sp.testing import FakeGroup
from stub_paddlefleet import stubbed_paddlefleet

Layer = modeling_fleet.Qwen3VLTextTransformerLayer
WIDTH, SEQ_LEN, LEVELS = 8, 16, 3
IMAGE, VIDEO = 7, 8


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(rank, nranks): from now on we are that rank of the second data-parallel copy, so that its global rank is
    not that in the group; gradients are left as they are on it.
    """

    def become(rank, nranks, stages=1):
        topology = topology_of(FakeGroup(rank, nranks, range(nranks, 2 * nranks)), stages)
        monkeypatch.setattr("paddle.distributed.fleet.get_hybrid_communicate_group", lambda: topology)
        monkeypatch.setattr("paddle.distributed.get_rank", lambda *_: nranks + rank)
        monkeypatch.setattr(qwen3_vl_fleet, "complete_grad", lambda levels, plan, group: list(levels))

    return become


@pytest.fixture
def built(monkeypatch):
    """Counts the plans that are made."""
    plans, build = [], dispatch.build_plan
    monkeypatch.setattr(dispatch, "build_plan", lambda *args: (plans.append(None), build(*args))[1])
    return plans


def layer(number, sequence_parallel, cls=Layer, full_recompute=False, **more):
    if full_recompute:
        more |= FULL_RECOMPUTE
    with stubbed_paddlefleet():
        return build_layer(cls, fleet_config(sequence_parallel=sequence_parallel, **more), number)


def masks(batch):
    """Nothing visual, some, everything, and the very last positions only."""
    rng = np.random.default_rng(batch)
    tail = np.zeros((batch, SEQ_LEN), dtype=bool)
    tail[-1, -2:] = True
    return [np.zeros_like(tail), rng.random(tail.shape) < 0.3, np.ones_like(tail), tail]


def run(mask, rank, nranks, hidden, levels, sequence_parallel, extra=None, **more):
    """Four layers one after the other on this rank's part: the last dict, and gradients of hidden and levels."""
    own = slice(rank * SEQ_LEN // nranks, (rank + 1) * SEQ_LEN // nranks)
    part = hidden[:, own].transpose(1, 0, 2) if sequence_parallel else hidden  # [S_local, B, H] or [B, S, H]
    start = paddle.to_tensor(np.ascontiguousarray(part), stop_gradient=False)
    given = [paddle.to_tensor(level, stop_gradient=False) for level in levels]
    out = {
        "hidden_states": start * 1.0,
        "visual_pos_masks": paddle.to_tensor(mask),
        "deepstack_visual_emb": given,
        "position_ids": None,
        **(extra or {}),
    }
    for number in range(LEVELS + 1):
        out = layer(number, sequence_parallel, **more)(out)
    result = out["hidden_states"]
    weights = np.random.default_rng(1).standard_normal(result.shape).astype("float32")
    (result * paddle.to_tensor(weights)).sum().backward()
    # upstream leaves an empty rank's features out of the graph
    grads = [np.zeros_like(level.numpy()) if level.grad is None else level.grad.numpy() for level in given]
    return out, [result.numpy(), start.grad.numpy(), *grads]


@pytest.mark.parametrize("nranks", [1, 2, 4, 8])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_four_layers_equal_upstream(as_rank, nranks, batch):
    """Bit-exact: hidden states and all gradients of every rank; masks empty, sparse, full, at the end only."""
    rng = np.random.default_rng(0)
    for mask in masks(batch):
        hidden = rng.standard_normal((batch, SEQ_LEN, WIDTH)).astype("float32")
        levels = [rng.standard_normal((int(mask.sum()), WIDTH)).astype("float32") for _ in range(LEVELS)]
        for rank in range(nranks):
            as_rank(rank, nranks)
            _, wanted = run(mask, rank, nranks, hidden, levels, nranks > 1)
            with apply_to_qwen3_vl():
                _, got = run(mask, rank, nranks, hidden, levels, nranks > 1)
            assert same_bits(wanted, got), f"rank {rank}"


def some_case(batch=2):
    rng = np.random.default_rng(3)
    mask = masks(batch)[1]
    hidden = rng.standard_normal((batch, SEQ_LEN, WIDTH)).astype("float32")
    return mask, hidden, [rng.standard_normal((int(mask.sum()), WIDTH)).astype("float32") for _ in range(LEVELS)]


def test_flattened_hidden_states_are_upstreams_affair(as_rank):
    """Bit-exact: [B * S_local, H] goes through our layer as through PaddleFormers' own."""
    mask, hidden, levels = some_case()
    as_rank(1, 2)

    def flattened():
        given = {
            "hidden_states": paddle.to_tensor(hidden[:, SEQ_LEN // 2 :].reshape(-1, WIDTH)),
            "visual_pos_masks": paddle.to_tensor(mask),
            "deepstack_visual_emb": list(map(paddle.to_tensor, levels)),
        }
        return layer(0, True)(given)["hidden_states"].numpy()

    wanted = flattened()
    with apply_to_qwen3_vl():
        assert same_bits(wanted, flattened())


def test_one_plan_for_all_layers(as_rank, built):
    """Three levels, one plan; everything visual is gone after the last one, as a next pipeline stage wants it."""
    mask, hidden, levels = some_case()
    as_rank(1, 2)
    with apply_to_qwen3_vl():
        out, _ = run(mask, 1, 2, hidden, levels, True)
    assert len(built) == 1
    assert set(out) == {"hidden_states"}


def test_a_level_that_is_added_goes_on_without_gradient(as_rank):
    """Whoever receives it in another pipeline stage owes it none; the gradients of all levels are those of upstream."""
    mask, hidden, levels = some_case()
    as_rank(0, 1)
    given = {
        "hidden_states": paddle.to_tensor(hidden),
        "visual_pos_masks": paddle.to_tensor(mask),
        "deepstack_visual_emb": [paddle.to_tensor(level, stop_gradient=False) for level in levels],
    }
    with apply_to_qwen3_vl():
        for number in range(LEVELS - 1):
            given = layer(number, False)(given)
            assert [level.stop_gradient for level in given["deepstack_visual_emb"]] == [
                i <= number for i in range(LEVELS)
            ]
            assert same_bits(given["visual_pos_masks"], mask)


def test_across_pipeline_stages_indices_have_one_length(as_rank, built):
    """One plan, filled up to the rows of the rank; hidden states are upstream's, bit for bit."""
    mask, hidden, levels = some_case()
    as_rank(1, 2, stages=2)
    _, wanted = run(mask, 1, 2, hidden, levels, True)
    seen = []
    with apply_to_qwen3_vl():
        handle = Layer.forward
        Layer.forward = lambda self, given: (seen.append(dict(given)), handle(self, given))[1]
        try:
            _, got = run(mask, 1, 2, hidden, levels, True)
        finally:
            Layer.forward = handle
    assert same_bits(wanted, got)
    assert len(built) == 1
    lengths = [given["visual_update_indices"].shape[0] for given in seen if "visual_update_indices" in given]
    assert lengths == [hidden.shape[0] * hidden.shape[1] // 2] * (LEVELS - 1)


def test_full_recompute(as_rank):
    """Bit-exact, with the addition outside recompute."""
    mask, hidden, levels = some_case()
    as_rank(0, 2)
    _, wanted = run(mask, 0, 2, hidden, levels, True, full_recompute=True)
    with apply_to_qwen3_vl():
        _, got = run(mask, 0, 2, hidden, levels, True, full_recompute=True)
    assert same_bits(wanted, got)


def test_indices_in_the_dict_are_taken(as_rank, built):
    """A plan that came with the dict is used as it is, and its features are not completed a second time."""
    mask, hidden, levels = some_case()
    as_rank(1, 2)
    _, wanted = run(mask, 1, 2, hidden, levels, True)
    plans = plans_of_all_ranks(np.where(mask, IMAGE, 0), (IMAGE, VIDEO), sp_size=2)
    own = {key: paddle.to_tensor(plans[key][1]) for key in ("visual_update_indices", "visual_gather_indices")}

    def refuse(*_):
        raise AssertionError("completed twice")

    qwen3_vl_fleet.complete_grad = refuse  # as_rank puts it back
    with apply_to_qwen3_vl():
        _, got = run(mask, 1, 2, hidden, levels, True, extra=own)
    assert same_bits(wanted, got)
    assert built == []


def test_check_mode_compares_every_addition(as_rank, monkeypatch):
    """PADDLE_VL_SP_CHECK=1: right plans pass, a wrong one is told with numbers."""
    from paddle_vl_sp.formers import DiffersFromUpstream

    mask, hidden, levels = some_case()
    as_rank(1, 2)
    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    plans = plans_of_all_ranks(np.where(mask, IMAGE, 0), (IMAGE, VIDEO), sp_size=2)
    own = {key: paddle.to_tensor(plans[key][1]) for key in ("visual_update_indices", "visual_gather_indices")}
    own["visual_update_indices"] = own["visual_update_indices"].flip(0)
    with apply_to_qwen3_vl():
        run(mask, 1, 2, hidden, levels, True)
        with pytest.raises(DiffersFromUpstream, match=r"\d+ of 128 values differ, by \d"):
            run(mask, 1, 2, hidden, levels, True, extra=own)


def test_subclasses_with_their_own_addition_get_the_mask(as_rank):
    """Whoever overrides `_deepstack_process` is called as by upstream."""
    seen = []

    class Own(Layer):
        def _deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds):
            seen.append(visual_pos_masks)
            return hidden_states

    mask, hidden, levels = some_case()
    as_rank(0, 1)
    given = {
        "hidden_states": paddle.to_tensor(hidden),
        "visual_pos_masks": paddle.to_tensor(mask),
        "deepstack_visual_emb": list(map(paddle.to_tensor, levels)),
    }
    with apply_to_qwen3_vl():
        layer(0, False, Own)(given)
    assert isinstance(seen[0], paddle.Tensor)


class Tower(paddle.nn.Layer):
    spatial_merge_size = 2

    def __init__(self):
        super().__init__()
        self.project = paddle.nn.Linear(96, WIDTH)

    def forward(self, pixels, grid_thw=None):
        rows = self.project(pixels)[: int(grid_thw.prod(-1).sum()) // 4]
        return rows, [rows, rows]


class Recorder(paddle.nn.Layer):
    def forward(self, given):
        self.given = given
        return paddle.zeros([1])


@pytest.fixture
def dist_model():
    """Qwen3VLModelDist without its constructor, which builds PaddleFleet's models."""
    model = modeling_fleet.Qwen3VLModelDist.__new__(modeling_fleet.Qwen3VLModelDist)
    paddle.nn.Layer.__init__(model)
    model.language_model, model.vision_model = Recorder(), Tower()
    model.add_encoder, model.rope_deltas = True, None
    model.config = SimpleNamespace(freeze_vision_model=False)
    model.sequence_parallel_lm = True
    model.language_model.embedding = PlacesByPlan()
    return model


class PlacesByPlan(paddle.nn.Layer):
    """What says that an embedding is ours."""

    places_by_plan = True


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loaders_plan_passes_the_fixed_dict(as_rank, dist_model, rank):
    """Two keys more in the language model's dict: the plans of all ranks. Nothing else changes, no hook is left."""
    as_rank(rank, 2)
    ids = np.full((2, 8), 1)
    ids[0, 2:5], ids[1, 3] = IMAGE, IMAGE
    batch = {
        "input_ids": paddle.to_tensor(ids),
        "position_ids": paddle.to_tensor(ids),
        "pixel_values": paddle.rand([16, 96]),
        "image_grid_thw": paddle.to_tensor([[1, 4, 4]]),
    }
    dist_model(**batch)
    before = dist_model.language_model.given
    plans = plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=2)
    with apply_to_qwen3_vl():
        dist_model(**batch, **{key: paddle.to_tensor(value) for key, value in plans.items()})
    after = dist_model.language_model.given
    assert set(after) - set(before) == {"visual_update_indices", "visual_gather_indices"}
    assert same_bits(after["visual_update_indices"], plans["visual_update_indices"])
    assert same_bits(after["visual_gather_indices"], plans["visual_gather_indices"])
    assert same_bits(after["image_embeds"], before["image_embeds"])
    assert not dist_model.language_model._forward_pre_hooks


def test_no_hook_is_left_after_an_error(as_rank, dist_model):
    """The error goes through, and the next batch, of text, gets no plan of the last one."""
    as_rank(0, 2)
    ids = np.full((2, 8), IMAGE)
    given = {key: paddle.to_tensor(value) for key, value in plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=2).items()}
    language_model, recorded = dist_model.language_model, dist_model.language_model.forward

    def fail(_):
        raise ZeroDivisionError

    language_model.forward = fail
    with apply_to_qwen3_vl():
        with pytest.raises(ZeroDivisionError):
            dist_model(input_ids=paddle.to_tensor(ids), position_ids=paddle.to_tensor(ids), **given)
        assert not language_model._forward_pre_hooks
        language_model.forward = recorded
        dist_model(input_ids=paddle.to_tensor(ids), position_ids=paddle.to_tensor(ids))
    assert not any(key in language_model.given for key in given)


def test_the_order_of_images_and_videos_passes_too(as_rank, dist_model):
    """For the embedding, which joins both kinds by it."""
    as_rank(0, 2)
    ids = np.array([[1, VIDEO, 1, IMAGE, 1, 1, 1, 1]])
    plans = plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=2)
    given = {key: paddle.to_tensor(value) for key, value in plans.items()}
    with apply_to_qwen3_vl():
        dist_model(input_ids=paddle.to_tensor(ids), position_ids=paddle.to_tensor(ids), **given)
    assert dist_model.language_model.given["visual_feature_order"].tolist() == [1, 0]


@pytest.mark.parametrize(("planned", "is_cut"), [(1, True), (2, True), (2, False)])
def test_a_plan_for_another_degree_is_refused(as_rank, dist_model, planned, is_cut):
    """Both numbers and the fix; also where the degree was left out, and where a plan for several is not needed."""
    as_rank(0, 4)
    dist_model.sequence_parallel_lm = is_cut
    ids = np.full((2, 8), IMAGE)
    plans = plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=planned)
    given = {key: paddle.to_tensor(value) for key, value in plans.items()}
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match=rf"planned for sp_size {planned}, .* has 4 ranks: give"):
        dist_model(input_ids=paddle.to_tensor(ids), position_ids=paddle.to_tensor(ids), **given)


def test_without_sequence_parallelism_the_one_plan_is_everybodys(as_rank, dist_model):
    """Exact indices, on a rank that is not the first."""
    as_rank(3, 4)
    dist_model.sequence_parallel_lm = False
    ids = np.array([[1, IMAGE, 1, 1]])
    given = {key: paddle.to_tensor(value) for key, value in plans_of_all_ranks(ids, (IMAGE, VIDEO)).items()}
    with apply_to_qwen3_vl():
        dist_model(input_ids=paddle.to_tensor(ids), position_ids=paddle.to_tensor(ids), **given)
    assert dist_model.language_model.given["visual_update_indices"].tolist() == [[1]]


def test_a_batch_that_was_padded_after_planning_is_refused(as_rank, dist_model):
    """Refused with both shapes."""
    as_rank(0, 2)
    ids = np.full((2, 8), IMAGE)
    plans = plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=2)
    given = {key: paddle.to_tensor(value) for key, value in plans.items()}
    longer = paddle.to_tensor(np.pad(ids, ((0, 0), (0, 4))))
    with (
        apply_to_qwen3_vl(),
        pytest.raises(ValueError, match=r"planned for ids \[2, 8\], but the model sees \[2, 12\]"),
    ):
        dist_model(input_ids=longer, position_ids=longer, **given)


def test_models_built_afterwards_are_made_of_the_subclasses():
    """By the names under which builders look them up; revert puts the very same classes back."""
    with stubbed_paddlefleet():
        from paddlefleet.models.gpt import gpt_layer_specs

        provider, embedding = modeling_fleet.Qwen3VLTextProvider, gpt_layer_specs.GPTEmbedding
        report = apply_to_qwen3_vl()
        assert gpt_layer_specs.GPTEmbedding.__mro__[2:3] == (embedding,)
        assert provider.specific_layer.__mro__[2:3] == (Layer,)
        assert {"gpt_layer_specs.GPTEmbedding", "Qwen3VLTextProvider.specific_layer"} <= set(report.replaced)
        ours = gpt_layer_specs.GPTEmbedding
        again = apply_to_qwen3_vl()
        assert gpt_layer_specs.GPTEmbedding is ours
        assert "was already" in {line.why for line in again.lines if line.name == "gpt_layer_specs.GPTEmbedding"}
        revert()
        assert gpt_layer_specs.GPTEmbedding is embedding
        assert provider.specific_layer is Layer


def test_a_subclass_that_a_user_put_there_stays():
    """Ours already: nothing is replaced, and nothing is put back."""
    with stubbed_paddlefleet():
        from paddlefleet.models.gpt import gpt_layer_specs

        own = visual_embedding(gpt_layer_specs.GPTEmbedding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpt_layer_specs, "GPTEmbedding", own)
            with apply_to_qwen3_vl():
                assert gpt_layer_specs.GPTEmbedding is own
            assert gpt_layer_specs.GPTEmbedding is own


@pytest.mark.parametrize("given", ["images and videos", "plans"])
def test_a_model_built_before_is_refused_where_only_the_embedding_is_right(as_rank, dist_model, given):
    """By name and with what to do, before anything is encoded."""
    as_rank(0, 2)
    dist_model.language_model.embedding = paddle.nn.Layer()
    ids = np.full((2, 8), IMAGE)
    batch = {"input_ids": paddle.to_tensor(ids), "position_ids": paddle.to_tensor(ids)}
    more = {key: paddle.to_tensor(x) for key, x in plans_of_all_ranks(ids, (IMAGE, VIDEO), sp_size=2).items()}
    if given == "images and videos":
        more = {"pixel_values": paddle.rand([16, 96]), "pixel_values_videos": paddle.rand([16, 96])}
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match="call apply_to_qwen3_vl before the model is built"):
        dist_model(**batch, **more)


def test_empty_layers_of_a_model_built_before_are_refused(as_rank):
    """Upstream adds level i to the wrong layer, silently."""
    mask, hidden, levels = some_case()
    as_rank(0, 2)
    with apply_to_qwen3_vl(), pytest.raises(ValueError, match="num_empty_layers_add_in_head=1 shifts the deepstack"):
        run(mask, 0, 2, hidden, levels, True, num_empty_layers_add_in_head=1)
