"""One module a family of models: what of its classes is replaced, and by what."""

from paddle_vl_sp.formers.families.qwen3_vl import PLAIN, PLAIN_MOE
from paddle_vl_sp.formers.families.qwen3_vl_fleet import FAMILY

QWEN3_VL = (PLAIN, PLAIN_MOE, FAMILY)
FAMILIES = {"qwen3_vl": QWEN3_VL}

__all__ = ["FAMILIES", "QWEN3_VL"]
