"""Is every parameter's gradient whole? Compared with differences of the loss, without a reference model.

Along a direction v that all ranks share, (L(p + v) - L(p - v)) / 2 is what a whole gradient's <g, v> must be.
`audit_gradients` makes few such steps, for many parameters at once, and says what each rank's gradient is.
"""

from paddle_vl_sp.audit.causes import Cause, register_causes
from paddle_vl_sp.audit.result import Finding, GradientAudit
from paddle_vl_sp.audit.run import audit_gradients

__all__ = ["Cause", "Finding", "GradientAudit", "audit_gradients", "register_causes"]
