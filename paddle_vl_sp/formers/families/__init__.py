"""One module a family of models: what of its classes is replaced, and by what."""

from paddle_vl_sp.formers.families import (
    glm_ocr,
    paddlefleet,
    paddleocr_vl,
    qwen2_5_vl,
    qwen3_next,
    qwen3_vl,
    qwen3_vl_fleet,
    text,
)

QWEN3_VL = (
    qwen3_vl.PLAIN,
    qwen3_vl.PLAIN_MOE,
    qwen3_vl_fleet.FAMILY,
    paddlefleet.EMBEDDING,
    paddlefleet.HEAD,
    qwen3_vl_fleet.MOE,
)
FAMILIES = {
    "qwen3_vl": QWEN3_VL,
    "qwen2_5_vl": (qwen2_5_vl.FAMILY,),
    "glm_ocr": (glm_ocr.FAMILY,),
    "paddleocr_vl": (paddleocr_vl.FAMILY,),
    "qwen2": (text.QWEN2,),
    "qwen3": (text.QWEN3, text.QWEN3_MOE),
    "qwen3_next": (qwen3_next.FAMILY,),
}
NOT_SUPPORTED = {  # family: why
    "ernie4_5_moe_vl": "it places rows by experts of its own for each kind of token",
    "glm4v_moe": "images and videos have one placeholder id, so that a plan cannot tell them apart",
    "qwen3_5": "it merges by itself, past PaddleFleet's embedding",
    "qwen3_5_moe": "the same as qwen3_5",
}

__all__ = ["FAMILIES", "NOT_SUPPORTED", "QWEN3_VL"]
