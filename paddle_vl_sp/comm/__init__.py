"""Communication between ranks: agree on errors, gather and exchange rows, sum gradients, compare copies."""

from typing import TYPE_CHECKING

from paddle_vl_sp.lazy import lazy_exports

if TYPE_CHECKING:
    from paddle_vl_sp.comm.agree import agree
    from paddle_vl_sp.comm.gather import all_gather_rows
    from paddle_vl_sp.comm.grads import complete_grad

__all__ = ["agree", "all_gather_rows", "complete_grad"]

__getattr__, __dir__ = lazy_exports(__name__, {"agree": "agree", "all_gather_rows": "gather", "complete_grad": "grads"})
