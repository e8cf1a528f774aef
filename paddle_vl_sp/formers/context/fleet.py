"""The model on PaddleFleet: the dict of its language model, for this rank's part of the sequence."""

from __future__ import annotations

from typing import Any

import paddle

from paddle_vl_sp.carried import GATHER, ORDER, PART, UPDATE
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.plain import PADDING
from paddle_vl_sp.formers.context.step import Step
from paddle_vl_sp.formers.merge import KINDS
from paddle_vl_sp.interleave import order_on_host
from paddle_vl_sp.plan import plan_visual
from paddle_vl_sp.report import note_forward


def part_of(step: Step, model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """ids, positions and plan of this rank; features stay whole, and the plan takes the rows that belong to it."""
    ids, kinds = given["input_ids"], [kind for kind in KINDS if given.get(f"{kind}_embeds") is not None]
    part = given | {
        "input_ids": step.own(ids, 0),
        "position_ids": step.own(given["position_ids"], 0),
        INDICES: step.marker,
    }
    if not kinds:
        return part
    wanted = tuple(getattr(model.config, f"{kind}_token_id") for kind in kinds)
    num_features = sum(given[f"{kind}_embeds"].shape[0] for kind in kinds)
    whole, place = step.padded(ids, PADDING), given[f"{kinds[0]}_embeds"].place
    is_cut = step.tensor_cut[1] > 1
    plan = plan_visual(whole, wanted, step.own_layout, sequence_first=is_cut, num_features=num_features).to(place)
    note_forward(plan, group=step.group)
    part |= {PART: True, UPDATE: plan.update_indices, GATHER: plan.gather_indices}
    if len(kinds) > 1:
        part[ORDER] = paddle.to_tensor(order_on_host(whole, wanted)[0], place=place)
    return part
