"""One module a family of models: what of its classes is replaced, and by what."""

from paddle_vl_sp.formers.families import qwen2_5_vl, qwen3_vl, qwen3_vl_fleet

QWEN3_VL = (qwen3_vl.PLAIN, qwen3_vl.PLAIN_MOE, qwen3_vl_fleet.FAMILY)
FAMILIES = {"qwen3_vl": QWEN3_VL, "qwen2_5_vl": (qwen2_5_vl.FAMILY,)}

__all__ = ["FAMILIES", "QWEN3_VL"]
