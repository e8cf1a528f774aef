"""Qwen2.5-VL: all features enter at the embedding, before the cut, so one plan is all that it needs.

Its tower is replicated. It attends within windows, and in some blocks within a frame: never across frames.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.carried import LoadedPlans
from paddle_vl_sp.formers import shared_tower, tiny
from paddle_vl_sp.formers.balanced_tower import balanced_init
from paddle_vl_sp.formers.context.forward import outer_forward
from paddle_vl_sp.formers.context.plain import place
from paddle_vl_sp.formers.context.setting import refuse_uncut_training
from paddle_vl_sp.formers.context.step import STEP
from paddle_vl_sp.formers.contracts import encodes_item_by_item, equals_ours, sees_the_cut
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.merge import KINDS, merging_forward


def model_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inserts the features by one plan and lets the original do the rest, which then sees no pixels."""
    merging, signature = merging_forward(original), inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Layer, *args: Any, **kwargs: Any) -> Any:
        step = STEP.get()
        if step is None:
            refuse_uncut_training(self)
            return merging(self, *args, **kwargs)
        LoadedPlans.pop_from(kwargs)  # they are for a tensor-parallel cut alone
        call = signature.bind(self, *args, **kwargs)
        place(self, call.arguments, step)
        return original(*call.args, **call.kwargs)

    return forward


FAMILY = Family(
    "Qwen2.5-VL",
    f"{MODELS}.qwen2_5_vl.modeling",
    replaced=(Replaced("Qwen2_5_VLModel.forward", model_forward, ("9fed8d0d13bfee0c",)),),
    called=tuple(
        Called(f"Qwen2_5_VLModel.{method}", ("self", pixels, grid)) for pixels, grid, method in KINDS.values()
    ),
    shared=(Replaced("Qwen2_5_VLModel.__init__", shared_tower.model_init, ("3d8d9c109c87c40e",)),),
    balanced=(Replaced("Qwen2_5_VLModel.__init__", balanced_init, ("3d8d9c109c87c40e",)),),
    cut=(Replaced("Qwen2_5_VLForConditionalGeneration.forward", outer_forward, ("9f899dab65d24b7a",)),),
    contract=(
        equals_ours(tiny.tiny_qwen2_5_vl, frames_apart=False),
        sees_the_cut(tiny.tiny_qwen2_5_vl, frames_apart=False),
        encodes_item_by_item(tiny.tiny_qwen2_5_vl),
    ),
)
