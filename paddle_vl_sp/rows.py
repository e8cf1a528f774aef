"""Visual features into hidden states, at the rows of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paddle_vl_sp.plan import VisualPlan

if TYPE_CHECKING:
    from paddle import Tensor


def replace_rows(hidden: Tensor, features: Tensor, plan: VisualPlan) -> Tensor:
    """hidden[update] = features[gather], on a copy: hidden [..., H], features [N, H].

    Pure movement, exact in every dtype; features are converted to hidden's dtype. Gradients: features get that of
    their rows, in their own dtype, zero for rows that this rank does not use; hidden gets zero at the replaced rows.

    >>> plan = plan_visual(paddle.to_tensor([[1, 9, 9, 1]]), (9,), SeqLayout(4), sequence_first=False)
    >>> replace_rows(paddle.zeros([1, 4, 2]), paddle.ones([2, 2]), plan).sum(-1).tolist()
    [[0.0, 2.0, 2.0, 0.0]]
    """
    from paddle_vl_sp.backends import dispatch

    return dispatch.untranslated(_replace_rows, hidden, features, plan)


def add_rows(hidden: Tensor, features: Tensor, plan: VisualPlan, *, inplace: bool = False) -> Tensor:
    """hidden[update] += features[gather]: hidden [..., H], features [N, H]; on a copy, or in place.

    Rows are unique, so the result is deterministic and rounded once; features are converted to hidden's dtype first.
    Gradients: features get that of their rows, in their own dtype, zero for rows that this rank does not use.
    In place, only the rows of the plan are written; no other operation may need hidden's old values for its gradient.

    >>> plan = plan_visual(paddle.to_tensor([[1, 9, 9, 1]]), (9,), SeqLayout(4), sequence_first=False)
    >>> add_rows(paddle.ones([1, 4, 2]), paddle.ones([2, 2]), plan).sum(-1).tolist()
    [[2.0, 4.0, 4.0, 2.0]]
    """
    from paddle_vl_sp.backends import dispatch

    return dispatch.untranslated(_add_rows, hidden, features, plan, inplace)


def _replace_rows(hidden: Tensor, features: Tensor, plan: VisualPlan) -> Tensor:
    from paddle_vl_sp.backends import dispatch

    _check(hidden, features, plan)
    return dispatch.replace_rows(hidden, features, plan.update_indices, plan.gather_indices)


def _add_rows(hidden: Tensor, features: Tensor, plan: VisualPlan, inplace: bool) -> Tensor:
    from paddle_vl_sp.backends import dispatch

    _check(hidden, features, plan)
    if inplace and not dispatch.is_tracing() and hidden.is_leaf and not hidden.stop_gradient:
        raise ValueError(
            "add_rows(inplace=True) got a leaf that needs a gradient: its old value would be lost; "
            "pass inplace=False, or hidden states that an operation made"
        )
    return dispatch.add_rows(hidden, features, plan.update_indices, plan.gather_indices, inplace)


def _check(hidden: Tensor, features: Tensor, plan: VisualPlan) -> None:
    from paddle_vl_sp.backends import dispatch
    from paddle_vl_sp.backends.checks import check_rows, is_same_shape

    if isinstance(plan.update_indices, np.ndarray):
        raise ValueError("the plan holds numpy arrays: bring it to the hidden states first, plan.to(hidden.place)")
    shape, feature_shape = check_rows(hidden, features, plan.update_indices, plan.gather_indices)
    row_shape = plan.row_shape
    num_rows = -1 if -1 in row_shape else plan.num_rows
    if not is_same_shape(shape[:-1], row_shape) and not is_same_shape(shape[:-1], [num_rows]):
        raise ValueError(
            f"the plan is for hidden states {list(row_shape)} + [H] (or [{num_rows}, H]), got "
            f"{shape}: plan with the layout, batch and sequence_first of these hidden states"
        )
    if plan.num_features is not None and not is_same_shape([plan.num_features], feature_shape[:1]):
        raise ValueError(
            f"the plan is for {plan.num_features} feature rows, got {feature_shape[0]}: use the features of the "
            "batch that was planned"
        )
    if not dispatch.is_tracing():
        _check_places(hidden, features, plan)


def _check_places(hidden: Tensor, features: Tensor, plan: VisualPlan) -> None:
    tensors: list[Tensor] = [hidden, features, plan.update_indices, plan.gather_indices]
    places = {str(x.place) for x in tensors}
    if len(places) > 1:
        raise ValueError(
            f"hidden, features and plan must be on one device, got {sorted(places)}: plan.to(hidden.place)"
        )
