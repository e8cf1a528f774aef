"""Qwen2.5-VL: all features enter at the embedding, before the cut, so one plan is all that it needs.

Its tower is replicated. It attends within windows, and in some blocks within a frame: never across frames.
"""

from __future__ import annotations

from paddle_vl_sp.formers import shared_tower, tiny
from paddle_vl_sp.formers.contracts import encodes_item_by_item, equals_ours
from paddle_vl_sp.formers.known import MODELS, Called, Family, Replaced
from paddle_vl_sp.formers.merge import KINDS, merging_forward

FAMILY = Family(
    "Qwen2.5-VL",
    f"{MODELS}.qwen2_5_vl.modeling",
    replaced=(Replaced("Qwen2_5_VLModel.forward", merging_forward, ("9fed8d0d13bfee0c",)),),
    called=tuple(
        Called(f"Qwen2_5_VLModel.{method}", ("self", pixels, grid)) for pixels, grid, method in KINDS.values()
    ),
    shared=(Replaced("Qwen2_5_VLModel.__init__", shared_tower.model_init, ("3d8d9c109c87c40e",)),),
    contract=(equals_ours(tiny.tiny_qwen2_5_vl, frames_apart=False), encodes_item_by_item(tiny.tiny_qwen2_5_vl)),
)
