"""Known causes of wrong gradients in PaddleFormers' models, for the tables of `audit_gradients`."""

from paddle_vl_sp.audit.causes import Cause, register_causes

DEEPSTACK = Cause(
    r"\.(visual|vision_model)\.",
    ("mixed", "partial"),
    "deepstack features under TP-SP: apply_to_qwen3_vl() before the model is built",
)


def name_causes() -> None:
    """Has audits name them."""
    register_causes(DEEPSTACK)
