"""Text-only models, the plain classes: nothing of theirs is replaced but what context parallelism needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle_vl_sp.formers import tiny_text
from paddle_vl_sp.formers.context.forward import outer_forward, text_inner_forward
from paddle_vl_sp.formers.contracts import equals_ours_on_text, sees_the_cut
from paddle_vl_sp.formers.known import MODELS, Family, Replaced


def _family(name: str, build: Callable[..., Any], module: str, model: str, inner: str, outer: str) -> Family:
    """inner, outer: the fingerprints of the two forwards"""
    return Family(
        name,
        f"{MODELS}.{module}.modeling",
        replaced=(Replaced(f"{model}Model.forward", text_inner_forward, (inner,)),),
        cut=(Replaced(f"{model}ForCausalLMDeprecated.forward", outer_forward, (outer,)),),
        contract=(equals_ours_on_text(build), sees_the_cut(build)),
        is_optional=True,  # paddlefleet
    )


QWEN2 = _family("Qwen2", tiny_text.tiny_qwen2, "qwen2", "Qwen2", "0bb824a9793eb96f", "6fe2f38d9ea7a02a")
QWEN3 = _family("Qwen3", tiny_text.tiny_qwen3, "qwen3", "Qwen3", "66115bad3974c466", "b292c0f94be3d576")
QWEN3_MOE = _family(
    "Qwen3 MoE", tiny_text.tiny_qwen3_moe, "qwen3_moe", "Qwen3Moe", "05ac8fc56c0d67b4", "62201de0eabdb1e5"
)
