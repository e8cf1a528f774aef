"""Visual features into hidden states, at the rows of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paddle_vl_sp.plan import VisualPlan

if TYPE_CHECKING:
    from paddle import Tensor


def replace_rows(hidden: Tensor, features: Tensor, plan: VisualPlan) -> Tensor:
    """hidden[update] = features[gather], on a copy: hidden [..., H], features [N, H].

    Pure movement, exact in every dtype; features are converted to hidden's dtype. Gradients: features get that of
    their rows, in their own dtype, zero for rows that this rank does not use; hidden gets zero at the replaced rows.
    """
    from paddle_vl_sp.backends import dispatch

    if not dispatch.is_tracing():  # in a traced graph shapes are not numbers; there the operators check memory bounds
        _check(hidden, features, plan)
    return dispatch.replace_rows(hidden, features, plan.update_indices, plan.gather_indices)


def add_rows(hidden: Tensor, features: Tensor, plan: VisualPlan, *, inplace: bool = False) -> Tensor:
    """hidden[update] += features[gather]: hidden [..., H], features [N, H]; on a copy, or in place.

    Rows are unique, so the result is deterministic and rounded once; features are converted to hidden's dtype first.
    Gradients: features get that of their rows, in their own dtype, zero for rows that this rank does not use.
    In place, only the rows of the plan are written; no other operation may need hidden's old values for its gradient.
    """
    from paddle_vl_sp.backends import dispatch

    if not dispatch.is_tracing():
        _check(hidden, features, plan)
        if inplace and hidden.is_leaf and not hidden.stop_gradient:
            raise ValueError(
                "add_rows(inplace=True) got a leaf that needs a gradient: its old value would be lost; "
                "pass inplace=False, or hidden states that an operation made"
            )
    return dispatch.add_rows(hidden, features, plan.update_indices, plan.gather_indices, inplace)


def _check(hidden: Tensor, features: Tensor, plan: VisualPlan) -> None:
    """Reads fields of the plan, not its properties, which Paddle's bytecode translator (to_static) cannot trace."""
    if isinstance(plan.update_indices, np.ndarray):
        raise ValueError("the plan holds numpy arrays: bring it to the hidden states first, plan.to(hidden.place)")
    for name, x in (("hidden", hidden), ("features", features)):
        if not hasattr(x, "place"):
            raise ValueError(f"{name} must be a Paddle tensor, got {type(x).__name__}: paddle.to_tensor(...) makes one")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    leading, width = list(hidden.shape[:-1]), hidden.shape[-1]
    if len(features.shape) != 2 or not _is_same_shape([features.shape[1]], [width]):
        raise ValueError(
            f"features must be [N, {width}] for hidden states {list(hidden.shape)}, got {list(features.shape)}"
        )
    num_rows = plan.row_shape[0] * plan.row_shape[1]
    if not _is_same_shape(leading, plan.row_shape) and not _is_same_shape(leading, [num_rows]):
        raise ValueError(
            f"the plan is for hidden states {list(plan.row_shape)} + [H] (or [{num_rows}, H]), got "
            f"{list(hidden.shape)}: plan with the layout, batch and sequence_first of these hidden states"
        )
    if plan.num_features is not None and not _is_same_shape([plan.num_features], [features.shape[0]]):
        raise ValueError(
            f"the plan is for {plan.num_features} feature rows, got {features.shape[0]}: use the features of the "
            "batch that was planned"
        )
    tensors: list[Tensor] = [hidden, features, plan.update_indices, plan.gather_indices]
    places = {str(x.place) for x in tensors}
    if len(places) > 1:
        raise ValueError(
            f"hidden, features and plan must be on one device, got {sorted(places)}: plan.to(hidden.place)"
        )


def _is_same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are equal, as far as they are known: -1 is an unknown size."""
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in zip(a, b, strict=True))
