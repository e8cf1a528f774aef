"""The plain Qwen3-VL, dense and MoE: visual rows are planned once in the model's forward, and used in every layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import balanced_tower, shared_tower, tiny
from paddle_vl_sp.formers.balanced_tower import balanced_init
from paddle_vl_sp.formers.context.forward import outer_forward
from paddle_vl_sp.formers.context.plain import place
from paddle_vl_sp.formers.context.setting import refuse_uncut_training
from paddle_vl_sp.formers.context.step import STEP, Step
from paddle_vl_sp.formers.contracts import (
    adds_the_rows_of_its_rank,
    asks_for_every_level,
    cuts_the_flattened_batch,
    encodes_item_by_item,
    equals_ours,
    has_unsummed_head_norms,
    sees_the_cut,
)
from paddle_vl_sp.formers.deepstack import deepstack
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.merge import KINDS, LOADER_ADVICE, Merged, hide_pixels, kind_ids, kinds_to_merge, merge
from paddle_vl_sp.formers.model_view import ModelView
from paddle_vl_sp.formers.norms import text_init
from paddle_vl_sp.formers.own_part import OwnPart
from paddle_vl_sp.formers.text_levels import VISUAL, Visual, text_forward
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.verify import check_loaded, checking
from paddle_vl_sp.vision.owners import own_plan


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts the features by one plan and lets the original do the rest, which then sees no pixels."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        step = STEP.get()
        loaded = LoadedPlans.pop_from(kwargs, None if step else "flattened")
        call = signature.bind(self, *args, **kwargs)
        if step is not None:
            return _cut_forward(original, call, step)
        refuse_uncut_training(self)
        kinds = kinds_to_merge(self, call.arguments)
        if not kinds:
            return original(self, *args, **kwargs)
        own = _own_part(self, call.arguments, kinds)
        merged = merge(self, call.arguments, kinds, loaded, is_counted_later=_is_cut(self), own=own)
        if loaded and checking():
            _check_loaded(loaded, merged.mask)
        hide_pixels(call.arguments, kinds, merged.embeds)
        if not merged.plan.num_features:
            return original(*call.args, **call.kwargs)
        visual = _visual_of_part(own, merged) if own else Visual(merged.mask, merged.plan, loaded, merged.syncs)
        return _with_levels(original, call, visual, merged.levels)

    return forward


def _own_part(model: Layer, given: dict[str, Any], kinds: list[str]) -> OwnPart | None:
    """Where the tensor-parallel ranks share the tower: each gets the levels of its part of the flattened batch."""
    if not shared_tower.is_shared_over_tensor_parallel(model) or balanced_tower.is_balanced(model):
        return None
    group = require_tensor_parallel_group()
    tokens = given["input_ids"].numpy().reshape(1, -1)
    return OwnPart(tokens, kind_ids(model, kinds), SeqLayout(tokens.size, sp_size=group.nranks, sp_rank=group.rank))


def _visual_of_part(own: OwnPart, merged: Merged) -> Visual:
    """Of the mask [B, S] the part [1, S_local] that the levels are of, which PaddleFormers' own code takes as well."""
    layout = own.layout
    begin = layout.sp_rank * layout.local_len
    mask = merged.mask.reshape([1, -1])[:, begin : begin + layout.local_len]
    syncs = merged.syncs + 1  # to read the ids
    note_forward(own.plan, num_levels=len(merged.levels), group=require_tensor_parallel_group(), syncs=syncs)
    plan = own_plan(own.plan, len(own.plan.update_indices)).to(mask.place)
    return Visual(mask, plan, None, syncs)


def _cut_forward(original: Callable[..., Any], call: inspect.BoundArguments, step: Step) -> Any:
    """On this rank's part of the sequence, under context parallelism."""
    placed = place(call.args[0], call.arguments, step)
    if placed is None or not placed.levels:
        return original(*call.args, **call.kwargs)
    visual = Visual(placed.mask, placed.plan, None, syncs=1, is_part=True)
    return _with_levels(original, call, visual, placed.levels)


def _with_levels(
    original: Callable[..., Any], call: inspect.BoundArguments, visual: Visual, levels: list[Tensor]
) -> Any:
    """Calls it with a model whose text model gets mask and levels as PaddleFormers' forward would hand them over."""
    model, given = call.args[0], {"visual_pos_masks": visual.mask, "deepstack_visual_embeds": levels}
    call.arguments[next(iter(call.signature.parameters))] = ModelView(
        model, lambda args, kwargs: (args, {**kwargs, **given})
    )
    with VISUAL.given(visual):
        out = original(*call.args, **call.kwargs)
    if levels and not visual.reached and _is_cut(model):
        raise ValueError(
            f"the forward of {type(model.language_model).__name__} did not reach PaddleFormers' own text model, "
            "where the gradients of the deepstack levels are completed under sequence parallelism: call "
            "super().forward, or leave paddle_vl_sp out (PADDLE_VL_SP=0)"
        )
    return out


def _is_cut(model: Layer) -> bool:
    return bool(getattr(shared_tower.text_config(model), "sequence_parallel", False))


def _check_loaded(loaded: LoadedPlans, mask: Tensor) -> None:
    tokens = mask.numpy().reshape(1, -1)  # the plain classes cut the flattened batch
    layout = SeqLayout(tokens.shape[1], sp_size=loaded.update.shape[0])
    check_loaded(loaded.update, loaded.gather, tokens, layout, False, LOADER_ADVICE)


def _family(
    name: str, module: str, outer: str, model: str, text_model: str, build: Callable[[], Any], known: dict[str, str]
) -> Family:
    return Family(
        name,
        f"{MODELS}.{module}",
        replaced=(
            Replaced(f"{model}.forward", model_forward, (known["model"],)),
            Replaced(f"{text_model}.__init__", text_init, (known["init"],)),
            Replaced(f"{text_model}.forward", text_forward, (known["text"],)),
            Replaced(f"{text_model}._deepstack_process", deepstack, ("872f15937229ba1a",)),
        ),
        called=tuple(Called(f"{model}.{method}", ("self", pixels, grid)) for pixels, grid, method in KINDS.values()),
        shared=(Replaced(f"{model}.__init__", shared_tower.model_init, (known["build"],)),),
        balanced=(Replaced(f"{model}.__init__", balanced_init, (known["build"],)),),
        cut=(Replaced(f"{outer}.forward", outer_forward, (known["outer"],)),),
        contract=(
            adds_the_rows_of_its_rank(f"{text_model}._deepstack_process", sequence_first=False),
            asks_for_every_level(f"{text_model}.forward", build),
            cuts_the_flattened_batch(f"{text_model}.forward", build),
            has_unsummed_head_norms(build),
            equals_ours(build),
            sees_the_cut(build, frames_apart=True),
            encodes_item_by_item(build),
        ),
    )


PLAIN = _family(
    "Qwen3-VL",
    "qwen3_vl.modeling",
    "Qwen3VLForConditionalGenerationDeprecated",
    "Qwen3VLModelDeprecated",
    "Qwen3VLTextModel",
    tiny.tiny_qwen3_vl,
    {
        "model": "a202124f6bcaf004",
        "init": "33913c80b6e9120f",
        "text": "eeb43e01eeee402c",
        "build": "707bb6aba2b6d1b2",
        "outer": "8502fe5c1253864c",
    },
)
PLAIN_MOE = _family(
    "Qwen3-VL MoE",
    "qwen3_vl_moe.modeling",
    "Qwen3VLMoeForConditionalGenerationDeprecated",
    "Qwen3VLMoeModelDeprecated",
    "Qwen3VLMoeTextModel",
    tiny.tiny_qwen3_vl_moe,
    {
        "model": "6a996ef6ab8dcc32",
        "init": "4b394ee6f79a5533",
        "text": "2433f25460d79af0",
        "build": "76fd43b19a6cb73d",
        "outer": "838b30f90b360130",
    },
)
