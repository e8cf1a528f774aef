"""q_norm and k_norm of the plain classes: replicated parameters whose gradients nobody sums."""

from __future__ import annotations

from typing import Any

from paddle_vl_sp.formers.report import LEFT_ALONE, REPLACED, Line

NAMES = ("q_norm", "k_norm")


def head_norms_without_model() -> list[Line]:
    """Where classes alone are changed, as by the plugin."""
    why = (
        "not marked: for plain classes under sequence parallelism, hand over the built model before the trainer is made"
    )
    return [Line("model", "q_norm, k_norm", LEFT_ALONE, why)]


def mark_head_norms(model: Any) -> list[Line]:
    """Marks them as sequence-parallel parameters, so that PaddleFormers' trainer sums their gradients.

    Every rank's gradient covers its own heads only. The marks must be there before the trainer wraps the model.
    """
    norms = [
        (name, layer)
        for name, layer in model.named_sublayers()
        if name.rpartition(".")[2] in NAMES and hasattr(layer, "enable_sequence_parallel")
    ]
    if not norms:
        return [Line("model", "q_norm, k_norm", LEFT_ALONE, f"{type(model).__name__} has none of the plain classes'")]
    text_config = getattr(model.config, "text_config", model.config)
    if not getattr(text_config, "sequence_parallel", False):
        return [
            Line("model", "q_norm, k_norm", LEFT_ALONE, "sequence_parallel is off: no trainer sums marked gradients")
        ]
    for _, norm in norms:
        norm.enable_sequence_parallel()
    return [Line("model", "q_norm, k_norm", REPLACED, f"{len(norms)} marked, the trainer sums their gradients")]
