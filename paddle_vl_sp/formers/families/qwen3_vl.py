"""The plain Qwen3-VL, dense and MoE: visual rows are planned once in the model's forward, and used in every layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.carried import Handover, LoadedPlans, OfMask
from paddle_vl_sp.comm.collectives import Group, has_peers
from paddle_vl_sp.comm.grads import complete_grad
from paddle_vl_sp.formers import balanced_tower, shared_tower, tiny
from paddle_vl_sp.formers.balanced_tower import balanced_init
from paddle_vl_sp.formers.context.forward import outer_forward
from paddle_vl_sp.formers.context.plain import place, rows_of_tensor_rank
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
from paddle_vl_sp.formers.deepstack import OWN_ROWS, OwnRows, deepstack
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.merge import KINDS, LOADER_ADVICE, Merged, hide_pixels, kind_ids, kinds_to_merge, merge
from paddle_vl_sp.formers.model_view import ModelView
from paddle_vl_sp.formers.norms import text_init
from paddle_vl_sp.formers.own_part import OwnPart
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.verify import check_loaded, checking
from paddle_vl_sp.vision.owners import own_plan


@dataclass(frozen=True, eq=False)
class Visual(OfMask):
    """What the model's forward knows of the mask that it hands to the text model."""

    plan: VisualPlan  # of the tokens that the mask is of: all, or this rank's part where the tower is shared
    loaded: LoadedPlans | None
    syncs: int  # host synchronisations so far
    is_part: bool = False  # context parallelism: the mask is of a part of the sequence, which upstream does not know
    reached: list[bool] = field(default_factory=list)  # by PaddleFormers' text model, which completes the levels


VISUAL: Handover[Visual] = Handover("visual")


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


def text_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Plans this rank's rows where a mask came, with levels whose gradients are whole."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        given = call.arguments
        mask, levels = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
        if mask is None or levels is None or not len(levels) or mask.ndim != 2 or mask.dtype != paddle.bool:
            return original(*call.args, **call.kwargs)
        group = require_tensor_parallel_group() if self.config.sequence_parallel else None
        plan, levels = _of_this_rank(mask, list(levels), group, _is_own_part(mask, given, group))
        given["deepstack_visual_embeds"] = levels
        visual = VISUAL.get()
        with OWN_ROWS.given(OwnRows(mask, plan, is_part=visual is not None and visual.is_part)):
            return original(*call.args, **call.kwargs)

    return forward


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


def _is_own_part(mask: Tensor, given: dict[str, Any], group: Group | None) -> bool:
    """Whether the mask is of this rank's part of the tokens, as where the tower is shared, and not of all."""
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if not has_peers(group) or tokens is None:
        return False
    return bool(mask.size * group.nranks == tokens.shape[0] * tokens.shape[1])


def _of_this_rank(
    mask: Tensor, levels: list[Tensor], group: Group | None, is_own_part: bool
) -> tuple[VisualPlan, list[Tensor]]:
    """The plan of the text model's hidden states; under sequence parallelism, a cut of the flattened batch [B * S]."""
    visual = VISUAL.get()
    if visual is not None and visual.is_for(mask):
        visual.reached.append(True)
    else:  # another caller's mask, or a replay in the backward
        visual = None
    plan, syncs = _own_plan(mask, levels[0].shape[0], visual, None if is_own_part else group)
    syncs += visual.syncs if visual else 0
    if not is_own_part and not (visual and visual.is_part):  # those are counted where they are placed
        note_forward(plan, num_levels=len(levels), group=group, syncs=syncs)
    if group is None or is_own_part:  # whose gradients return to the ranks that encoded the rows
        return plan, levels
    return plan, complete_grad(levels, plan, group)


def _own_plan(mask: Tensor, num_features: int, visual: Visual | None, group: Group | None) -> tuple[VisualPlan, int]:
    """And the host synchronisations that it took."""
    if visual and group is None:
        return visual.plan, 0
    tokens = mask if group is None else mask.reshape([1, -1])
    layout = SeqLayout(tokens.shape[1])
    if group is not None:
        layout = SeqLayout(tokens.shape[1], sp_size=group.nranks, sp_rank=group.rank)
    if visual and visual.loaded:
        return visual.loaded.own(group, (1, layout.local_len), num_features).to(mask.place), 0
    if visual and visual.is_part:
        return rows_of_tensor_rank(visual.plan, plan_visual(tokens, None, layout, sequence_first=False)), 1
    return plan_visual(tokens, None, layout, sequence_first=False, num_features=num_features), 1


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
