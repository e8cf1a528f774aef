"""Models, batches and training steps that the tests share."""

from contextlib import contextmanager
from importlib import import_module

import numpy as np
import paddle

from paddle_vl_sp.formers import apply_to_qwen3_vl, tiny
from stub_paddlefleet import stubbed_paddlefleet
from text_models import MODULES

with stubbed_paddlefleet():  # once imported, these modules stay: the MoE and fleet classes can be replaced and used
    from paddleformers.transformers.qwen3_vl import modeling_fleet
    from paddleformers.transformers.qwen3_vl_moe import modeling as moe_modeling

__all__ = ["modeling_fleet", "moe_modeling"]
KEPT = {module.__name__: module for module in (modeling_fleet, moe_modeling)} | MODULES

BUILDERS = {"dense": tiny.tiny_qwen3_vl, "moe": tiny.tiny_qwen3_vl_moe}
SAMPLES = {
    "one": [["image", "image"]],
    "image": [["image"], ["image"]],
    "several": [["image", "image"], ["image"], [], ["image", "image", "image"]],
    "video": [["video"], ["video", "video"], ["video"]],
    "text": [[], []],
    "both": [["image", "video"], ["video"], ["image"]],
}
UPSTREAM_CAN = ("image", "several", "video", "text", "one")


def module_of(family):
    """The module of PaddleFormers that a family's classes are in."""
    return KEPT.get(family.module) or import_module(family.module)


@contextmanager
def importable(family):
    """A family of PaddleFleet's own classes: with the installed package, or the double where there is none."""
    if family.module.partition(".")[0] != "paddlefleet":
        yield
        return
    with stubbed_paddlefleet():
        yield


def batches(count, seq_len=64):
    """Images, several a sample, videos, text, one sample; B 1 to 4; in turn."""
    kinds = [UPSTREAM_CAN[i % len(UPSTREAM_CAN)] for i in range(count)]
    return [tiny.draw_batch(SAMPLES[kind], seq_len, seed=i) for i, kind in enumerate(kinds)]


def loss_of(model, batch, **more):
    return model(**batch, position_ids=tiny.positions(model, batch), **more).loss


def recomputed(model):
    """The model, with full recompute of its language model."""
    text = model.config.text_config
    text.recompute_granularity, text.recompute_method, text.recompute_num_layers = "full", "uniform", 1
    return model


def train(model, given, lr=1e-3, loss_of=loss_of):
    """Loss and gradients of every step."""
    optimizer = paddle.optimizer.AdamW(lr, parameters=[p for p in model.parameters() if not p.stop_gradient])
    told = []
    for batch in given:
        loss = loss_of(model, batch)
        loss.backward()
        told.append((float(loss), tiny.gradients_of(model)))
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    return told


def upstream_and_patched(run):
    """What `run()` returns upstream, and with the classes replaced."""
    upstream = run()
    with apply_to_qwen3_vl():
        return upstream, run()


def relative_error(got, wanted):
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))
