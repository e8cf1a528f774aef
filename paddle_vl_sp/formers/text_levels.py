"""Deepstack levels in the text model of the plain Qwen3-VL classes: this rank's rows of them, and whole gradients."""

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
from paddle_vl_sp.formers.context.plain import rows_of_tensor_rank
from paddle_vl_sp.formers.deepstack import OWN_ROWS, OwnRows
from paddle_vl_sp.formers.groups import require_tensor_parallel_group
from paddle_vl_sp.layout import SeqLayout
from paddle_vl_sp.plan import VisualPlan, plan_visual
from paddle_vl_sp.report import note_forward


@dataclass(frozen=True, eq=False)
class Visual(OfMask):
    """What the model's forward knows of the mask that it hands to the text model."""

    plan: VisualPlan  # of the tokens that the mask is of: all, or this rank's part where the tower is shared
    loaded: LoadedPlans | None
    syncs: int  # host synchronisations so far
    is_part: bool = False  # context parallelism: the mask is of a part of the sequence, which upstream does not know
    reached: list[bool] = field(default_factory=list)  # by PaddleFormers' text model, which completes the levels


VISUAL: Handover[Visual] = Handover("visual")


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
