"""GLM-OCR and PaddleOCR-VL: images are upstream's, bit for bit; videos, which upstream breaks or drops, are refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import paddle
import pytest
from training import train

from arrays import same_bits
from paddle_vl_sp import RunReport
from paddle_vl_sp.formers import PlanningCollate, apply_to_paddleformers, tiny

SAMPLES = [[["image", "image"], ["image"]], [["image"]], [[], []], [["image"], [], ["image", "image"]]]
VIDEO = {"pixel_values_videos": np.zeros((16, tiny.PATCH_SIZE), "float32"), "video_grid_thw": np.array([[1, 4, 4]])}


def trained():
    """Positions are the model's own."""
    given = [tiny.draw_batch(samples, 64, seed) for seed, samples in enumerate(SAMPLES)]
    return train(tiny.tiny_glm_ocr(), given, loss_of=lambda model, batch: model(**batch).loss)


def test_training_steps():
    """Bit-exact: loss and every gradient; several images, one, none, B 1 to 3; positions as upstream makes them."""
    upstream = trained()
    with apply_to_paddleformers(families="glm_ocr") as report:
        assert report.replaced == ["GlmOcrModel.forward"]
        for step, (wanted, got) in enumerate(zip(upstream, trained(), strict=True)):
            assert same_bits(wanted, got), f"step {step}"


def test_arguments_of_all_kinds():
    """Bit-exact: a padding mask, given positions, embeddings alone; tokens of generate() with and without cache."""
    model, batch = tiny.tiny_glm_ocr(), tiny.draw_batch(SAMPLES[0], 64, 0)
    padding = paddle.ones_like(batch["input_ids"])
    padding[:, 56:] = 0
    positions = paddle.arange(64).reshape([1, 1, 64]).tile([3, 2, 1])
    embeds = model.get_input_embeddings()(batch["input_ids"])
    prompt = {key: value for key, value in batch.items() if key != "labels"}

    def results():
        losses = [
            float(model(**batch, **more).loss) for more in ({"attention_mask": padding}, {"position_ids": positions})
        ]
        losses.append(float(model(inputs_embeds=embeds, position_ids=positions, labels=batch["labels"]).loss))
        losses.append(float(model.model.rope_deltas.sum()))
        model.eval()
        tokens = [
            model.generate(**prompt, max_new_tokens=4, use_cache=use)[0].numpy().tolist() for use in (True, False)
        ]
        model.train()
        return losses, tokens

    upstream = results()
    with apply_to_paddleformers(families="glm_ocr"):
        assert results() == upstream


def test_plans():
    """Bit-exact, with no host sync; counts that do not match are refused with both numbers."""
    model, batch = tiny.tiny_glm_ocr(), tiny.draw_batch(SAMPLES[0], 64, 0)
    planned = PlanningCollate(dict, (tiny.IMAGE, tiny.VIDEO), merge_size=tiny.MERGE)(batch)
    with apply_to_paddleformers(families="glm_ocr"):
        wanted = float(model(**batch).loss)
        with RunReport() as report:
            assert float(model(**planned).loss) == wanted
        assert (report.read()["forwards"], report.read()["syncs_here"]) == (1, 0)
        ids = paddle.where(paddle.arange(64) < 12, paddle.full([2, 64], 3, "int64"), batch["input_ids"])
        with pytest.raises(ValueError, match=r"has \d+ visual tokens but \d+ feature rows"):
            model(**(batch | {"input_ids": ids}), position_ids=paddle.ones([3, 2, 64], dtype="int64"))


def test_videos_are_refused():
    """Upstream raises without a reason; ours says it, before anything is encoded."""
    model = tiny.tiny_glm_ocr()
    batch = tiny.draw_batch(SAMPLES[0], 64, 0) | {key: paddle.to_tensor(value) for key, value in VIDEO.items()}
    with pytest.raises(AttributeError):
        model(**batch)
    with (
        apply_to_paddleformers(families="glm_ocr"),
        pytest.raises(ValueError, match=r"GlmOcrModel with videos: .* leave"),
    ):
        model(**batch)


TRITON = {  # as much as PaddleFormers' kernels need to be imported
    "__init__.py": "def jit(f=None, **_):\n    return f if f is not None else (lambda g: g)\n",
    "language.py": "class constexpr:\n    pass\n",
}
PADDLEOCR = """
from unittest import mock
from paddle_vl_sp.formers import apply_to_paddleformers
from paddleformers.transformers.paddleocr_vl.modeling import PaddleOCRVLForConditionalGeneration as Model
model = Model.__new__(Model)
with apply_to_paddleformers(families="paddleocr_vl") as report:
    assert report.replaced == ["PaddleOCRVLForConditionalGeneration.forward"], report
    try:
        Model.forward(model, pixel_values_videos=1)
    except ValueError as error:
        print("REFUSED", error)
    try:
        Model.forward(model, pixel_values=1, inputs_embeds=2)
    except Exception as error:
        print("UPSTREAM", type(error).__name__)
"""


def test_videos_that_would_be_dropped_are_refused(tmp_path):
    """With triton, here a stand-in for the import; without it the family is absent by a line, not an error."""
    (tmp_path / "triton").mkdir()
    for name, text in TRITON.items():
        (tmp_path / "triton" / name).write_text(text)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    done = subprocess.run([sys.executable, "-c", PADDLEOCR], env=env, capture_output=True, text=True, check=False)
    assert "REFUSED PaddleOCRVLForConditionalGeneration with videos: PaddleFormers' forward drops them" in done.stdout
    assert "UPSTREAM" in done.stdout, "without videos it is upstream's"
    if find_spec("triton") is not None:
        return
    report = apply_to_paddleformers(families="paddleocr_vl")
    assert report.names("absent") == ["paddleformers.transformers.paddleocr_vl.modeling"]
    assert "triton" in str(report)
