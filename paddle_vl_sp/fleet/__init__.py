"""Subclasses of PaddleFleet's embeddings and transformer layers that plan the visual rows once; needs paddlefleet."""

from __future__ import annotations

from typing import Any

from paddle_vl_sp.fleet.topology import fleet_module, require_paddlefleet, visual_subclass

require_paddlefleet()

from paddle_vl_sp.fleet.deepstack import VisualDeepstack, deepstack_layer  # noqa: E402
from paddle_vl_sp.fleet.embedding import VisualEmbedding  # noqa: E402

_BASES = {
    "VisualGPTEmbedding": (VisualEmbedding, "models.gpt.gpt_embedding", "GPTEmbedding"),
    "VisualQwen3VLTextEmbedding": (VisualEmbedding, "models.qwen3_vl.embedding", "Qwen3VLTextEmbedding"),
    "VisualTransformerLayer": (VisualDeepstack, "transformer.transformer_layer", "TransformerLayer"),
    "VisualQwen3VLTextTransformerLayer": (
        VisualDeepstack,
        "models.qwen3_vl.qwen3_vl_model",
        "Qwen3VLTextTransformerLayer",
    ),
}

__all__ = ["VisualDeepstack", "VisualEmbedding", "deepstack_layer", *_BASES]


def __getattr__(name: str) -> Any:
    """Makes a class when it is asked for: not every PaddleFleet has every base."""
    if name not in _BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixin, module, base = _BASES[name]
    try:
        made = visual_subclass(mixin, getattr(fleet_module(module), base))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{name} extends {base} of paddlefleet.{module}, which this PaddleFleet lacks: {error}"
        ) from error
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    """With the classes that are made when they are asked for."""
    return sorted(__all__)
