"""Qwen2.5-VL on one rank: what upstream computes, bit for bit, by one plan; what it refuses; what it reports."""

import numpy as np
import paddle
import pytest
from paddleformers.transformers.qwen2_5_vl import modeling
from training import loss_of, recomputed, train

from arrays import same_bits
from paddle_vl_sp import RunReport, verify
from paddle_vl_sp.formers import CheckFailed, PlanningCollate, apply_to_qwen2_5_vl, merge, shared_tower, tiny
from paddle_vl_sp.formers.known import OURS

SAMPLES = {
    "images": [["image", "image"], ["image"], []],
    "videos": [["video"], ["video", "video"]],
    "both": [["image", "video"], ["video"], ["image"]],
    "text": [[], []],
    "one": [["image"]],
}
STEPS = 10


def batch_of(kind, seed=0):
    return tiny.draw_batch(SAMPLES[kind], 96, seed, frames_apart=False)


def trained(model):
    kinds = [list(SAMPLES)[step % len(SAMPLES)] for step in range(STEPS)]
    return train(model, [batch_of(kind, step) for step, kind in enumerate(kinds)])


@pytest.mark.parametrize(
    "build", [tiny.tiny_qwen2_5_vl, lambda: recomputed(tiny.tiny_qwen2_5_vl())], ids=["plain", "full recompute"]
)
def test_ten_training_steps(build):
    """Bit-exact: loss and every gradient; images, videos, both, text only, B 1 to 3."""
    upstream = trained(build())
    with apply_to_qwen2_5_vl():
        assert hasattr(modeling.Qwen2_5_VLModel.forward, OURS)
        ours = trained(build())
    assert not hasattr(modeling.Qwen2_5_VLModel.forward, OURS)
    assert len(upstream[0][1]) > len(upstream[3][1]), "a batch of text gives the tower no gradient"
    for step, (wanted, got) in enumerate(zip(upstream, ours, strict=True)):
        assert same_bits(wanted, got), f"step {step}"


def test_arguments_of_all_kinds():
    """Bit-exact: without position ids, with a padding mask, with embeddings of the caller, packed."""
    model, batch = tiny.tiny_qwen2_5_vl(), batch_of("both")
    ends = np.repeat(np.array([40, 96], "int32"), [40, 56]).reshape(1, 1, 96, 1)
    ids = batch["input_ids"]
    padding = paddle.ones_like(ids)
    padding[:, 80:] = 0
    variants = [
        {},
        {"attention_mask": padding},
        {"inputs_embeds": model.get_input_embeddings()(ids) * 2, "position_ids": tiny.positions(model, batch)},
        {"attn_mask_startend_row_indices": paddle.to_tensor(np.repeat(ends, 3, axis=0))},
    ]

    def results():
        return [float(model(**batch, **more).loss) for more in variants]

    upstream = results()
    with apply_to_qwen2_5_vl():
        assert results() == upstream


def test_plans_of_the_loader():
    """Bit-exact, with no host sync; those of other ids are refused, or found under PADDLE_VL_SP_CHECK=1."""
    collate = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), merge_size=tiny.MERGE)
    model = tiny.tiny_qwen2_5_vl()
    with apply_to_qwen2_5_vl(), pytest.MonkeyPatch.context() as patch:
        for kind in SAMPLES:
            batch = batch_of(kind)
            with RunReport() as report:
                wanted = float(loss_of(model, batch))
            with RunReport() as planned:
                assert float(loss_of(model, collate(batch))) == wanted
            for read, syncs in ((report.read(), 1), (planned.read(), 0)):
                assert read["forwards"] == (kind != "text")
                assert read["syncs_here"] == (syncs if kind != "text" else 0)
        patch.setenv("PADDLE_VL_SP_CHECK", "1")
        batch = collate(batch_of("images"))
        loss_of(model, batch)
        batch["visual_positions"] = batch["visual_positions"] + 1
        with pytest.raises(CheckFailed, match="visual_positions of the batch is not what its ids ask for"):
            loss_of(model, batch)
        longer = batch_of("images") | {"input_ids": paddle.nn.functional.pad(batch["input_ids"], [0, 8])}
        with pytest.raises(ValueError, match=r"planned for ids \[3, 96\], but the model sees \[3, 104\]"):
            model(**(collate(batch_of("images")) | {"input_ids": longer["input_ids"], "labels": None}))


def test_check_compares_the_merge(monkeypatch, caplog):
    """PADDLE_VL_SP_CHECK=1: right merges of all kinds pass, said once; a wrong one is an error with numbers."""
    monkeypatch.setenv("PADDLE_VL_SP_CHECK", "1")
    monkeypatch.setattr(verify, "_said", set())
    caplog.set_level("INFO")
    model = tiny.tiny_qwen2_5_vl()
    with apply_to_qwen2_5_vl():
        for kind in SAMPLES:
            loss_of(model, batch_of(kind))
        assert caplog.text.count("PADDLE_VL_SP_CHECK=1: the merge equals upstream's; this is said once") == 1
        real = merge.replace_rows
        monkeypatch.setattr(merge, "replace_rows", lambda embeds, main, plan: real(embeds, main.flip(0), plan))
        with pytest.raises(CheckFailed, match=r"the merge differs from that of upstream: \d+ of \d+ values differ"):
            loss_of(model, batch_of("both"))


def test_counts_that_do_not_match_are_refused():
    """Both numbers, before anything is written."""
    model, batch = tiny.tiny_qwen2_5_vl(), batch_of("one")
    ids = batch["input_ids"].clone()
    first = int(paddle.nonzero(ids[0] == tiny.IMAGE)[0])
    ids[0, first] = 5
    with apply_to_qwen2_5_vl(), pytest.raises(ValueError, match=r"has \d+ visual tokens but \d+ feature rows"):
        model(**(batch | {"input_ids": ids}), position_ids=tiny.positions(model, batch))


def test_models_with_their_own_mask_are_upstreams():
    """Their forward merges, as they say."""
    model, batch, asked = tiny.tiny_qwen2_5_vl(), batch_of("images"), []
    wanted, own = float(loss_of(model, batch)), model.model.get_placeholder_mask

    def get_placeholder_mask(*args, **named):
        asked.append(named)
        return own(*args, **named)

    model.model.get_placeholder_mask = get_placeholder_mask
    with apply_to_qwen2_5_vl():
        assert float(loss_of(model, batch)) == wanted
    assert asked


def test_the_tower_attends_within_frames():
    """fp32 rounding: a video's frames encoded one by one have the features of the whole, so frames may be split."""
    tower = tiny.tiny_qwen2_5_vl().visual
    pixels = paddle.rand([2 * 24, tiny.PATCH_SIZE])
    whole = tower(pixels, grid_thw=paddle.to_tensor([[2, 4, 6]]))
    frames = [tower(part, grid_thw=paddle.to_tensor([[1, 4, 6]])) for part in paddle.split(pixels, 2)]
    assert float((whole - paddle.concat(frames)).abs().max()) < 1e-5


def test_vision_dp_marks_and_unmarks():
    """As for Qwen3-VL: the tower's parameters, by apply and by revert."""
    model = tiny.tiny_qwen2_5_vl()
    with pytest.raises(ValueError, match="sequence_parallel off: no trainer would sum"):
        apply_to_qwen2_5_vl(model, vision_dp=True)
    model.config.text_config.sequence_parallel = True
    with apply_to_qwen2_5_vl(model, vision_dp=True):
        assert shared_tower.is_shared(model.model)
        assert all(parameter.sequence_parallel for parameter in model.visual.parameters())
    assert not any(parameter.sequence_parallel for parameter in model.visual.parameters())
