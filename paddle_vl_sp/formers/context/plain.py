"""The plain vision-language models: this rank's embeddings, with the rows of the features that belong to it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.nn import Layer

from paddle_vl_sp.backends.plain import is_any_of
from paddle_vl_sp.formers import balanced_tower, shared_tower
from paddle_vl_sp.formers.context.attention import INDICES
from paddle_vl_sp.formers.context.step import Step
from paddle_vl_sp.formers.merge import KINDS, features_of, joined, kind_ids, kinds_to_merge
from paddle_vl_sp.formers.own_part import OwnPart
from paddle_vl_sp.plan import VisualPlan, check_feature_count
from paddle_vl_sp.report import note_forward
from paddle_vl_sp.rows import replace_rows
from paddle_vl_sp.vision.owners import own_plan

PADDING = -1  # no placeholder


@dataclass(frozen=True, eq=False)
class Placed:
    """What is visual in this rank's part of the sequence."""

    levels: list[Tensor]  # [N, H] each, or [n, H] of this rank's rows alone
    mask: Tensor  # bool [B, S_local]
    plan: VisualPlan  # of this rank's rows


def place(model: Layer, given: dict[str, Any], step: Step) -> Placed | None:
    """Changes the arguments of an inner forward to those of this rank's part; None for a batch of text."""
    ids, kinds = given["input_ids"], kinds_to_merge(model, given)
    if not kinds and any(given.get(pixels) is not None for pixels, _, _ in KINDS.values()):
        raise ValueError(
            f"context parallelism places features itself, and {type(model).__name__} has its own get_placeholder_mask: "
            "use PaddleFormers' own, or leave context parallelism out"
        )
    if given.get("position_ids") is None:
        given["position_ids"] = _positions(model, given)
    own_ids = step.own(ids, 0)
    embeds = model.get_input_embeddings()(own_ids)  # [B, S_local, H]
    placed = None
    if kinds:
        own = OwnPart(step.padded(ids, PADDING), kind_ids(model, kinds), step.layout)
        sends_rows = shared_tower.is_shared_over_context(model) and not balanced_tower.is_balanced(model)
        (main, *levels), used = (_own_features if sends_rows else _all_features)(model, given, step, own)
        placed = Placed(levels, is_any_of(own_ids, own.wanted), used.to(embeds.place))
        embeds = replace_rows(embeds, main, placed.plan)
        note_forward(own.plan, num_levels=len(levels), group=step.group)
        given |= dict.fromkeys([KINDS[kind][0] for kind in kinds])
    given |= {
        "input_ids": None,
        "inputs_embeds": embeds,
        "position_ids": step.own(given["position_ids"], 0),
        "attention_mask": None,
        "cache_position": None,
        "use_cache": False,
        INDICES: step.marker,
    }
    check_tensor_parallel(shared_tower.text_config(model), step)
    return placed


def _all_features(model: Any, given: dict[str, Any], step: Step, own: OwnPart) -> tuple[list[Tensor], VisualPlan]:
    """[main, *levels] of the whole batch, each [N, H], which every rank encodes, and the plan that places them."""
    features = joined(features_of(model, list(own.kind_ids), given), step.joined(given["input_ids"]), own.wanted, None)
    check_feature_count(int(own.plan.counts[1]), features[0].shape[0])
    return (features if features[0].shape[0] else [paddle.concat(features)]), own.plan


def _own_features(model: Any, given: dict[str, Any], step: Step, own: OwnPart) -> tuple[list[Tensor], VisualPlan]:
    """The same of this rank's rows [n, H] alone: the ranks share the tower, and send rows to those that use them."""
    features = joined(features_of(model, list(own.kind_ids), given, own.plans), own.ids, own.wanted, None)
    return features, own_plan(own.plan, features[0].shape[0])


def _positions(model: Any, given: dict[str, Any]) -> Tensor:
    """[3, B, S], of the whole batch, by the model's own rule."""
    names = inspect.signature(model.get_rope_index).parameters
    positions, model.rope_deltas = model.get_rope_index(**{name: given.get(name) for name in names})
    return positions


def rows_of_tensor_rank(plan: VisualPlan, tensor_plan: VisualPlan) -> VisualPlan:
    """The plan of a tensor-parallel rank's part of this rank's rows: its gather_indices point into those of `plan`."""
    gather = plan.gather_indices
    if isinstance(gather, np.ndarray):
        return VisualPlan.from_indices(
            tensor_plan.update_indices, gather[tensor_plan.gather_indices], tensor_plan.row_shape, plan.num_features
        )
    own = paddle.gather(gather, tensor_plan.gather_indices)
    return VisualPlan.from_indices(tensor_plan.update_indices, own, tensor_plan.row_shape, plan.num_features)


def check_tensor_parallel(config: Any, step: Step) -> None:
    """The plain classes shape the rows of their attention by max_sequence_length."""
    if not getattr(config, "sequence_parallel", False):
        return
    local = step.layout.local_len
    if config.max_sequence_length != local:
        raise ValueError(
            f"sequence_parallel with context parallelism: the plain classes need max_sequence_length={local}, this "
            f"rank's part of the padded sequence of {step.layout.seq_len}, got {config.max_sequence_length}: set it so "
            "with all batches padded to one length, or use the model on PaddleFleet"
        )
