"""One deepstack level after one layer, for every Qwen3-VL class: the rows that a plan names, added once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paddle

from paddle_vl_sp.formers.fingerprint import OURS
from paddle_vl_sp.ops import CHECK, checking
from paddle_vl_sp.plan import VisualPlan
from paddle_vl_sp.rows import add_rows


class DiffersFromUpstream(RuntimeError):
    """Under PADDLE_VL_SP_CHECK=1: a result is not, bit for bit, what PaddleFormers computes."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Stands where visual_pos_masks stands, from a model's or layer's forward to its _deepstack_process."""

    plan: VisualPlan
    mask: Any  # bool [B, S], for PaddleFormers' own method


def deepstack(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds by a plan where a plan came, and leaves masks to the original."""

    @functools.wraps(original)
    def _deepstack_process(self: Any, hidden_states: Any, visual_pos_masks: Any, visual_embeds: Any) -> Any:
        if not isinstance(visual_pos_masks, Rows):
            return original(self, hidden_states, visual_pos_masks, visual_embeds)
        rows = visual_pos_masks
        if hidden_states.shape[-1] != visual_embeds.shape[-1]:  # the original takes this rank's columns
            return original(self, hidden_states, rows.mask, visual_embeds)
        out = add_rows(
            hidden_states, visual_embeds, rows.plan
        )  # a copy, as upstream: hooks may keep the layer's output
        if checking():
            with paddle.no_grad():
                _hold_equal(out, original(self, hidden_states, rows.mask, visual_embeds))
        return out

    return _deepstack_process


def adds_by_plan(instance: Any) -> bool:
    """Whether the instance's class takes Rows, or a subclass has put its own method in front of ours."""
    return hasattr(type(instance)._deepstack_process, OURS)


def topology() -> Any:
    """Paddle's hybrid topology; None before fleet.init."""
    from paddle.distributed import fleet

    try:
        return fleet.get_hybrid_communicate_group()
    except (AssertionError, AttributeError):  # how Paddle says that there is none
        return None


def tensor_parallel_group() -> Any:
    """The group that sequence parallelism cuts over."""
    groups = topology()
    if groups is None:
        raise ValueError(
            "there is no tensor-parallel group: call paddle.distributed.fleet.init with mp_degree before the first "
            "forward, or turn sequence_parallel off"
        )
    return groups.get_model_parallel_group()


def _hold_equal(ours: Any, upstream: Any) -> None:
    if ours.shape != upstream.shape or ours.dtype != upstream.dtype:
        told = f"{ours.dtype} {list(ours.shape)} against {upstream.dtype} {list(upstream.shape)}"
    else:
        same = (ours == upstream) | (ours.isnan() & upstream.isnan())
        if bool(same.all()):
            return
        wrong = int((~same).sum())
        apart = float((ours.astype("float32") - upstream.astype("float32")).abs().max())
        told = f"{wrong} of {ours.size} values differ, by {apart:.3g} at most"
    raise DiffersFromUpstream(
        f"{CHECK}: the deepstack addition is not PaddleFormers': {told}; set PADDLE_VL_SP=0 and report it"
    )
