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

    _check(hidden, features, plan, dispatch.is_tracing())
    return dispatch.replace_rows(hidden, features, plan.update_indices, plan.gather_indices)


def add_rows(hidden: Tensor, features: Tensor, plan: VisualPlan, *, inplace: bool = False) -> Tensor:
    """hidden[update] += features[gather]: hidden [..., H], features [N, H]; on a copy, or in place.

    Rows are unique, so the result is deterministic and rounded once; features are converted to hidden's dtype first.
    Gradients: features get that of their rows, in their own dtype, zero for rows that this rank does not use.
    In place, only the rows of the plan are written; no other operation may need hidden's old values for its gradient.
    """
    from paddle_vl_sp.backends import dispatch

    is_tracing = dispatch.is_tracing()
    _check(hidden, features, plan, is_tracing)
    if inplace and not is_tracing and hidden.is_leaf and not hidden.stop_gradient:
        raise ValueError(
            "add_rows(inplace=True) got a leaf that needs a gradient: its old value would be lost; "
            "pass inplace=False, or hidden states that an operation made"
        )
    return dispatch.add_rows(hidden, features, plan.update_indices, plan.gather_indices, inplace)


def _check(hidden: Tensor, features: Tensor, plan: VisualPlan, is_tracing: bool) -> None:
    """Reads fields of the plan, not its properties, which Paddle's bytecode translator (to_static) cannot trace."""
    if isinstance(plan.update_indices, np.ndarray):
        raise ValueError("the plan holds numpy arrays: bring it to the hidden states first, plan.to(hidden.place)")
    for name, x in (("hidden", hidden), ("features", features)):
        if not hasattr(x, "stop_gradient"):
            raise ValueError(f"{name} must be a Paddle tensor, got {type(x).__name__}: paddle.to_tensor(...) makes one")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    _check_shapes(_known(hidden.shape), _known(features.shape), plan.row_shape, plan.num_features)
    kinds = {str(x.dtype).rpartition(".")[2] for x in (plan.update_indices, plan.gather_indices)}
    if kinds != {"int64"}:
        raise ValueError(f"the plan's indices must be int64, got {sorted(kinds)}: astype('int64') them")
    if not is_tracing:
        _check_places(hidden, features, plan)


def _check_shapes(hidden: list[int], features: list[int], row_shape: tuple[int, int], num_features: int | None) -> None:
    """As far as sizes are known: a traced graph has -1 where the others come with the data."""
    leading, width = hidden[:-1], hidden[-1]
    if len(features) != 2 or not _is_same_shape(features[1:], [width]):
        raise ValueError(f"features must be [N, {width}] for hidden states {hidden}, got {features}")
    num_rows = -1 if -1 in row_shape else row_shape[0] * row_shape[1]
    if not _is_same_shape(leading, row_shape) and not _is_same_shape(leading, [num_rows]):
        raise ValueError(
            f"the plan is for hidden states {list(row_shape)} + [H] (or [{num_rows}, H]), got "
            f"{hidden}: plan with the layout, batch and sequence_first of these hidden states"
        )
    if num_features is not None and not _is_same_shape([num_features], features[:1]):
        raise ValueError(
            f"the plan is for {num_features} feature rows, got {features[0]}: use the features of the "
            "batch that was planned"
        )


def _check_places(hidden: Tensor, features: Tensor, plan: VisualPlan) -> None:
    tensors: list[Tensor] = [hidden, features, plan.update_indices, plan.gather_indices]
    places = {str(x.place) for x in tensors}
    if len(places) > 1:
        raise ValueError(
            f"hidden, features and plan must be on one device, got {sorted(places)}: plan.to(hidden.place)"
        )


def _known(shape: Sequence[object]) -> list[int]:
    """The shape with -1 for sizes that are not numbers: those of a graph that is being traced."""
    return [size if isinstance(size, int) else -1 for size in shape]


def _is_same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are equal, as far as they are known: -1 is an unknown size."""
    pairs = zip(a, b)  # noqa: B905  (to_static's zip knows no `strict`)
    return len(a) == len(b) and all(x == y or -1 in (x, y) for x, y in pairs)
