"""PADDLE_VL_SP_CHECK=1: every loaded plan against a fresh one, every merge against PaddleFleet's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from paddle_vl_sp.fleet.inputs import GATHER, UPDATE
from paddle_vl_sp.ops import CHECK
from paddle_vl_sp.plan import VisualPlan


def check_same_plan(loaded: VisualPlan, fresh: VisualPlan) -> None:
    for key, got, expected in (
        (UPDATE, loaded.update_indices, fresh.update_indices),
        (GATHER, loaded.gather_indices, fresh.gather_indices),
    ):
        used = np.asarray(got)
        if not np.array_equal(used[used >= 0], np.asarray(expected)):
            raise ValueError(
                f"{key} of the batch is not the plan of this rank: got {summary(got)}, expected {summary(expected)}; "
                "the data loader must plan with the ids, the layout and the rank that the model sees"
            )


def check_same_output(ours: dict[str, Any], upstream: dict[str, Any]) -> None:
    """Holds the values of a merge against PaddleFleet's own, bit for bit."""
    if set(ours) != set(upstream):
        raise ValueError(f"{CHECK}: keys differ from PaddleFleet's merge: {sorted(set(ours) ^ set(upstream))}")
    for key, expected in upstream.items():
        got = ours[key]
        pairs = zip(got, expected, strict=True) if isinstance(expected, list) else [(got, expected)]
        for ours_one, upstream_one in pairs:
            if isinstance(upstream_one, paddle.Tensor) and not same_bits(ours_one, upstream_one):
                raise ValueError(
                    f"{CHECK}: {key} differs from PaddleFleet's merge: {list(ours_one.shape)} {ours_one.dtype} against "
                    f"{list(upstream_one.shape)} {upstream_one.dtype}; set merge = 'upstream' and report it"
                )


def same_bits(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes())


def summary(indices: Any) -> str:
    values = np.asarray(indices)
    return f"{values.size} indices {values[:4].tolist()}..."
