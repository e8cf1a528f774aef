"""Plans in the batches of PaddleFormers' command line, whose collate function no setting can change."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from paddle.nn import Layer

from paddle_vl_sp.formers.changes import Replacement, replace
from paddle_vl_sp.formers.known import OURS
from paddle_vl_sp.formers.loader import PlanningCollate
from paddle_vl_sp.formers.patch import UpstreamChanged, switched_off
from paddle_vl_sp.log import logger
from paddle_vl_sp.settings import LOADER_PLANS, is_on

WORKFLOW, COLLATE = "paddleformers.cli.train.sft.workflow", "mm_collate_fn"


def plan_if_asked() -> None:
    """With PADDLE_VL_SP_LOADER_PLANS=1, batches of VL-SFT and VL-PT runs carry the plans of all ranks."""
    if is_on(LOADER_PLANS) and not switched_off():
        plan_in_workflow()
        logger.info("the data loader plans: %s=1", LOADER_PLANS)


def plan_in_workflow() -> Replacement | None:
    """Replaces the collate function of PaddleFormers' VL runs, until `revert()`; None where it is ours already."""
    workflow = importlib.import_module(WORKFLOW)
    if COLLATE not in vars(workflow):
        raise UpstreamChanged(f"{WORKFLOW} has no {COLLATE}, to which {LOADER_PLANS}=1 adds the plans: leave it out")
    return replace(workflow, COLLATE, planning)


def planning(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the plans of all ranks to each batch."""

    @functools.wraps(original)
    def collate(batch: Any, *args: Any, **named: Any) -> Any:
        own = functools.partial(original, **named)
        model, arguments = named.get("model"), named.get("training_args")
        if args or model is None or arguments is None:
            raise UpstreamChanged(
                f"{COLLATE} is called in an unknown way, without model and training_args by name, from which "
                f"{LOADER_PLANS}=1 knows how the sequence is cut: leave it out"
            )
        planned = _planned_for(model)
        if planned is None:
            raise ValueError(
                f"{LOADER_PLANS}=1 with {type(model).__name__}: no model in it takes plans from the data loader; leave "
                "it out"
            )
        placeholder_ids, merge_size, cut = planned
        return PlanningCollate(
            own,
            placeholder_ids,
            sp_size=arguments.tensor_model_parallel_size if arguments.sequence_parallel else 1,
            cut=cut,
            merge_size=merge_size,
            sequence_parallel=arguments.sequence_parallel,
        )(batch)

    return collate


def _planned_for(model: Layer | None) -> tuple[tuple[int, int], int, str] | None:
    """Placeholder ids, merge size and cut of the layer that takes plans, which may be wrapped, as LoRA does."""
    for layer in [] if model is None else model.sublayers(include_self=True):
        if not hasattr(type(layer).forward, OURS):
            continue
        if hasattr(layer, "vision_model"):  # on PaddleFleet
            ids = layer.image_token_index, layer.video_token_index
            return ids, layer.config.vision_config.spatial_merge_size, "sequence"
        if hasattr(layer, "visual"):
            ids = layer.config.image_token_id, layer.config.video_token_id
            return ids, layer.visual.spatial_merge_size, "flattened"
    return None
