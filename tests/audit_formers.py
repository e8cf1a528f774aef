"""PaddleFormers' own plain models for audits on real ranks, with faults that can be planted in them."""

import contextlib
from functools import partial

import numpy as np
import paddle
import paddle.distributed as dist
from paddleformers.transformers.segment_parallel_utils import split_inputs_sequence_dim

from audit_models import around, same, summed, times
from paddle_vl_sp.attention import ContextParallel
from paddle_vl_sp.formers import apply_to_qwen2_5_vl, apply_to_qwen3_vl, text_levels, tiny

SEQ_LEN, SAMPLES = 48, [["image"], ["image", "image"]]
MERGER = "model.visual.deepstack_merger_list.{}.linear_fc2.weight"
FIRST = "model.language_model.layers.0."
RIGHT = {FIRST + "input_layernorm.weight": "partial", FIRST + "self_attn.o_proj.weight": "whole"}  # the first is marked
QWEN3_VL_FAULTS = {
    "upstream": {MERGER.format(0): "partial", MERGER.format(2): "partial"},
    "upstream without SP": {FIRST + "self_attn.q_norm.weight": "partial", FIRST + "self_attn.k_norm.weight": "partial"},
    "second sum": {MERGER.format(1): "times n"},
    "mean for the sum": {MERGER.format(1): "partial"},
    "factor n": {MERGER.format(1): "times n"},
    "level forgotten": {MERGER.format(0): "partial", MERGER.format(1): "whole"},
    "rank forgotten": {MERGER.format(1): "mixed"},
    "unmarked norms": {FIRST + "self_attn.q_norm.weight": "partial", FIRST + "input_layernorm.weight": "partial"},
    "marked tower": {MERGER.format(1): "times n", "model.visual.merger.linear_fc2.weight": "times n"},
}
FIRST_BLOCK = "model.visual.blocks.0.attn.proj.weight"
QWEN2_5_VL_FAULTS = {
    "missing sum": {FIRST_BLOCK: "partial"},
    "factor n": {FIRST_BLOCK: "times n"},
    "mean for the sum": {FIRST_BLOCK: "partial"},
    "rank forgotten": {FIRST_BLOCK: "mixed"},
    "no gradient": {FIRST_BLOCK: "none"},
    "unmarked norms": {FIRST + "input_layernorm.weight": "partial"},
    "marked tower": {FIRST_BLOCK: "times n"},
}
FAULTS = {"qwen3_vl": QWEN3_VL_FAULTS, "qwen2_5_vl": QWEN2_5_VL_FAULTS}
TEXT_FAULTS = {"upstream": {FIRST + "self_attn.o_proj.weight": "mixed", FIRST + "mlp.down_proj.weight": "mixed"}}


@contextlib.contextmanager
def formers_model(family, fault="", group=None, samples=SAMPLES, seed=2):
    """PaddleFormers' plain Qwen3-VL or Qwen2.5-VL under TP-SP, changed by this package unless the fault is upstream."""
    apply = apply_to_qwen3_vl if family == "qwen3_vl" else apply_to_qwen2_5_vl
    make = getattr(tiny, f"tiny_{family}")
    batch = tiny.draw_batch(samples, SEQ_LEN, seed, frames_apart=family == "qwen3_vl")
    with contextlib.nullcontext() if fault.startswith("upstream") else apply():
        model = make(**tiny.tensor_parallel(group.nranks, SEQ_LEN, sequence_parallel=not fault.endswith("without SP")))
        tiny.load_weights(model, tiny.weights_of(make()), group.rank, group.nranks)
        for name, parameter in model.named_parameters():
            if fault == "unmarked norms":
                parameter.sequence_parallel = False
            if fault == "marked tower" and ".visual." in name:
                parameter.sequence_parallel = True
        batch["position_ids"] = tiny.positions(model, batch)
        complete_grad = text_levels.complete_grad
        if family == "qwen3_vl":
            text_levels.complete_grad = partial(_completed, complete_grad, fault)
        else:
            tower = model.visual.forward
            model.visual.forward = lambda *given, **named: _features(tower(*given, **named), fault)
        try:
            yield (lambda: model(**batch).loss), model
        finally:
            text_levels.complete_grad = complete_grad


def _completed(complete_grad, fault, levels, plan, group):
    n, rank = float(group.nranks), group.rank
    if fault == "level forgotten":
        return [levels[0], *complete_grad(levels[1:], plan, group)]
    if fault == "second sum":
        levels = complete_grad(levels, plan, group)
    change = {"mean for the sum": times(1 / n), "factor n": times(n), "rank forgotten": times(float(rank != 1))}
    return [around(level, backward=change.get(fault, same)) for level in complete_grad(levels, plan, group)]


def _features(features, fault):
    """The tower's, whose gradient is whole when it comes back."""
    if fault == "no gradient":
        return features.detach()
    n, rank = dist.get_world_size(), dist.get_rank()
    owner = np.arange(features.shape[0])[:, None] % n  # of every row, as it were
    rows = {"missing sum": owner == rank, "rank forgotten": owner != 1, "factor n": n, "mean for the sum": 1 / n}
    return around(features, backward=times(paddle.to_tensor(np.asarray(rows.get(fault, 1.0), "float32"))))


def text_in_parts(fault, group, seed=1):
    """Qwen3-VL's text model: the loss of the whole sequence, and gradients of a run whose ranks have parts of it.

    The fault is PaddleFormers' own run with sep_parallel_size: its trainer cuts the batch, no rank sees the others'
    keys, and gradients are summed.
    """
    model, batch = tiny.tiny_qwen3_vl(), tiny.draw_batch([[], []], SEQ_LEN, seed)
    named = [pair for pair in model.named_parameters() if ".visual." not in pair[0]]
    setting = ContextParallel("gather", group=group)

    def after():
        model.clear_gradients(set_to_zero=False)
        if fault:
            model(**split_inputs_sequence_dim(batch, group.rank, group.nranks)).loss.backward()
        else:
            with apply_to_qwen3_vl(context_parallel=setting):
                model(**batch).loss.backward()
        for _, parameter in named:
            parameter.grad.set_value(summed(parameter.grad.clone()))

    return (lambda: model(**batch).loss), named, after


def text_by_itself(group):
    """The same run of PaddleFormers with the losses that its trainer has: each rank's own."""
    model = tiny.tiny_qwen3_vl()
    batch = split_inputs_sequence_dim(tiny.draw_batch([[], []], SEQ_LEN, 1), group.rank, group.nranks)
    named = [pair for pair in model.named_parameters() if ".visual." not in pair[0]]
    return (lambda: model(**batch).loss), named
