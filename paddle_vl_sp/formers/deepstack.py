"""One deepstack level after one layer, for every Qwen3-VL class: the rows that a plan names, added once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.carried import Handover, OfMask
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.rows import add_rows
from paddle_vl_sp.verify import check_result, checking


@dataclass(frozen=True, eq=False)
class OwnRows(OfMask):
    """What a text model's or a layer's forward knows of the mask that it hands to `_deepstack_process`."""

    plan: VisualPlan  # of this rank's hidden states
    is_part: bool = False  # the mask is of a part of the sequence, which the original does not know of


OWN_ROWS: Handover[OwnRows] = Handover("own_rows")


def deepstack(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds by the plan that was made for the mask, and leaves other masks to the original."""

    @functools.wraps(original)
    def _deepstack_process(self: Layer, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Any:
        own = OWN_ROWS.get()
        is_planned = own is not None and own.is_for(visual_pos_masks)
        if own is None or not is_planned or hidden_states.shape[-1] != visual_embeds.shape[-1]:
            return original(self, hidden_states, visual_pos_masks, visual_embeds)  # which takes this rank's columns
        out = add_rows(hidden_states, visual_embeds, own.plan)  # a copy, as upstream: hooks may keep the layer's output
        if checking() and not own.is_part:
            with paddle.no_grad():
                upstream = original(self, hidden_states, visual_pos_masks, visual_embeds)
            advice = "set PADDLE_VL_SP=0 and report it"
            check_result("the deepstack addition", out, upstream, advice)
        return out

    return _deepstack_process
